"""What the figures read of a run's folder: its cases, each model's answers to the held-out questions, the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.tasks import TASKS, Example, draw_questions, examples_of
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from examples.echovlm.collator import Collator
    from examples.echovlm.config import RecipeConfig

ACCOUNT = "account.json"
SHUFFLED = "images shuffled"  # of a control whose answers are about other frames than the case's


@dataclass(frozen=True)
class Run:
    """A folder that `python -m examples.echovlm … --out` has written."""

    folder: Path

    @cached_property
    def started_with(self) -> dict[str, Any]:
        """The preset's values, `cases_file` and `base_folder`. Raises: MoEAdapterError if the folder is no run's."""
        file = self.folder / ACCOUNT
        try:
            return json.loads(file.read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError) as error:
            raise MoEAdapterError(
                f"{self.folder}: got no run ({error}); expected a folder that holds {ACCOUNT}, as "
                "python -m examples.echovlm --out writes it"
            ) from None

    @property
    def cases_file(self) -> Path:
        return Path(self.started_with["cases_file"] or self.folder / "cases" / "cases.jsonl")

    @property
    def base(self) -> Path:
        return Path(self.started_with["base_folder"] or self.folder / "base")

    @cached_property
    def cases(self) -> list[Case]:
        return read_cases(self.cases_file)

    @cached_property
    def config(self) -> RecipeConfig:
        """What the run was started with; what an earlier version of the recipe did not know is as in `paper`."""
        from examples.echovlm.config import RecipeConfig, load_preset

        known = {field.name for field in fields(RecipeConfig)}
        values = {name: value for name, value in self.started_with.items() if name in known}
        return load_preset("paper", values, {"evaluation": {"bertscore": None}})  # whose folder may have moved

    def held_out(self, task: str) -> list[Example]:
        """The task's questions about the held-out cases, in the order in which the evaluation asks them."""
        most, seed = self.started_with["evaluation"].get("questions_per_case"), self.started_with["seed"]
        cases = draw_questions((case for case in self.cases if case.split == "test"), most, seed)
        return examples_of(cases, self.cases_file.parent, (task,))

    @cached_property
    def answers(self) -> dict[str, dict[str, list[str]]]:
        """task → model → its answers to `held_out(task)`, tasks and models in the order of the recipe.

        Raises: MoEAdapterError if there are none, or they are not of these questions.
        """
        found = {task: {} for task in TASKS}
        for task, models in found.items():
            for file in sorted(self.folder.glob(f"evaluation/*/{task}.json")):  # base, stage I, stage II
                if SHUFFLED not in file.parent.name:
                    models[file.parent.name] = self._checked(file, task)
        if not any(found.values()):
            raise MoEAdapterError(
                f"{self.folder}: got no answers; expected evaluation/MODEL/TASK.json: let the run get to its "
                "evaluation, with --resume"
            )
        return {task: models for task, models in found.items() if models}

    def sums(self, model: str, task: str) -> dict[str, np.ndarray]:
        """The sums (N, S) of each score of a model's answers to `held_out(task)` (`metrics.py`)."""
        found = json.loads((self.folder / "evaluation" / model / f"{task}.json").read_text(encoding="utf-8"))["sums"]
        return {score: np.array(rows) for score, rows in found.items()}

    def _checked(self, file: Path, task: str) -> list[str]:
        answers = json.loads(file.read_text(encoding="utf-8")).get("answers", [])
        if len(answers) != (asked := len(self.held_out(task))):
            raise MoEAdapterError(
                f"{file}: got {len(answers)} answers, expected one to each of the {asked} questions about "
                f"{self.cases_file}; the cases have changed since"
            )
        return answers

    def load(self, *, trained: bool = True) -> tuple[Any, Collator]:
        """The base, or the model as the last stage of the run's method left it; in evaluation mode.

        Raises: MoEAdapterError if a stage's folder or the base is missing.
        """
        from examples.echovlm.base import load_base
        from examples.echovlm.methods import METHODS
        from examples.echovlm.stages import finished_stage

        model, collator = load_base(self.base, self.config)
        if trained and (stages := METHODS[self.config.method].stages):
            model = finished_stage(stages[-1], model, self.config, self.folder / f"stage{stages[-1]}")
        return model.eval(), collator
