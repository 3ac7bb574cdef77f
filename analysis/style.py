"""The look of every figure: journal size, colours that survive colour blindness and grey print, fonts for any label."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

MM = 1 / 25.4  # inches
SINGLE_COLUMN_MM, DOUBLE_COLUMN_MM = 89.0, 183.0

STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "hatch.linewidth": 0.4,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text: editable and searchable
    "savefig.dpi": 300,
}

# Okabe and Ito's colour-blind-safe colours, of different lightness; hatches tell them apart in grey.
IMAGE_LOOK = {"facecolor": "#0072B2", "edgecolor": "#003A5C", "linewidth": 0.4}
VIDEO_LOOK = {"facecolor": "#009E73", "edgecolor": "#003D2C", "linewidth": 0.4, "hatch": "....."}
TEXT_LOOK = {"facecolor": "#F0C064", "edgecolor": "#7A4B00", "linewidth": 0.4, "hatch": "/////"}
AUDIO_LOOK = {"facecolor": "#CC79A7", "edgecolor": "#5C2344", "linewidth": 0.4, "hatch": "xxxxx"}

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SEQUENTIAL = "cividis"  # even in lightness, for colour-blind eyes too
# Okabe and Ito's colours in an order in which neighbours differ in lightness.
CATEGORIES = ("#0072B2", "#F0E442", "#D55E00", "#56B4E9", "#332288", "#E69F00", "#009E73", "#CC79A7")
MOST_COLOURS = len(CATEGORIES)


def expert_looks(experts: int) -> list[dict[str, Any]]:
    """A bar's look for each expert: categories while there are enough, else shades in order."""
    if experts <= MOST_COLOURS:
        colours: Iterable[Any] = CATEGORIES[:experts]
    else:
        colours = matplotlib.colormaps[SEQUENTIAL]([i / (experts - 1) for i in range(experts)])
    edge = 0.3 if experts <= MOST_COLOURS else 0.0
    return [{"facecolor": colour, "edgecolor": "0.15", "linewidth": edge} for colour in colours]


def style(labels: Iterable[str] = ()) -> Any:
    """Context in which figures are built and saved; `labels` are the data's own strings, in any script."""
    return matplotlib.rc_context({**STYLE, "font.family": font_families("".join(labels))})


def font_families(text: str) -> list[str]:
    """Families that together have every character of `text`: matplotlib's own first, then one installed font.

    Warns if no installed font has them.
    """
    default = "DejaVu Sans"
    missing = _missing(font_manager.findfont(default), text)
    if not missing:
        return [default]
    entries = [font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name]
    for font in sorted(entries, key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        if not _missing(font.fname, missing):
            return [default, font.name]
    warnings.warn(
        f"no installed font has {''.join(sorted(missing))}, so figures show boxes there; install one, for example "
        "Noto Sans CJK (Debian: fonts-noto-cjk).",
        stacklevel=2,
    )
    return [default]


def save_figure(figure: Figure, stem: str | os.PathLike[str], formats: Iterable[str] = ("png", "pdf")) -> list[Path]:
    """Write `figure` to stem.png (300 dpi) and stem.pdf (vector), or the given formats; returns the paths."""
    paths = [Path(f"{os.fspath(stem)}.{format}") for format in formats]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # font_families has said so
        for path in paths:
            figure.savefig(path)
    return paths


def _missing(font_file: str, text: Iterable[str]) -> set[str]:
    charmap = font_manager.get_font(font_file).get_charmap()
    return {character for character in text if ord(character) not in charmap and not character.isspace()}
