"""Reports from JSONL or CSV, with the columns of the case file or the user's own names for them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.echovlm.cases import LANGUAGES
from examples.echovlm.corpus.importing.examination import Report
from moe_adapter.errors import MoEAdapterError

COLUMNS = ("case", "findings", "impression", "organ", "language", "patient", "hospital", "name")
REQUIRED = ("case", "findings")
csv.field_size_limit(2**24)  # a report may be longer than 128 KiB


def read_reports(path: Path, columns: Mapping[str, str] | None = None, *, encoding: str = "utf-8-sig") -> list[Report]:
    """The reports of a .jsonl or .csv file; `columns` maps a name of COLUMNS to the file's own.

    `case` names the examination, `name` holds names to strike out of the text. Other columns are not read.
    Raises MoEAdapterError, by line and column, and quotes no report.
    """
    columns = dict(columns or {})
    if unknown := set(columns) - set(COLUMNS):
        raise MoEAdapterError(f"--column: got {', '.join(sorted(unknown))}; expected some of {', '.join(COLUMNS)}")
    named = {column: columns.get(column, column) for column in COLUMNS}
    rows = _rows(path, encoding)
    return [_report(row, named, f"{path}:{number}", explicit=set(columns)) for number, row in rows]


def _rows(path: Path, encoding: str) -> Iterable[tuple[int, dict[str, Any]]]:
    readers = {".csv": _csv, ".jsonl": _jsonl}
    if path.suffix.lower() not in readers:
        raise MoEAdapterError(f"--reports {path}: expected a name that ends in {' or '.join(readers)}")
    try:
        with path.open(encoding=encoding, newline="") as file:
            return list(readers[path.suffix.lower()](file, path))
    except OSError as error:
        raise MoEAdapterError(f"--reports {path}: {error.strerror}; check the path") from None
    except (UnicodeError, LookupError):
        raise MoEAdapterError(
            f"{path}: not text in {encoding}; name its own with --encoding, such as gb18030"
        ) from None
    except csv.Error as error:
        raise MoEAdapterError(f"{path}: not CSV ({error}); export it again") from None


def _csv(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, row


def _jsonl(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MoEAdapterError(f"{path}:{number}: not JSON at column {error.colno}; correct it") from None
        if not isinstance(row, dict):
            raise MoEAdapterError(f"{path}:{number}: expected an object; correct it")
        yield number, row


def _report(row: Mapping[str, Any], named: Mapping[str, str], where: str, *, explicit: set[str]) -> Report:
    for column in {*REQUIRED, *explicit}:
        if named[column] not in row:
            raise MoEAdapterError(
                f"{where}: got no column {named[column]!r}; expected it for {column}; name yours with "
                f"--column {column}=…"
            )
    value = {column: str(row.get(own) or "").strip() for column, own in named.items()}
    if not value["case"]:
        raise MoEAdapterError(f"{where}: column {named['case']!r} is empty; expected the examination's name")
    if value["language"] not in ("", *LANGUAGES):
        raise MoEAdapterError(f"{where}: column {named['language']!r}: expected {' or '.join(LANGUAGES)}, or nothing")
    name, case = value.pop("name"), value.pop("case")
    return Report(keys=(case,), words={"name": (name,)} if name else {}, **value)
