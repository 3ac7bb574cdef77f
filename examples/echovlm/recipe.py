"""The recipe in the order in which it runs: cases, base, the method's stages, evaluation, routing, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.base import load_base, make_base
from examples.echovlm.collator import Collator
from examples.echovlm.config import ACCOUNT, PresetError, RecipeConfig
from examples.echovlm.corpus.sampling import balanced
from examples.echovlm.data import Data, load_data
from examples.echovlm.evaluation import Evaluator
from examples.echovlm.methods import METHODS, count_parameters
from examples.echovlm.report import Results, write_results
from examples.echovlm.routing import record_and_draw
from examples.echovlm.stages import finished_stage, path_weights, stage1, stage2
from examples.echovlm.tasks import Example, examples_of
from moe_adapter import dual_path_layers, static_only
from moe_adapter.integrations.checkpoints import remove_checkpoints

STAGES = {1: "Stage I: parameter-isolated pre-training", 2: "Stage II: cooperative instruction fine-tuning"}


def run(
    config: RecipeConfig, *, cases_file: Path | None, base: Path | None, out: Path, stage1_from: Path | None = None
) -> Path:
    """The whole recipe into the folder `out`, or what is left of it there; returns the path of its report.

    `stage1_from`: the folder of a finished stage I, to go on from it.

    Raises: MoEAdapterError for a case file, checkpoint or preset that cannot be used.
    """
    _check_complete(config, cases_file, base, stage1_from)
    torch.manual_seed(config.seed)
    account = Account(out / ACCOUNT)
    account.start(_started_with(config, cases_file=cases_file, base_folder=base, stage1_from=stage1_from))
    loaded = load_base(base, config) if base else None  # before anything is written, since it may be refused
    with account.step("Cases"):
        data = load_data(config, cases_file, out, account, made=account.finished("Cases"))
    with account.step("Base model"):
        if base is None and not account.finished("Base model"):
            make_base(config, data, out / "base", account)
        base = base or out / "base"
        model, collator = loaded or load_base(base, config)
        del loaded  # an engine may use the model up
    fresh = partial(_load_model, base, config)
    evaluator = Evaluator(data, collator, config, out / "evaluation", account)
    with account.step("Evaluate the base"):
        scored = [evaluator.evaluate_baseline(), evaluator.evaluate("base", model)]

    parameters = {}
    for stage in METHODS[config.method].stages:
        name, given = f"stage {'I' * stage}", stage1_from if stage == 1 else None
        examples = _examples(stage, data, config)
        folder = given or out / f"stage{stage}"
        model = _stage(stage, model, examples, collator, config, folder, account, fresh, given=given is not None)
        parameters[name] = count_parameters(model)
        with account.step(f"Evaluate {name}"):
            scored.append(evaluator.evaluate(name, model))
    with account.step("Evaluate the controls"):
        shuffled = evaluator.evaluate_shuffled(scored[-1].name, model)
        static_loss = _static_loss(model, evaluator)

    with account.step("Routing (Figure 5)"):
        reports = examples_of(data.test, data.folder, ("report",))
        figure = record_and_draw(model, reports, collator, config, out, account)
    with account.step("Show cases"):
        cases, questions = zip(*data.shown, strict=True)
        shown = answer(model, questions, collator, config.evaluation, label="show cases")
    results = Results(
        held_out=evaluator.held_out,
        metrics=evaluator.metrics,
        parameters=parameters,
        scored=scored,
        shuffled=shuffled,
        differences=evaluator.differences(scored[-1], [*scored[:-1], shuffled]),
        static_loss=static_loss,
        weights=path_weights(model),
        figure=figure,
        shown=list(zip(cases, questions, shown, strict=True)),
    )
    return write_results(out, results, account)


def _examples(stage: int, data: Data, config: RecipeConfig) -> list[Example]:
    """What a stage trains on: image-report pairs, then instructions, each organ as often as the preset says."""
    tasks = {"report": 1} if stage == 1 else config.instructions
    examples = [e for task, times in tasks.items() for e in examples_of(data.train, data.folder, (task,)) * times]
    how = config.sampling
    if how.temperature == 1 and not how.weights:
        return examples
    drawn = balanced([e.organ for e in examples], temperature=how.temperature, weights=how.weights, seed=config.seed)
    return [examples[i] for i in drawn]


def _static_loss(model: PreTrainedModel, evaluator: Evaluator) -> float | None:
    """The loss on general text of the static experts alone, which is the base's if they were left alone."""
    if not dual_path_layers(model):
        return None
    with static_only(model):
        return evaluator.general_loss(model)


def _stage(
    stage: int,
    model: PreTrainedModel,
    data: Sequence[Example],
    collator: Collator,
    config: RecipeConfig,
    folder: Path,
    account: Account,
    fresh: Callable[[], PreTrainedModel],
    *,
    given: bool = False,
) -> PreTrainedModel:
    """The model after a stage: trained now, or as the stage left it in `folder` before."""
    with account.step(STAGES[stage]):
        if given or account.finished(STAGES[stage]):
            account.say(f"taken over from {folder}")
            model = finished_stage(stage, model, config, folder)
        else:
            train = {1: stage1, 2: stage2}[stage]
            model = train(model, data, collator, config, folder, account, fresh)
    if ranks.is_main() and not given:
        remove_checkpoints(folder)  # not before the account says that the stage is done
    return model


def _load_model(base: Path, config: RecipeConfig) -> PreTrainedModel:
    return load_base(base, config)[0]


def _started_with(config: RecipeConfig, **paths: Path | None) -> dict[str, Any]:
    """What a resumed run has to have in common with the one that it goes on with, in JSON's types."""
    places = {name: path and str(path.resolve()) for name, path in paths.items()}
    return json.loads(json.dumps({**asdict(config), **places, "processes": ranks.count()}))


def _check_complete(config: RecipeConfig, cases_file: Path | None, base: Path | None, stage1_from: Path | None) -> None:
    if cases_file is None and config.phantoms is None:
        raise PresetError("this preset renders no cases: give your own with --cases")
    if base is None and config.base is None:
        raise PresetError("this preset makes no base model: give a checkpoint directory with --base")
    if stage1_from and 1 not in METHODS[config.method].stages:
        raise PresetError(f"--stage1: got {stage1_from}, but method {config.method} has no stage I to take over")
