"""Held-out evaluation: a model's greedy reports against the references by organ, and its loss on general text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.cases import Case
from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig
from examples.echovlm.data import Data
from examples.echovlm.general import blocks, general_text
from examples.echovlm.metrics import METRICS, finding_accuracy, text_scores
from examples.echovlm.tasks import Example, examples_of
from examples.echovlm.training import own_precision
from moe_adapter.directory import replace_file

GENERAL_BLOCKS = 256  # of held-out general text, enough for the second decimal of its loss


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One model's answers on the held-out cases, and what they are worth.

    `by_organ`: organ → metric → 0 to 100. `findings`: finding-level accuracy in per cent by organ and of "all",
    None where no attributes are known. `general_loss`: nats per token of held-out general text, None if not a model.
    """

    name: str
    answers: tuple[str, ...]
    by_organ: dict[str, dict[str, float]]
    findings: dict[str, float | None]
    general_loss: float | None = None

    def average(self) -> dict[str, float]:
        """The paper's average: the unweighted mean over organs of each metric."""
        return {name: float(np.mean([scores[name] for scores in self.by_organ.values()])) for name in METRICS}


class Evaluator:
    """Evaluates one model after another on the same held-out cases and general text."""

    def __init__(self, data: Data, collator: Collator, config: RecipeConfig, out: Path, account: Account) -> None:
        """`out`: the folder of what each evaluation found, by which a resumed run spares itself another."""
        self.cases, self.out = data.test, out
        self.examples = examples_of(data.test, data.folder, ("report",))
        self.collator, self.config, self.account = collator, config, account
        self.text = blocks(general_text()[1], collator.processor.tokenizer)[:GENERAL_BLOCKS]

    def evaluate(self, name: str, model: PreTrainedModel) -> Scored:
        """Greedy reports on the held-out cases, scored, and the loss on general text."""

        def score() -> Scored:
            answers = answer(model, self.examples, self.collator, self.config.evaluation, label=f"reports, {name}")
            return self.score(name, answers, self.general_loss(model))

        return self._once(name, score)

    def evaluate_shuffled(self, name: str, model: PreTrainedModel) -> Scored:
        """The same with every case's images taken from another case of its organ: what is left was not seen."""

        def score() -> Scored:
            examples = shuffle_images(self.examples, self.config.seed)
            answers = answer(model, examples, self.collator, self.config.evaluation, label=f"shuffled images, {name}")
            return self.score(f"{name}, images shuffled", answers)

        return self._once(f"{name}, images shuffled", score)

    def score(self, name: str, answers: Sequence[str], general_loss: float | None = None) -> Scored:
        """Text scores and finding-level accuracy of one answer per held-out case."""
        groups = {organ: [i for i, case in enumerate(self.cases) if case.organ == organ] for organ in self._organs()}
        by_organ, findings = {}, {}
        for organ, members in {**groups, "all": range(len(self.cases))}.items():
            cases, said = [self.cases[i] for i in members], [answers[i] for i in members]
            findings[organ] = finding_accuracy(said, cases)
            if organ in groups:
                by_organ[organ] = text_scores(said, [case.findings for case in cases])
        scored = Scored(
            name=name, answers=tuple(answers), by_organ=by_organ, findings=findings, general_loss=general_loss
        )
        self._tell(scored)
        return scored

    @torch.inference_mode()
    def general_loss(self, model: PreTrainedModel) -> float:
        """Mean next-token loss in nats on blocks of held-out general text."""
        model.eval()
        size = self.config.evaluation.batch_size
        batches = [self.text[start : start + size] for start in range(0, len(self.text), size)]
        with own_precision(model):
            losses = [float(model(**self.collator(batch).to(model.device)).loss) for batch in ranks.share(batches)]
        return float(np.average(ranks.in_order(losses), weights=[len(batch) for batch in batches]))

    def _once(self, name: str, score: Callable[[], Scored]) -> Scored:
        file = self.out / f"{name}.json"
        found = ranks.from_main(json.loads(file.read_text()) if ranks.is_main() and file.is_file() else None)
        if found:
            scored = Scored(**{**found, "answers": tuple(found["answers"])})
            self._tell(scored)
            return scored
        scored = score()
        if ranks.is_main():
            self.out.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(asdict(scored), ensure_ascii=False, indent=1).encode())
        return scored

    def _organs(self) -> list[str]:
        return sorted({case.organ for case in self.cases})

    def _tell(self, scored: Scored) -> None:
        texts = ", ".join(f"{name} {value:.1f}" for name, value in scored.average().items())
        general = "" if scored.general_loss is None else f"; general text {scored.general_loss:.2f} nats"
        right = scored.findings["all"]
        findings = "" if right is None else f"; findings right {right:.1f} %"
        self.account.say(f"{scored.name}: {texts}{findings}{general}")


def most_common_reports(train: Sequence[Case], test: Sequence[Case]) -> list[str]:
    """The baseline that sees no image: the organ's most common training report in the case's language."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for case in train:
        counts.setdefault((case.organ, case.language), Counter())[case.findings] += 1
    best = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    return [best.get((case.organ, case.language), "") for case in test]


def shuffle_images(examples: Sequence[Example], seed: int) -> list[Example]:
    """Each example with the images of another one of its organ, at random (its own if the organ has no other)."""
    rng = np.random.default_rng(seed)
    shuffled = list(examples)
    for organ in sorted({example.organ for example in examples}):
        members = rng.permutation([i for i, example in enumerate(examples) if example.organ == organ])
        for member, other in zip(members, np.roll(members, 1), strict=True):
            shuffled[member] = replace(examples[member], images=examples[other].images)
    return shuffled
