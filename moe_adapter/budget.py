"""Expert widths from a number of parameters that may be added."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from moe_adapter.config import DualPathConfig, resolve_dim
from moe_adapter.errors import MoEAdapterError

STEP = 8  # widths are multiples of this, which every kernel takes
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def fit_budget(
    config: DualPathConfig, ffn_dim: int, budget: int | str, added: Callable[[DualPathConfig], int]
) -> DualPathConfig:
    """`config` with the widest experts for which at most `budget` parameters are `added`.

    Both kinds of experts are scaled together and each width rounded to a multiple of 8, so that the config's proportion
    of shared to routed is kept.

    Raises:
        MoEAdapterError: the budget is no number, or below what the narrowest experts take.
    """
    limit = parse_count(budget)
    routed = resolve_dim(config.expert_dim, ffn_dim) if config.num_experts else 0
    shared = resolve_dim(config.shared_expert_dim, ffn_dim) if config.shared_expert_dim else 0
    wanted = {name: dim for name, dim in (("expert_dim", routed), ("shared_expert_dim", shared)) if dim}
    unit = math.lcm(*wanted.values())  # scales are n / unit: fine enough for every step of either width

    def widths(n: int) -> dict[str, int]:
        return {name: STEP * ((2 * n * dim + STEP * unit) // (2 * STEP * unit)) for name, dim in wanted.items()}

    narrowest = config.replace(**dict.fromkeys(wanted, STEP))
    base = added(narrowest)
    slopes = {name: (added(narrowest.replace(**{name: 2 * STEP})) - base) // STEP for name in wanted}

    def cost(n: int) -> int:
        return base + sum(slopes[name] * (width - STEP) for name, width in widths(n).items())

    least = -(-STEP * unit // (2 * min(wanted.values())))
    scales = range(least, max(least + 1, unit * limit // max(wanted.values())))  # no wider than the limit itself
    chosen = bisect_right(scales, limit, key=cost) - 1
    if chosen < 0:
        added_by = ", ".join(f"{name}={width}" for name, width in widths(least).items())
        raise MoEAdapterError(
            f"budget: got {limit:,} parameters, expected at least {cost(least):,}, which {added_by} add: raise it, or "
            "choose fewer layers or experts."
        )
    return config.replace(**widths(scales[chosen]))


def parse_count(budget: Any) -> int:
    """A number of parameters, as a number or as text: 200_000_000, "200M", "1.5B"."""
    match = re.fullmatch(r"\s*([\d_.]+)\s*([kmb]?)\s*", str(budget).lower())
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * UNITS[match[2]])
    except ValueError as error:
        raise MoEAdapterError(
            f'budget: got {budget!r}, expected a number of parameters such as 200_000_000, "200M" or "1.5B".'
        ) from error
