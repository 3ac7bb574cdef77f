"""Figures from a routing record, with matplotlib's objects alone: no pyplot, no global state."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from moe_adapter.analysis import style
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.statistics import ExpertLoad, expert_load
from moe_adapter.errors import MoEAdapterError

OVERALL = "overall"
PANEL_MM = (45.0, 36.0)

# Label in the legend: the modalities it sums, and its look. Bars are stacked in this order.
SERIES = {
    "image": (("image",), style.IMAGE_LOOK),
    "video": (("video",), style.VIDEO_LOOK),
    "audio": (("audio",), style.AUDIO_LOOK),
    "text": (("prompt", "generated"), style.TEXT_LOOK),
}


def figure5(
    record: RoutingRecord,
    *,
    layer: int | None = None,
    share: bool = False,
    groups: Sequence[str] | None = None,
    titles: Mapping[str, str] | None = None,
    width_mm: float = style.DOUBLE_COLUMN_MM,
) -> Figure:
    """Expert load by group, image and text split: Figure 5 of the EchoVLM paper (arXiv 2509.14977).

    A panel for each group of the record, in alphabetical order, and one overall; in each, a bar per expert, as high
    as the number of routed tokens it got (a token counts once for each of its top-k experts and each layer).

    Args:
        layer: index of one layer; None sums over the layers.
        share: bars in per cent of the panel's routed tokens, on one scale, with a line at even load.
        groups: the groups to show, in this order; "overall" still counts every group.
        titles: panel titles for groups, and for "overall", that should not be titled by their own name.
        width_mm: the journal's column, 89 mm or 183 mm.

    Raises:
        MoEAdapterError: the record has no such group or layer.
    """
    where = None if layer is None else pc.field("layer") == _checked_layer(record, layer)
    load = expert_load(record, by=("group", "modality"), where=where)
    panels = _panels(record, load, groups)
    names = [(titles or {}).get(name, name) for name in panels]
    series = {name: look for name, look in SERIES.items() if _heights(load, name).any()}
    with style.style(names):
        figure, axes = panel_grid(len(panels), width_mm, sharey=share)
        for number, (ax, name, counts) in enumerate(zip(axes, names, panels.values(), strict=True)):
            _draw_panel(ax, {label: counts[label] for label in series}, share)
            ax.set_title(f"({letter(number)}) {name}")
        figure.supxlabel("expert" if layer is None else f"expert of layer {layer}", fontsize="medium")
        figure.supylabel("routed tokens (%)" if share else "routed tokens", fontsize="medium")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def _checked_layer(record: RoutingRecord, layer: int) -> int:
    layers = len(record.facts.layers)
    if not 0 <= layer < layers:
        raise MoEAdapterError(f"the record has layers 0 to {layers - 1}, not layer {layer}.")
    return layer


def _heights(load: ExpertLoad, label: str, **only: str) -> np.ndarray:
    """Counts (E,) of one series."""
    return np.sum([load.total(modality=modality, **only) for modality in SERIES[label][0]], axis=0)


def _panels(record: RoutingRecord, load: ExpertLoad, groups: Sequence[str] | None) -> dict[str, dict[str, np.ndarray]]:
    """Each panel's counts (E,) by series; the overall panel last, where there is more than one group."""
    known = sorted(record.facts.groups)
    chosen = known if groups is None else list(groups)
    if unknown := sorted(set(chosen) - set(known)):
        raise MoEAdapterError(f"the record has no group {unknown}; its groups are {', '.join(known)}.")
    panels = {group: {label: _heights(load, label, group=group) for label in SERIES} for group in chosen}
    if len(known) > 1:
        panels[OVERALL] = {label: _heights(load, label) for label in SERIES}
    return panels


def panel_grid(panels: int, width_mm: float, *, sharey: bool) -> tuple[Figure, list[Axes]]:
    """A figure with as many panels, as even rows of them as the width allows."""
    fit = max(1, round(width_mm / PANEL_MM[0]))
    rows = math.ceil(panels / fit)
    columns = math.ceil(panels / rows)
    height = (rows * PANEL_MM[1] + 12) * style.MM
    figure = Figure(figsize=(width_mm * style.MM, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    for spare in grid.flat[panels:]:
        spare.remove()
    return figure, list(grid.flat[:panels])


def _draw_panel(ax: Axes, counts: dict[str, np.ndarray], share: bool) -> None:
    """Stacked bars, one per expert."""
    total = np.sum(list(counts.values()), axis=0)
    scale = 100 / total.sum() if share and total.sum() else 1
    experts = np.arange(len(total))
    bottom = np.zeros(len(total))
    for label, height in counts.items():
        ax.bar(experts, height * scale, 0.8, bottom=bottom, label=label, **SERIES[label][1])
        bottom += height * scale
    if share:
        ax.axhline(100 / len(total), color="0.3", linewidth=0.6, linestyle=(0, (4, 3)))
    else:
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=not share))
    ax.margins(x=0.02)


def letter(number: int) -> str:
    """a, b, …, z, aa, ab, …"""
    more, last = divmod(number, len(string.ascii_lowercase))
    return (letter(more - 1) if more else "") + string.ascii_lowercase[last]
