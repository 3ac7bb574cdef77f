"""The instance file: one question with its answer a line, as JSON (JSONL); further fields pass through untouched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.echovlm.cases import LANGUAGES
from examples.echovlm.corpus.deduplication.errors import DeduplicationError

FIELDS = ("id", "question", "answer", "language")


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One question with its answer; `line` is the file's line with all its fields, `where` is file:line."""

    id: str
    question: str
    answer: str
    language: str
    line: str = ""
    where: str = ""

    @property
    def text(self) -> str:
        """What is compared: the question and the answer, for questions alone repeat from case to case."""
        return f"{self.question}\n{self.answer}"


def read_instances(path: str | os.PathLike[str]) -> Iterator[Instance]:
    """The file's instances one by one; blank lines are passed over.

    Raises: DeduplicationError, with file, line and field, on a line that is not an instance.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _instance(line, number == 1, f"{path}:{number}")
    except OSError as error:
        raise DeduplicationError(f"{path}: {error.strerror}; expected a JSONL file of instances; check it") from error


def _instance(line: bytes, first: bool, where: str) -> Instance:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise DeduplicationError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DeduplicationError(f"{where}: not JSON: {fault}; expected one JSON object a line; correct it") from error
    if not isinstance(row, dict):
        raise DeduplicationError(f"{where}: got {_shown(row)}; expected an object with {', '.join(FIELDS)}; correct it")
    for name in FIELDS:
        if not isinstance(row.get(name), str):
            got = _shown(row[name]) if name in row else "nothing"
            raise DeduplicationError(f"{where}: field '{name}': got {got}; expected a string; correct the line")
    if row["language"] not in LANGUAGES:
        got, known = row["language"], ", ".join(LANGUAGES)
        raise DeduplicationError(f"{where}: field 'language': got {got!r}; expected one of {known}; correct it")
    return Instance(**{name: row[name] for name in FIELDS}, line=text, where=where)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
