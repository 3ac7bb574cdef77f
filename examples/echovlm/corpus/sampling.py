"""Balanced sampling of a long tail: organs as often as n^T says, n being how often they occur.

The paper names the tail, of vessels above all, as its open problem. T = 1 leaves the counts as they are, T = 0 makes
them equal; between them lies the temperature of multilingual pre-training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from moe_adapter.errors import MoEAdapterError


def quotas(
    counts: Mapping[str, int],
    total: int,
    *,
    temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
    repeat: bool = True,
) -> dict[str, int]:
    """How many of `total` draws each group gets, in proportion to weight · count^temperature; they sum to `total`.

    Fractions go to the largest remainders. Without `repeat` no group gets more than it has: what it cannot give goes
    to the others in their proportion, and the sum is at most that of the counts.
    Raises: MoEAdapterError for a negative total, a temperature outside [0, 1], a weight negative or of no group.
    """
    weights = weights or {}
    if total < 0:
        raise MoEAdapterError(f"total: got {total}, expected a number of draws from 0")
    if not 0 <= temperature <= 1:
        raise MoEAdapterError(f"temperature: got {temperature}, expected 0 (equal) to 1 (as they are)")
    if unknown := [name for name, weight in weights.items() if name not in counts or not 0 <= weight < float("inf")]:
        raise MoEAdapterError(f"weights: got {unknown[0]!r}, expected numbers ≥ 0 for some of {', '.join(counts)}")
    share = {name: weights.get(name, 1.0) * count**temperature for name, count in counts.items() if count}
    share = {name: value for name, value in share.items() if value}
    result = dict.fromkeys(counts, 0)
    left = total if repeat else min(total, sum(counts[name] for name in share))
    while share and left:
        part = _rounded(share, left)
        full = {} if repeat else {name: counts[name] for name in share if part[name] >= counts[name]}
        result |= full or part  # groups that give all they have are settled first, the rest is shared anew
        left -= sum((full or part).values())
        share = {name: value for name, value in share.items() if name not in full} if full else {}
    return result


def balanced(
    groups: Sequence[str],
    total: int | None = None,
    *,
    temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    repeat: bool = True,
) -> list[int]:
    """Indices into `groups`, so many of each group as `quotas` says, shuffled; `total` is by default their number.

    A group is gone through in a new random order before any of it comes again. The same arguments give the same list.
    """
    rng = np.random.default_rng(seed)
    wanted = quotas(
        Counter(groups),
        len(groups) if total is None else total,
        temperature=temperature,
        weights=weights,
        repeat=repeat,
    )
    indices: list[int] = []
    for name in sorted(wanted):
        members = [index for index, group in enumerate(groups) if group == name]
        while wanted[name]:
            drawn = rng.permutation(members)[: wanted[name]].tolist()
            indices += drawn
            wanted[name] -= len(drawn)
    return rng.permutation(indices).tolist() if indices else []


def _rounded(share: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to the shares, by largest remainder; ties go by name."""
    whole = sum(share.values())
    exact = {name: total * value / whole for name, value in share.items()}
    result = {name: int(value) for name, value in exact.items()}
    order = sorted(share, key=lambda name: (result[name] - exact[name], name))
    for name in order[: total - sum(result.values())]:
        result[name] += 1
    return result
