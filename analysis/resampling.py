"""Uncertainty over cases: cluster bootstrap, permutation p-values, false discovery rate.

Tokens of a case are not independent, so what is drawn or permuted is always the case with all its tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from moe_adapter.errors import MoEAdapterError

CHUNK = 2**20  # numbers of a matrix (resamples, cases) that is held at a time


class Estimate(NamedTuple):
    """Values and their confidence intervals, arrays of one shape; no interval is NaN."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How uncertainty is found: so many bootstrap resamples and permutations, the level of intervals, the seed."""

    resamples: int = 1000
    permutations: int = 999
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1 or self.permutations < 1 or not 0 < self.level < 1:
            raise MoEAdapterError(
                f"got resamples={self.resamples}, permutations={self.permutations}, level={self.level}; expected at "
                "least 1 of each and a level between 0 and 1."
            )

    def bootstrap(self, values_NX: np.ndarray) -> np.ndarray:
        """Sums (R, X) over N cases drawn with replacement from the N given.

        Source: the cluster bootstrap, Davison & Hinkley (1997), section 3.8.
        """
        cases = len(values_NX)
        values_NX = values_NX.astype(np.float64, copy=False)
        rng = np.random.default_rng(self.seed)
        parts = []
        for rows in _chunks(self.resamples, cases):
            times_RN = [np.bincount(drawn, minlength=cases) for drawn in rng.integers(cases, size=(rows, cases))]
            parts.append(np.stack(times_RN).astype(np.float64) @ values_NX)
        return np.concatenate(parts)

    def interval(self, value: np.ndarray, samples: np.ndarray, cases: int) -> Estimate:
        """The interval of `value` (X…) from bootstrap samples (R, X…) of so many cases; NaN for fewer than two.

        Percentiles, expanded so that they cover for few cases too as a t-interval does. Samples without a value, NaN,
        are left out. Source: Hesterberg (2015), arXiv 1411.5279.
        """
        if cases < 2:
            return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
        t = special.stdtrit(cases - 1, (1 + self.level) / 2)
        tail = special.ndtr(-t * np.sqrt(cases / (cases - 1)))
        quantile = np.nanquantile if np.isnan(samples).any() else np.quantile
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All-NaN slice")
            low, high = quantile(samples, [tail, 1 - tail], axis=0)
        return Estimate(value, low, high)

    def permuted(self, labels_N: np.ndarray) -> Iterator[np.ndarray]:
        """All permutations of the labels, (P, N) some at a time."""
        rng = np.random.default_rng(self.seed)
        for rows in _chunks(self.permutations, len(labels_N)):
            yield rng.permuted(np.tile(labels_N, (rows, 1)), axis=1)

    def swaps(self, cases: int) -> Iterator[np.ndarray]:
        """Coin tosses for each case, (P, N) booleans some at a time."""
        rng = np.random.default_rng(self.seed)
        for rows in _chunks(self.permutations, cases):
            yield rng.random((rows, cases)) < 0.5


DEFAULT = Resampling()


def estimate_columns(**estimates: Estimate) -> dict[str, np.ndarray]:
    """Columns of a table, each estimate's name, name_low and name_high in turn."""
    return {
        f"{name}{suffix}": part.ravel()
        for name, estimate in estimates.items()
        for suffix, part in zip(("", "_low", "_high"), estimate, strict=True)
    }


def p_value(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(1 + #{null ≥ observed}) / (1 + P) for null (P, X…): never 0; Phipson & Smyth (2010), arXiv 1603.05766.

    What differs by rounding alone counts as equal, and a null without a value, NaN, as at least the observed one. NaN
    where the observed value is.
    """
    below = null < observed - 1e-9 * np.abs(observed) - 1e-12
    p = (1 + (~below).sum(axis=0)) / (1 + len(null))
    return np.where(np.isnan(observed), np.nan, p)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values of the same shape: the smallest false discovery rate at which each p-value is taken; NaN left out.

    Source: Benjamini & Hochberg (1995).
    """
    flat = p.ravel()
    order = np.argsort(flat)  # NaN last
    tests = int((~np.isnan(flat)).sum())
    scaled = flat[order] * tests / np.arange(1, len(flat) + 1)
    q = np.empty_like(flat)
    q[order] = np.minimum(np.fmin.accumulate(scaled[::-1])[::-1], 1)
    return np.where(np.isnan(p), np.nan, q.reshape(p.shape))


def _chunks(rows: int, width: int) -> Iterator[int]:
    """`rows` in parts, so that no matrix (part, width) has more than CHUNK numbers."""
    most = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, most):
        yield min(most, rows - start)
