"""Medians of interleaved rounds: every subject is timed once a round, so that a slow minute slows all of them.

The order changes from round to round: a subject inherits its forerunner's memory, in the allocator and in the cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LONG_ENOUGH = 0.03  # seconds


@dataclass(frozen=True)
class Time:
    """Seconds: the median of the rounds and the distance between their quartiles."""

    median: float
    spread: float


def interleaved(calls: dict[str, Callable[[], object]], *, seconds: float, rounds: int = 15) -> dict[str, Time]:
    """Time the calls in turns for about `seconds`, in 5 to `rounds` rounds after one that is thrown away."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, generator = list(calls), random.Random(0)
    for turn in range(rounds):
        generator.shuffle(order)
        for name in order:
            found[name].append(_once(calls[name]))
        if turn >= 4 and sum(map(sum, found.values())) > seconds:
            break
    return {name: _summary(times) for name, times in found.items()}


def _once(call: Callable[[], object]) -> float:
    """One call; a short one is repeated for LONG_ENOUGH after one that warms the caches."""
    started = now()
    call()
    first = now() - started
    if first > LONG_ENOUGH:
        return first
    started, count = now(), 0
    while count == 0 or now() - started < LONG_ENOUGH:
        call()
        count += 1
    return (now() - started) / count


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _summary(times: list[float]) -> Time:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Time(median, high - low)
