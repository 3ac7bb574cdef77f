"""Figures of a record beside Figure 5: where tokens go, layer by layer, and what goes together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_adapter.analysis import style
from moe_adapter.analysis.coactivation import coactivation
from moe_adapter.analysis.figures import OVERALL, letter, panel_grid
from moe_adapter.analysis.paths import path_weights
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import DEFAULT, Resampling
from moe_adapter.analysis.specialisation import specialisation
from moe_adapter.analysis.statistics import expert_load
from moe_adapter.errors import MoEAdapterError

SIGNIFICANT = 0.05  # false discovery rate
THIN, THICK = 0.15, 6.0  # points


def layer_heatmap(
    record: RoutingRecord, *, groups: Sequence[str] | None = None, width_mm: float = style.DOUBLE_COLUMN_MM
) -> Figure:
    """Each expert's share of the routed tokens by layer, a panel for each group and one overall.

    Raises:
        MoEAdapterError: no such group, or layers have different numbers of experts.
    """
    load = expert_load(record, by=("group", "layer"))
    known = sorted(record.facts.groups)
    if unknown := sorted(set(groups or ()) - set(known)):
        raise MoEAdapterError(f"the record has no group {unknown}; its groups are {', '.join(known)}.")
    names = list(groups or known) + ([OVERALL] if len(known) > 1 else [])
    layers = sorted({layer for _, layer in load.cells})
    with style.style(names):
        figure, axes = panel_grid(len(names), width_mm, sharey=True)
        shares = [_layer_shares(load, layers, {} if name == OVERALL else {"group": name}) for name in names]
        scale = Normalize(0, max(share_LE.max() for share_LE in shares))
        for number, (ax, name, share_LE) in enumerate(zip(axes, names, shares, strict=True)):
            ax.imshow(share_LE.T, cmap=style.SEQUENTIAL, norm=scale, aspect="auto", origin="lower")
            ax.set_title(f"({letter(number)}) {name}")
            _whole_numbers(ax)
        figure.supxlabel("layer", fontsize="medium")
        figure.supylabel("expert", fontsize="medium")
        colours = ScalarMappable(scale, style.SEQUENTIAL)
        figure.colorbar(colours, ax=axes, label="share of routed tokens", format=PercentFormatter(1, 0))
    return figure


def stacked_load(
    record: RoutingRecord, *, where: pc.Expression | None = None, width_mm: float = style.SINGLE_COLUMN_MM
) -> Figure:
    """Load of each layer as a stacked bar, an expert a colour, with lines at even load.

    Raises:
        MoEAdapterError: no row passes the filter, or layers have different numbers of experts.
    """
    load = expert_load(record, by=("layer",), where=where)
    layers = [layer for (layer,) in load.cells]
    experts = load.share_CE.shape[1]
    with style.style():
        figure = Figure(figsize=(width_mm * style.MM, 55 * style.MM), layout="constrained")
        ax = figure.subplots()
        bottom = np.zeros(len(layers))
        for expert, look in enumerate(style.expert_looks(experts)):
            ax.bar(layers, load.share_CE[:, expert], 0.85, bottom=bottom, label=str(expert), **look)
            bottom += load.share_CE[:, expert]
        if experts <= style.MOST_COLOURS:
            for edge in range(1, experts):
                ax.axhline(edge / experts, color="0.2", linewidth=0.5, linestyle=(0, (4, 3)))
            figure.legend(loc="outside upper right", ncols=experts, title="expert")
        ax.set(xlabel="layer", ylabel="share of routed tokens", ylim=(0, 1))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.margins(x=0.02)
    return figure


def coactivation_matrix(
    record: RoutingRecord, *, where: pc.Expression | None = None, width_mm: float = style.SINGLE_COLUMN_MM
) -> Figure:
    """Of the tokens that chose the row's expert, the share that chose the column's too; over the layers together.

    Raises:
        MoEAdapterError: as `coactivation`, or every layer is top-1.
    """
    pairs_EE = coactivation(record, where=where).pairs_LEE.sum(axis=0)
    chosen_E = pairs_EE.diagonal().astype(float)
    together_EE = pairs_EE / np.where(chosen_E, chosen_E, np.nan)[:, None]
    np.fill_diagonal(together_EE, np.nan)
    if not np.nansum(together_EE):
        raise MoEAdapterError("no token chose two experts: co-activation is of layers with top-k of 2 or more.")
    with style.style():
        figure = Figure(figsize=(width_mm * style.MM, 0.85 * width_mm * style.MM), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(together_EE, cmap=style.SEQUENTIAL, vmin=0)
        if len(together_EE) <= style.MOST_COLOURS:
            half = np.nanmax(together_EE) / 2
            for (i, j), value in np.ndenumerate(together_EE):
                if not np.isnan(value):
                    ax.text(j, i, f"{value:.0%}", ha="center", va="center", color="k" if value > half else "w")
        ax.set(xlabel="with expert", ylabel="expert")
        _whole_numbers(ax)
        ax.spines[:].set_visible(False)
        figure.colorbar(image, ax=ax, format=PercentFormatter(1, 0), shrink=0.8)
    return figure


def specialisation_by_layer(
    record: RoutingRecord,
    *,
    where: pc.Expression | None = None,
    resampling: Resampling = DEFAULT,
    width_mm: float = style.SINGLE_COLUMN_MM,
) -> Figure:
    """Mutual information of group and expert by layer, beside what shuffled groups give; filled where it is more.

    Raises:
        MoEAdapterError: as `specialisation`.
    """
    found = specialisation(record, where=where, resampling=resampling)
    information, layers = found.information_L, np.array(found.layers)
    sure = information.q < SIGNIFICANT
    with style.style():
        figure, ax = _line_figure(width_mm, "layer", "I(group; expert), bits")
        ax.plot(layers, information.bits, color=style.BLUE, linewidth=1, label="record")
        ax.plot(layers, information.null, color="0.4", linewidth=1, linestyle=(0, (4, 3)), label="groups shuffled")
        ax.plot(layers[sure], information.bits[sure], "o", color=style.BLUE, ms=3.5, label=f"q < {SIGNIFICANT:g}")
        ax.plot(layers[~sure], information.bits[~sure], "o", color=style.BLUE, ms=3.5, mfc="w")
        ax.set_ylim(0, None)
        figure.legend(loc="outside upper right", ncols=3)
    return figure


def path_weights_by_layer(record: RoutingRecord, *, width_mm: float = style.SINGLE_COLUMN_MM) -> Figure:
    """α, λ and what they make of the three paths of equation (3), by layer.

    Raises:
        MoEAdapterError: the model has no dual-path layers, or mixes by token.
    """
    paths = path_weights(record)
    layers = np.arange(len(paths.alpha_L))
    if np.isnan(paths.alpha_L).all():
        raise MoEAdapterError("the record's model has no α: this figure is of dual-path layers that mix by scalars.")
    lines = {
        "α (static)": (paths.alpha_L, dict(color=style.BLUE, marker="o")),
        "λ": (paths.lam_L, dict(color=style.ORANGE, marker="s")),
        "(1 − α)·λ (shared)": (paths.shared_L, dict(color=style.GREEN, marker="^", linestyle=(0, (4, 3)))),
    }
    with style.style():
        figure, ax = _line_figure(width_mm, "layer", "weight")
        for name, (values, look) in lines.items():
            if not np.isnan(values).all():
                ax.plot(layers, values, label=name, linewidth=1, ms=3, **look)
        ax.set_ylim(0, 1)
        figure.legend(loc="outside upper right", ncols=3)
    return figure


def token_pathways(
    record: RoutingRecord, *, where: pc.Expression | None = None, width_mm: float = style.DOUBLE_COLUMN_MM
) -> Figure:
    """How tokens move from layer to layer between their first experts.

    A node is as large as the share of tokens whose strongest expert it is, a line as thick as the share that goes its
    way; lines of less than a tenth of an even share are left out.

    Raises:
        MoEAdapterError: as `RoutingRecord.tokens`, fewer than two layers, or no row passes the filter.
    """
    layers, flow_LEE = _flows(record, where)
    experts, total = flow_LEE.shape[1], flow_LEE[0].sum()
    share_LE = np.concatenate([flow_LEE.sum(axis=2), flow_LEE[-1:].sum(axis=1)]) / total
    with style.style():
        figure = Figure(figsize=(width_mm * style.MM, (25 + 7 * min(experts, 16)) * style.MM), layout="constrained")
        ax = figure.subplots()
        for left, flow_EE in enumerate(flow_LEE / total):
            for (i, j), share in np.ndenumerate(flow_EE):
                if share >= 0.1 / experts**2:
                    width = THIN + (THICK - THIN) * share * experts / 2
                    ax.plot([left, left + 1], [i, j], color=style.BLUE, alpha=0.35, linewidth=min(width, THICK))
        for expert in range(experts):
            sizes = 120 * share_LE[:, expert]
            ax.scatter(range(len(layers)), [expert] * len(layers), sizes, color="k", zorder=3, linewidths=0)
        ax.set(xlabel="layer", ylabel="first expert", xticks=range(len(layers)), xticklabels=layers)
        ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.margins(0.04, 0.12)
    return figure


def _flows(record: RoutingRecord, where: pc.Expression | None) -> tuple[list[int], np.ndarray]:
    """Layers, and (L − 1, E, E) tokens that went from one layer's first expert to the next one's."""
    experts = max(layer.num_experts for layer in record.facts.layers)
    flows: dict[tuple[int, int], np.ndarray] = {}
    for block in record.tokens(where):
        chosen = [(layer, expert_TK[:, 0].astype(np.int64)) for layer, expert_TK, _ in block.by_layer()]
        for (left, from_T), (right, to_T) in itertools.pairwise(chosen):
            counts = np.bincount(from_T * experts + to_T, minlength=experts**2).reshape(experts, experts)
            flows[left, right] = flows.get((left, right), 0) + counts
    if not flows:
        raise MoEAdapterError(f"{record.name} has no token in two layers that passes the filter {where}.")
    return [min(flows)[0], *(right for _, right in sorted(flows))], np.stack([flows[pair] for pair in sorted(flows)])


def _layer_shares(load, layers: list[int], only: dict[str, str]) -> np.ndarray:
    """(L, E): each expert's share of its layer's routed tokens; 0 where there are none."""
    counts_LE = np.stack([load.total(layer=layer, **only) for layer in layers]).astype(float)
    return counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)


def _line_figure(width_mm: float, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_mm * style.MM, 50 * style.MM), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure, ax


def _whole_numbers(ax: Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
