"""Tables as Markdown, LaTeX and CSV; numbers keep their interval, difference and p."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from moe_adapter.directory import replace_file

NOTHING = "–"
MATHS = {"α": r"$\alpha$", "λ": r"$\lambda$", "γ": r"$\gamma$", "×": r"$\times$"}  # which pdflatex knows by name alone


@dataclass(frozen=True, kw_only=True)
class Score:
    """A number, NaN where there was nothing to count, with what is known of it; `best`: to be set off in its row.

    `interval`: of 95 %. `difference`: from the table's reference, with its interval and the p of none.
    """

    value: float
    interval: tuple[float, float] | None = None
    difference: tuple[float, float, float, float] | None = None
    best: bool = False

    def __str__(self) -> str:
        if math.isnan(self.value):
            return NOTHING
        value = f"**{self.value:.2f}**" if self.best else f"{self.value:.2f}"
        if self.difference is None or math.isnan(self.difference[0]):
            return value
        return f"{value} ({self.difference[0]:+.2f}, p={self.difference[3]:.3f})"


@dataclass(frozen=True, kw_only=True)
class Table:
    """`name` is a file's or a label's; the first `labels` columns name a row, the others hold its scores or texts."""

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    labels: int = 1
    notes: tuple[str, ...] = ()


def write_tables(tables: Sequence[Table], folder: Path, heading: str, notes: Sequence[str]) -> list[Path]:
    """Write `tables.md`, `tables.tex` and `tables.csv` into the folder; returns their paths.

    `notes` are of all tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    comments = [heading, *notes, r"Needs \usepackage{booktabs}."]
    texts = {
        "tables.md": "\n".join([f"# {heading}\n", *(f"- {note}" for note in notes), "", *map(markdown, tables)]),
        "tables.tex": "\n".join([*(f"% {comment}" for comment in comments), "", *map(latex, tables)]),
        "tables.csv": as_csv(tables),
    }
    for name, text in texts.items():
        replace_file(folder / name, text.encode())
    return [folder / name for name in texts]


def markdown(table: Table) -> str:
    """A section: caption, table, notes."""
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"## {table.caption}\n\n{_tabulated(table, 'pipe')}\n" + (f"\n{notes}" if notes else "")


def latex(table: Table) -> str:
    """A table environment with booktabs' rules; it needs nothing but that package."""
    body = _maths(re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", _tabulated(table, "latex_booktabs")))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        body,
        *(rf"\par\footnotesize {_escaped(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def as_csv(tables: Iterable[Table]) -> str:
    """A row for each cell of each table, its numbers in full; `row` joins the row's labels with slashes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    scores = ["value", "low", "high", "difference", "difference_low", "difference_high", "p"]
    writer.writerow(["table", "row", "column", *scores])
    for table in tables:
        for row in table.rows:
            name = "/".join(map(str, row[: table.labels]))
            for column, cell in zip(table.head[table.labels :], row[table.labels :], strict=True):
                numbers = [cell]
                if isinstance(cell, Score):
                    numbers = [cell.value, *(cell.interval or ("", "")), *(cell.difference or ("",) * 4)]
                plain = ["" if isinstance(n, float) and math.isnan(n) else n for n in numbers]
                writer.writerow([table.name, name, column, *plain, *[""] * (len(scores) - len(plain))])
    return out.getvalue()


def _tabulated(table: Table, form: str) -> str:
    rows = [list(map(str, row)) for row in table.rows]
    align = ["left"] * table.labels + ["right"] * (len(table.head) - table.labels)
    return tabulate(rows, table.head, tablefmt=form, disable_numparse=True, colalign=align)


def _escaped(text: str) -> str:
    return _maths(re.sub(r"([&%$#_{}])", r"\\\1", text))


def _maths(text: str) -> str:
    return "".join(MATHS.get(character, character) for character in text)
