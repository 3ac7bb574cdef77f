"""Figure 3: what each step of the corpus was given, kept and dropped for which reason, from the steps' manifests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.echovlm.corpus.manifest import MANIFEST
from examples.echovlm.figures import figure, save
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a step counts.
UNITS = {
    "import": "examinations",
    "filter-images": "images",
    "filter-texts": "cases",
    "deidentify": "images",
    "generate": "parts of cases",
    "judge": "instances",
    "review": "instances",
    "deduplicate": "instances",
    "sample": "instances",
}
MOST_REASONS = 4  # named in a row; the others are summed up
LINE_MM = 3.2


def add(subparsers: Any) -> None:
    examples = ["pipeline raw images texts clean generated unique -o figure3.pdf"]
    parser = figure(subparsers, "pipeline", run, help="Figure 3: the corpus step by step", examples=examples)
    parser.add_argument(
        "manifests", type=Path, nargs="+", metavar="STEP", help=f"folders of steps in order, or their {MANIFEST}"
    )


def run(options: argparse.Namespace) -> list[Path]:
    return save(pipeline([read_manifest(path) for path in options.manifests]), options.output)


def read_manifest(path: Path) -> dict[str, Any]:
    """A step's account.

    Raises: MoEAdapterError if there is none, or what was given is not what was kept and dropped together.
    """
    file = path / MANIFEST if path.is_dir() else path
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        step, given, kept, dropped = (manifest[name] for name in ("step", "given", "kept", "dropped"))
        lost = sum(dropped.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoEAdapterError(
            f"{file}: got no account of a step ({error}); expected a {MANIFEST} as the corpus's steps write it"
        ) from None
    if given != kept + lost:
        raise MoEAdapterError(
            f"{file}: {step} was given {given}, kept {kept} and dropped {lost}, which don't add up; run the step again"
        )
    return manifest


def pipeline(manifests: Sequence[Mapping[str, Any]]) -> Figure:
    """A row for each step: the share that it kept and dropped, a segment for each reason, and the numbers in words."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    from moe_adapter.analysis import style

    texts = [_told(manifest["dropped"]) for manifest in manifests]
    heights = [max(4, text.count("\n") + 2) * LINE_MM for text in texts]
    dropped = {**style.TEXT_LOOK, "facecolor": style.ORANGE, "edgecolor": "0.15"}
    with style.style([*texts, *(manifest["step"] for manifest in manifests)]):
        drawn = Figure(
            figsize=(style.DOUBLE_COLUMN_MM * style.MM, (sum(heights) + 16) * style.MM), layout="constrained"
        )
        ax, words = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        places = [sum(heights[:row]) + height / 2 for row, height in enumerate(heights)]
        for place, manifest, text in zip(places, manifests, texts, strict=True):
            _draw_row(ax, place, manifest, dropped)
            words.text(0, place, text, va="center")
        names = [f"{m['step']}\n{m['given']:,} {UNITS.get(m['step'], 'items')}\n{m['kept']:,} kept" for m in manifests]
        ax.set_yticks(places, names)
        ax.set(xlim=(0, 1), ylim=(sum(heights), 0), xlabel="share of what the step was given")
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        words.set(xlim=(0, 1), title="dropped")
        words.set_axis_off()
        handles = [Patch(label="kept", **style.IMAGE_LOOK), Patch(label="dropped, by reason", **dropped)]
        drawn.legend(handles=handles, loc="outside upper left", ncols=2)
    return drawn


def _draw_row(ax: Axes, place: float, manifest: Mapping[str, Any], dropped: Mapping[str, Any]) -> None:
    from moe_adapter.analysis import style

    given = manifest["given"] or 1  # of nothing, nothing is drawn
    share = manifest["kept"] / given
    ax.barh(place, share, 1.6 * LINE_MM, **style.IMAGE_LOOK)
    for count in manifest["dropped"].values():
        ax.barh(place, count / given, 1.6 * LINE_MM, left=share, **dropped)
        share += count / given


def _told(dropped: Mapping[str, int]) -> str:
    """The reasons, the most frequent first, a line each."""
    rows = sorted(dropped.items(), key=lambda item: -item[1])
    named = rows if len(rows) <= MOST_REASONS else rows[: MOST_REASONS - 1]
    lines = [f"{count:,}  {reason}" for reason, count in named]
    if rest := rows[len(named) :]:
        lines.append(f"{sum(count for _, count in rest):,}  for {len(rest)} other reasons")
    return "\n".join(lines) or "none"
