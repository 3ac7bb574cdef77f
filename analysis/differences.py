"""The figure of a comparison: two records' loads, and where they differ by more than the choice of cases makes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_adapter.analysis import style
from moe_adapter.analysis.charts import SIGNIFICANT
from moe_adapter.analysis.compare import Comparison
from moe_adapter.analysis.resampling import benjamini_hochberg

DIVERGING = "PuOr_r"  # safe for colour-blind eyes; in grey the signs of what is sure tell its ends apart


def comparison_figure(
    found: Comparison, *, names: Sequence[str] = ("a", "b"), width_mm: float = style.DOUBLE_COLUMN_MM
) -> Figure:
    """Each expert's share of the routed tokens by cell in both records, and b − a with the sign of what is sure.

    A sign stands where q < 0.05, the false discovery rate over all cells and experts.
    """
    q_CE = benjamini_hochberg(found.p_CE)
    labels = [", ".join(map(str, cell)) for cell in found.cells]
    with style.style([*names, *labels]):
        height = (28 + 3.5 * min(found.a_CE.shape[1], 16)) * style.MM
        figure = Figure(figsize=(width_mm * style.MM, height), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        shared = Normalize(0, max(found.a_CE.max(), found.b_CE.max()))
        for ax, letter, name, share_CE in zip(axes, "ab", names, (found.a_CE, found.b_CE), strict=False):
            _map(ax, share_CE, labels, style.SEQUENTIAL, shared)
            ax.set_title(f"({letter}) {name}")
        difference_CE = found.difference_CE.value
        widest = float(np.abs(difference_CE).max()) or 1.0
        signed = Normalize(-widest, widest)
        _map(axes[2], difference_CE, labels, DIVERGING, signed)
        axes[2].set_title(f"(c) difference; + −: q < {SIGNIFICANT:g}")
        for cell, expert in zip(*np.nonzero(q_CE < SIGNIFICANT), strict=True):
            sign = "+" if difference_CE[cell, expert] > 0 else "−"
            colour = "k" if abs(difference_CE[cell, expert]) < widest / 2 else "w"
            axes[2].text(cell, expert, sign, ha="center", va="center_baseline", color=colour, fontweight="bold")
        axes[0].set_ylabel("expert")
        figure.supxlabel(", ".join(found.by), fontsize="medium")
        for scale, cmap, beside in ((shared, style.SEQUENTIAL, axes[:2]), (signed, DIVERGING, axes[2:])):
            colours = ScalarMappable(scale, cmap)
            figure.colorbar(colours, ax=list(beside), format=PercentFormatter(1, 0 if widest > 0.02 else 1))
    return figure


def _map(ax: Axes, values_CE: np.ndarray, labels: Sequence[str], cmap: str, scale: Normalize) -> None:
    ax.imshow(values_CE.T, cmap=cmap, norm=scale, aspect="auto", origin="lower", interpolation="nearest")
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    if len(labels) <= 12:
        ax.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) < 4 else 90)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
