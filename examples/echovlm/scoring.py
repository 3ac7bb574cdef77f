"""One task's held-out questions, and what a model's answers to them are worth: by organ, over all, by language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from examples.echovlm.cases import Case
from examples.echovlm.finding_scores import Findings, finding_sums, truth_of
from examples.echovlm.findings import parse_findings
from examples.echovlm.metrics import TextMetrics, corpus_score
from examples.echovlm.significance import Difference, Strata, Sums, differences, estimates
from examples.echovlm.tasks import Example
from moe_adapter.analysis.resampling import Estimate


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """A model's answers to a task's questions and their scores, 0 to 100, NaN where there was nothing to count.

    `by_organ`: organ → score → value. `overall` and, by language, `by_language`: score → its estimate over the organs
    (`significance.overall`). `sums`: each score's sums of each answer (N, S).
    """

    answers: tuple[str, ...]
    by_organ: dict[str, dict[str, float]]
    overall: dict[str, Estimate]
    by_language: dict[str, dict[str, Estimate]]
    sums: Sums = field(repr=False)

    def values(self) -> dict[str, Any]:
        """In JSON's types, None for NaN."""
        return {
            "by_organ": {organ: {name: _json(x) for name, x in row.items()} for organ, row in self.by_organ.items()},
            "overall": _rows(self.overall),
            "by_language": {language: _rows(found) for language, found in self.by_language.items()},
            "answers": self.answers,
        }


class HeldOut:
    """A task's held-out questions in order, each with the case that it is about."""

    def __init__(self, task: str, examples: Sequence[Example], cases: Iterable[Case]) -> None:
        """`cases`: those that the examples were made of, or more."""
        self.task, self.examples = task, list(examples)
        by_id = {case.id: case for case in cases}
        self.cases = [by_id[example.case_id] for example in examples]
        self.languages = sorted({case.language for case in self.cases})

    def sums(self, answers: Sequence[str], metrics: TextMetrics) -> dict[str, np.ndarray]:
        """The sums (N, S) of every score of one answer per question."""
        stated = [self._read(answer, case) for answer, case in zip(answers, self.cases, strict=True)]
        references = [example.answer for example in self.examples]
        pairs = zip(references, self.cases, strict=True)
        truths = [truth_of(self.task, reference, case) for reference, case in pairs]
        return metrics.sums(answers, references) | finding_sums(stated, truths)

    def scores(self, answers: Sequence[str], sums: Sums) -> TaskScores:
        """What the sums come to."""
        by_organ = {
            organ: {name: float(corpus_score(name, values[members].sum(axis=0))) for name, values in sums.items()}
            for organ in sorted({case.organ for case in self.cases})
            for members in [[i for i, case in enumerate(self.cases) if case.organ == organ]]
        }
        rows = {
            language: [i for i, case in enumerate(self.cases) if case.language == language]
            for language in self.languages
        }
        return TaskScores(
            answers=tuple(answers),
            by_organ=by_organ,
            overall=estimates(self._strata(range(len(self.cases))), sums),
            by_language={
                language: estimates(self._strata(members), {name: values[members] for name, values in sums.items()})
                for language, members in rows.items()
            },
            sums=sums,
        )

    def differences(self, a: Sums, b: Sums) -> dict[str, Difference]:
        """How much model a scores above model b on these questions, of the sums of their answers."""
        return differences(self._strata(range(len(self.cases))), a, b)

    def _strata(self, members: Iterable[int]) -> Strata:
        cases = [self.cases[i] for i in members]
        return Strata([case.organ for case in cases], [case.patient for case in cases])

    def _read(self, text: str, case: Case) -> Findings:
        return parse_findings(text, case.organ, case.language)


def _rows(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: {key: _json(x) for key, x in estimate._asdict().items()} for name, estimate in found.items()}


def _json(value: float | np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)
