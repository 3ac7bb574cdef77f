"""Snapshots of a training's routing, one record for each evaluation, and how it settles from one to the next.

records = open_snapshots("routing")  # as moe_adapter.integrations.snapshots wrote them
save_figure(saturation_curve(saturation(records)), "saturation")
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_adapter.analysis import style
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.saturation import Saturation
from moe_adapter.errors import MoEAdapterError

NAME = re.compile(r"step-(?P<step>\d+)(?:\.(?P<rank>\d+)-of-(?P<ranks>\d+))?\.parquet")


def snapshot_path(folder: str | os.PathLike[str], step: int, *, rank: int = 0, ranks: int = 1) -> Path:
    """Where the snapshot of a step lies, or a process's part of it."""
    part = f".{rank}-of-{ranks}" if ranks > 1 else ""
    return Path(folder, f"step-{step:06d}{part}.parquet")


def snapshot_parts(folder: str | os.PathLike[str]) -> dict[tuple[int, int], list[Path]]:
    """The files of each snapshot by (step, number of processes), in order of step and rank."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for path in Path(folder).glob("step-*.parquet"):
        if name := NAME.fullmatch(path.name):
            key = int(name["step"]), int(name["ranks"] or 1)
            found.setdefault(key, {})[int(name["rank"] or 0)] = path
    return {key: [path for _, path in sorted(parts.items())] for key, parts in sorted(found.items())}


def open_snapshots(folder: str | os.PathLike[str]) -> dict[str, RoutingRecord]:
    """The snapshots of a folder by step, in order of step, for `saturation`.

    One that lacks a process's part is left out, with a warning: its training was killed while writing it.

    Raises:
        MoEAdapterError: there is none, or a file that `RoutingRecord.open` refuses.
    """
    records = {}
    for (step, ranks), paths in snapshot_parts(folder).items():
        if len(paths) == ranks:
            records[str(step)] = RoutingRecord.open(paths)
        else:
            warnings.warn(f"step {step} in {folder} has {len(paths)} parts of {ranks} and is left out.", stacklevel=2)
    if not records:
        raise MoEAdapterError(
            f"no snapshot in {folder}: expected step-000200.parquet or the like, as RoutingSnapshots writes them."
        )
    return records


def saturation_curve(found: Saturation, *, width_mm: float = style.SINGLE_COLUMN_MM) -> Figure:
    """Router saturation over training, a line with its interval for each layer; dashed, what chance gives.

    The last snapshot, which the others are compared to, is 100 % by definition.
    """
    numbers = all(name.isdecimal() for name in found.checkpoints)
    steps = [int(name) for name in found.checkpoints] if numbers else list(found.checkpoints)
    scale = Normalize(min(found.layers), max(found.layers))
    shades = matplotlib.colormaps[style.SEQUENTIAL](np.linspace(0, 0.85, 256))  # the brightest are lost on white
    colours = LinearSegmentedColormap.from_list("layers", list(shades))
    with style.style(found.checkpoints):
        figure = Figure(figsize=(width_mm * style.MM, 55 * style.MM), layout="constrained")
        ax = figure.subplots()
        for number, layer in enumerate(found.layers):
            value_S, low_S, high_S = (part[:, number] for part in found.saturation_SL)
            colour = colours(scale(layer))
            ax.plot(steps, value_S, "o-", color=colour, linewidth=1, markersize=2.5)
            ax.fill_between(steps, low_S, high_S, color=colour, alpha=0.15, linewidth=0)
        for chance in np.unique(found.chance_L):
            ax.axhline(chance, color="0.3", linewidth=0.6, linestyle=(0, (4, 3)))
        ax.set(xlabel="step", ylabel="top-k shared with the last", ylim=(0, 1.02))
        ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
        if numbers:
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=ax, label="layer")
        bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure
