"""How commands answer: tables for a reader or as JSON, and what was written."""

from __future__ import annotations

import argparse
import json
import math
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

ABSENT = "–"


def as_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns beside one another: numbers to the right, and "x", "x_low", "x_high" as one, 0.25 [0.24, 0.26].

    Widths are those of a terminal, in which a CJK character takes two cells.
    """
    cells = {}
    for name, values in columns.items():
        if name.endswith(("_low", "_high")) and name.rpartition("_")[0] in columns:
            continue
        texts = [_number(value) for value in values]
        if f"{name}_low" in columns:
            ends = zip(columns[f"{name}_low"], columns[f"{name}_high"], strict=True)
            bounds = ["" if low is None else f" [{_number(low)}, {_number(high)}]" for low, high in ends]
            texts = [text + bound for text, bound in zip(texts, bounds, strict=True)]
        right = all(value is None or isinstance(value, int | float) for value in values)
        width = max(map(_cells, [name, *texts]))
        cells[name] = [_padded(text, width, right) for text in [name, *texts]]
    return "\n".join("  ".join(row).rstrip() for row in zip(*cells.values(), strict=True))


def print_tables(tables: Mapping[str, pa.Table], options: argparse.Namespace, **more: Any) -> None:
    """Tables by name; under --json an object {"tables": {name: [row, …]}, …} with `more` beside them."""
    if options.json:
        print(as_json(more | {"tables": {name: table.to_pylist() for name, table in tables.items()}}))
        return
    print("\n\n".join(f"{name}\n{as_text(table.to_pydict())}" for name, table in tables.items()))


def as_json(value: Any) -> str:
    """JSON for any reader: NaN, which JSON has none of, as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def print_written(paths: Sequence[Path], options: argparse.Namespace, **more: Any) -> None:
    """The files that a command wrote, one a line; under --json with `more` beside them."""
    if options.json:
        print(as_json({"written": list(map(str, paths)), **more}))
    else:
        print(*paths, sep="\n")


def note(text: str) -> None:
    """A line beside the answer."""
    print(f"moe-adapter: {text}", file=sys.stderr)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _printable(str(value))


def _printable(text: str) -> str:
    """A text of the data, such as a token, in one line and without control characters."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _cells(text: str) -> int:
    """Terminal cells that a text takes."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(unicodedata.combining(each) > 0 for each in text)


def _padded(text: str, width: int, right: bool) -> str:
    padding = " " * (width - _cells(text))
    return padding + text if right else text + padding
