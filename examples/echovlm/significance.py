"""Bootstrap intervals of scores and paired significance between two models, over patients within their organs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from examples.echovlm.finding_scores import FINDING_SCORES
from examples.echovlm.metrics import corpus_score
from moe_adapter.analysis.resampling import DEFAULT, Estimate, Resampling, p_value

Sums = Mapping[str, np.ndarray]


class Difference(NamedTuple):
    """How much one model scores above another, with its interval, and the two-sided p of no difference."""

    estimate: Estimate
    p: float


class Strata:
    """Which answers belong together: a patient's in an organ are drawn and exchanged as one, within that organ."""

    def __init__(self, organs: Sequence[str], patients: Sequence[str]) -> None:
        pairs = list(zip(organs, patients, strict=True))
        clusters = {pair: i for i, pair in enumerate(sorted(set(pairs)))}
        self.organs = tuple(sorted(set(organs)))
        self._cluster_of = [clusters[pair] for pair in pairs]
        self._members = [[i for (organ, _), i in clusters.items() if organ == name] for name in self.organs]
        self.patients = len(clusters)
        self.fewest = min(map(len, self._members))

    def totals(self, sums_NS: np.ndarray) -> list[np.ndarray]:
        """The sums by organ, each (patients of the organ, S)."""
        totals_CS = np.zeros((self.patients, sums_NS.shape[1]))
        np.add.at(totals_CS, self._cluster_of, sums_NS)
        return [totals_CS[members] for members in self._members]

    def of_organs(self, by_patient_PC: np.ndarray) -> list[np.ndarray]:
        """Columns by organ of a matrix with one for each patient of each organ."""
        return [by_patient_PC[:, members] for members in self._members]


def overall(name: str, sums_GS: np.ndarray) -> np.ndarray:
    """The score over G organs (…, G, S).

    Of a text metric the unweighted mean of the organs, the paper's average. Of a finding-level score that of all
    answers together, for an organ may have none that it counts.
    """
    if name in FINDING_SCORES:
        return corpus_score(name, sums_GS.sum(axis=-2))
    return corpus_score(name, sums_GS).mean(axis=-1)


def estimates(strata: Strata, sums: Sums, resampling: Resampling = DEFAULT) -> dict[str, Estimate]:
    """Each overall score with its bootstrap interval; NaN in its place where an organ has a single patient."""
    whole, drawn = _whole(strata, sums), _drawn(strata, sums, resampling)
    return {
        name: resampling.interval(overall(name, whole[name]), overall(name, drawn[name]), strata.fewest)
        for name in sums
    }


def differences(strata: Strata, a: Sums, b: Sums, resampling: Resampling = DEFAULT) -> dict[str, Difference]:
    """How much model a scores above model b on the same questions.

    The interval is the paired bootstrap's; p the share of exchanges of the two models' answers, patient by patient at
    random, that make the difference as large. Source: approximate randomisation, Noreen (1989); Koehn (2004).
    """
    observed = {
        name: overall(name, x) - overall(name, y) for name, x, y in _pairs(_whole(strata, a), _whole(strata, b))
    }
    samples = {  # the same draws for both
        name: overall(name, x) - overall(name, y)
        for name, x, y in _pairs(_drawn(strata, a, resampling), _drawn(strata, b, resampling))
    }
    null = _exchanged(strata, a, b, resampling)
    return {
        name: Difference(
            resampling.interval(observed[name], samples[name], strata.fewest),
            float(p_value(np.abs(observed[name]), np.abs(null[name]))),
        )
        for name in observed
    }


def _whole(strata: Strata, sums: Sums) -> dict[str, np.ndarray]:
    """The sums by organ (G, S)."""
    return {name: np.stack([part.sum(axis=0) for part in strata.totals(values)]) for name, values in sums.items()}


def _drawn(strata: Strata, sums: Sums, resampling: Resampling) -> dict[str, np.ndarray]:
    """The sums by organ of each resample (R, G, S), all scores of the same draws, each organ of its own."""
    parts = strata.totals(np.concatenate(list(sums.values()), axis=1))
    drawn = [replace(resampling, seed=resampling.seed + i).bootstrap(part) for i, part in enumerate(parts)]
    return _split(np.stack(drawn, axis=1), sums)


def _exchanged(strata: Strata, a: Sums, b: Sums, resampling: Resampling) -> dict[str, np.ndarray]:
    """The difference (P,) of each score after random exchanges."""
    names = [name for name in a if name in b]
    a, b = ({name: model[name] for name in names} for model in (a, b))
    parts_a, parts_b = (strata.totals(np.concatenate(list(model.values()), axis=1)) for model in (a, b))
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for coins_PC in resampling.swaps(strata.patients):
        coins = strata.of_organs(coins_PC.astype(np.float64))
        moved = [coin @ (y - x) for coin, x, y in zip(coins, parts_a, parts_b, strict=True)]
        after_a, after_b = (
            _split(np.stack([part.sum(axis=0) + sign * m for part, m in zip(parts, moved, strict=True)], axis=1), a)
            for parts, sign in ((parts_a, 1), (parts_b, -1))
        )
        for name, x, y in _pairs(after_a, after_b):
            found[name].append(overall(name, x) - overall(name, y))
    return {name: np.concatenate(values) for name, values in found.items()}


def _split(all_XS: np.ndarray, sums: Sums) -> dict[str, np.ndarray]:
    """The columns of each score, of a matrix (…, S) with those of all."""
    ends = np.cumsum([values.shape[1] for values in sums.values()])[:-1]
    return dict(zip(sums, np.split(all_XS, ends, axis=-1), strict=True))


def _pairs(a: Sums, b: Sums) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return [(name, a[name], b[name]) for name in a if name in b]
