"""Held-out evaluation: a model's greedy answers to each task's questions, and its loss on general text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig
from examples.echovlm.data import Data
from examples.echovlm.general import blocks, general_text
from examples.echovlm.metrics import TextMetrics
from examples.echovlm.scoring import HeldOut, TaskScores
from examples.echovlm.significance import Difference
from examples.echovlm.tasks import Example, draw_questions, examples_of
from examples.echovlm.training import own_precision
from moe_adapter.directory import replace_file

GENERAL_BLOCKS = 256  # of held-out general text, enough for the second decimal of its loss
BASELINE = "most common answer"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One model's scores by task; `general_loss`: nats per token of held-out general text, None where not taken."""

    name: str
    tasks: dict[str, TaskScores]
    general_loss: float | None = None


class Evaluator:
    """Evaluates one model after another on the same held-out questions and general text.

    `held_out`: the questions by task; `metrics`: what they are scored by.
    """

    def __init__(self, data: Data, collator: Collator, config: RecipeConfig, out: Path, account: Account) -> None:
        """`out`: the folder of what each evaluation found, by which a resumed run spares itself another.

        Raises: MoEAdapterError for an encoder of BERTScore's that cannot be used.
        """
        self.data, self.out = data, out
        self.collator, self.config, self.account = collator, config, account
        self.metrics = TextMetrics(config.evaluation.bertscore)
        self.text = blocks(general_text()[1], collator.processor.tokenizer)[:GENERAL_BLOCKS]
        cases = draw_questions(data.test, config.evaluation.questions_per_case, config.seed)
        asked = {task: examples_of(cases, data.folder, (task,)) for task in config.evaluation.tasks}
        self.held_out = {task: HeldOut(task, examples, cases) for task, examples in asked.items() if examples}

    def evaluate(self, name: str, model: PreTrainedModel) -> Scored:
        """Greedy answers to the held-out questions, scored, and the loss on general text."""
        scored = self._answered(name, model, lambda examples: examples)
        loss = self._once(name, "general", lambda: self.general_loss(model))
        self.account.say(f"{name}: general text {loss:.2f} nats")
        return replace(scored, general_loss=loss)

    def evaluate_shuffled(self, name: str, model: PreTrainedModel) -> Scored:
        """The same with every case's images taken from another case of its organ: what is left was not seen."""
        name = f"{name}, images shuffled"
        return self._answered(name, model, lambda examples: shuffle_images(examples, self.config.seed))

    def evaluate_baseline(self) -> Scored:
        """The most common answers of training, scored."""
        for task in self.config.evaluation.tasks:
            if task not in self.held_out:
                self.account.say(f"{task}: left out, for no held-out case has one")
        tasks = {}
        for task, held_out in self.held_out.items():
            train = examples_of(self.data.train, self.data.folder, (task,))
            answers = most_common_answers(train, held_out.examples)
            tasks[task] = held_out.scores(answers, held_out.sums(answers, self.metrics))
            self._tell(BASELINE, task, tasks[task])
        return Scored(name=BASELINE, tasks=tasks)

    def differences(self, tuned: Scored, others: Sequence[Scored]) -> dict[str, dict[str, dict[str, Difference]]]:
        """How much `tuned` scores above each other model: task → model → score."""
        return {
            task: {o.name: held_out.differences(tuned.tasks[task].sums, o.tasks[task].sums) for o in others}
            for task, held_out in self.held_out.items()
        }

    @torch.inference_mode()
    def general_loss(self, model: PreTrainedModel) -> float:
        """Mean next-token loss in nats on blocks of held-out general text."""
        model.eval()
        size = self.config.evaluation.batch_size
        batches = [self.text[start : start + size] for start in range(0, len(self.text), size)]
        with own_precision(model):
            losses = [float(model(**self.collator(batch).to(model.device)).loss) for batch in ranks.share(batches)]
        return float(np.average(ranks.in_order(losses), weights=[len(batch) for batch in batches]))

    def _answered(self, name: str, model: PreTrainedModel, changed: Callable[[list[Example]], list[Example]]) -> Scored:
        tasks = {}
        for task, held_out in self.held_out.items():
            kept = self.out / name / f"{task}.{ranks.rank()}.jsonl"  # of each process, and until the task is done

            def found(task: str = task, held_out: HeldOut = held_out, kept: Path = kept) -> dict[str, Any]:
                examples, how = changed(held_out.examples), self.config.evaluation
                answers = answer(model, examples, self.collator, how, label=f"{task}, {name}", kept=kept)
                sums = held_out.sums(answers, self.metrics)
                return {"answers": answers, "sums": {key: values.tolist() for key, values in sums.items()}}

            values = self._once(name, task, found)
            kept.unlink(missing_ok=True)
            sums = {key: np.array(rows) for key, rows in values["sums"].items()}
            tasks[task] = held_out.scores(values["answers"], sums)
            self._tell(name, task, tasks[task])
        return Scored(name=name, tasks=tasks)

    def _once(self, name: str, part: str, find: Callable[[], Any]) -> Any:
        """What `find` returns, of JSON's types: found now, or by the run that this one goes on with."""
        file = self.out / name / f"{part}.json"
        kept = ranks.from_main(json.loads(file.read_text()) if ranks.is_main() and file.is_file() else None)
        if kept is not None:
            return kept
        found = find()
        if ranks.is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(found, ensure_ascii=False).encode())
        return found

    def _tell(self, name: str, task: str, scores: TaskScores) -> None:
        texts = ", ".join(f"{metric} {scores.overall[metric].value:.1f}" for metric in self.metrics.described)
        right = float(scores.overall["attributes"].value)
        findings = "" if np.isnan(right) else f"; findings right {right:.1f} %"
        self.account.say(f"{name}, {task}: {texts}{findings}")


def most_common_answers(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """The baseline that sees no image: the most common answer of training to the same question about the organ.

    The report's question is one in each language, and so is the diagnosis's. Empty where it was never asked.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for example in train:
        counts.setdefault((example.organ, example.prompt), Counter())[example.answer] += 1
    best = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    return [best.get((example.organ, example.prompt), "") for example in test]


def shuffle_images(examples: Sequence[Example], seed: int) -> list[Example]:
    """Each case's examples with another one's images, of its organ, at random (its own if the organ has no other)."""
    rng = np.random.default_rng(seed)
    images = {example.case_id: example.images for example in examples}
    instead = {}
    for organ in sorted({example.organ for example in examples}):
        cases = rng.permutation(list(dict.fromkeys(e.case_id for e in examples if e.organ == organ)))
        instead |= dict(zip(cases.tolist(), np.roll(cases, 1).tolist(), strict=True))
    return [replace(example, images=images[instead[example.case_id]]) for example in examples]
