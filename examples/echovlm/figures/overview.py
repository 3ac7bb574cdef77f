"""Figure 2: what a case file holds, by organ, hospital, language and split, and how long its reports are."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.echovlm.figures import figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from examples.echovlm.cases import Case

MOST_BARS = 12  # of a panel; what is rarer is one bar
ROW_MM = 4.5  # of a bar
LENGTHS: dict[str, tuple[str, Callable[[str], int]]] = {
    "en": ("words", lambda text: len(text.split())),
    "zh": ("characters", lambda text: len("".join(text.split()))),
}


def add(subparsers: Any) -> None:
    examples = ["overview clean/cases.jsonl -o figure2.pdf"]
    parser = figure(subparsers, "overview", run, help="Figure 2: what a case file holds", examples=examples)
    parser.add_argument("cases", type=Path, metavar="CASES", help="a case file (docs/cases.md)")


def run(options: argparse.Namespace) -> list[Path]:
    from examples.echovlm.cases import read_cases

    return save(overview(read_cases(options.cases)), options.output)


def overview(cases: Sequence[Case]) -> Figure:
    """Cases by organ, hospital and language, images by organ, stacked by split; lengths of the reports by language."""
    from matplotlib.patches import Patch

    from examples.echovlm.cases import SPLITS
    from moe_adapter.analysis import style
    from moe_adapter.analysis.figures import letter, panel_grid

    looks = dict(zip(SPLITS, (style.IMAGE_LOOK, style.TEXT_LOOK, style.VIDEO_LOOK), strict=True))
    looks = {split: look for split, look in looks.items() if any(case.split == split for case in cases)}
    bars = {
        "cases by organ": counts((case.organ, case.split) for case in cases),
        "images by organ": counts((case.organ, case.split) for case in cases for _ in case.images),
        "cases by hospital": counts((case.hospital or "unknown", case.split) for case in cases),
        "cases by language": counts((case.language, case.split) for case in cases),
    }
    reported = [case for case in cases if case.findings]
    languages = sorted({case.language for case in reported})
    with style.style(name for rows in bars.values() for name in rows):
        drawn, axes = panel_grid(len(bars) + len(languages), style.DOUBLE_COLUMN_MM, sharey=False)
        drawn.set_figheight(2 * (max(map(len, bars.values())) * ROW_MM + 16) * style.MM)
        for ax, (title, rows) in zip(axes, bars.items(), strict=False):
            _draw_bars(ax, rows, looks)
            ax.set_title(title)
        for ax, language in zip(axes[len(bars) :], languages, strict=True):
            _draw_lengths(ax, [case for case in reported if case.language == language], language, looks)
        for number, ax in enumerate(axes):
            ax.set_title(f"({letter(number)}) {ax.get_title(loc='left')}")
        handles = [Patch(label=split, **look) for split, look in looks.items()]
        drawn.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return drawn


def counts(pairs: Iterable[tuple[str, str]]) -> dict[str, Counter[str]]:
    """name → split → how many, the most frequent names first; beyond MOST_BARS they are one, "N others"."""
    found: dict[str, Counter[str]] = {}
    for name, split in pairs:
        found.setdefault(name, Counter())[split] += 1
    ordered = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    if len(ordered) <= MOST_BARS:
        return dict(ordered)
    shown, rest = ordered[: MOST_BARS - 1], ordered[MOST_BARS - 1 :]
    return dict(shown) | {f"{len(rest)} others": sum((counter for _, counter in rest), Counter())}


def _draw_bars(ax: Axes, rows: Mapping[str, Counter[str]], looks: Mapping[str, Mapping[str, Any]]) -> None:
    left = [0] * len(rows)
    for split, look in looks.items():
        widths = [counter[split] for counter in rows.values()]
        ax.barh(range(len(rows)), widths, 0.75, left=left, **look)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        ax.annotate(f"{total:,}", (total, row), (2, 0), textcoords="offset points", va="center", fontsize=6)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * max(left))
    _whole(ax)


def _draw_lengths(ax: Axes, cases: Sequence[Case], language: str, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """A histogram, stacked by split."""
    import numpy as np

    unit, length = LENGTHS[language]
    lengths = {split: [length(case.findings) for case in cases if case.split == split] for split in looks}
    edges = np.histogram_bin_edges([each for of_split in lengths.values() for each in of_split], bins="auto")
    below = np.zeros(len(edges) - 1)
    for split, look in looks.items():
        heights = np.histogram(lengths[split], edges)[0]
        ax.bar(edges[:-1], heights, np.diff(edges), bottom=below, align="edge", **look)
        below += heights
    ax.set(xlabel=unit, ylabel="reports")
    ax.set_title(f"length of reports, {language}")
    _whole(ax)


def _whole(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
