"""An append-only JSONL file of answers or decisions: what is written stays written, whatever kills the process."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_adapter.errors import MoEAdapterError


class JournalError(MoEAdapterError):
    """A journal that is in use, or that is not one."""


class Journal:
    """Records by key; of several with one key the last counts, and the others stay as history.

    Only where they lie is held in memory. A last line that a kill has cut short is cut off.

    Raises: JournalError if another process has the file open, or a whole line is no record.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        self._lock = threading.Lock()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise JournalError(f"{path}: another process is writing to it; wait for it, or end it") from None
        self._offsets: dict[str, int] = {}
        self._index()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def get(self, key: str) -> dict[str, Any] | None:
        """The last record of a key."""
        if key not in self._offsets:
            return None
        with self._lock:
            self._file.seek(self._offsets[key])
            return json.loads(self._file.readline())

    def records(self) -> Iterator[dict[str, Any]]:
        """The last record of every key, in the order in which the keys came up."""
        for key in list(self._offsets):
            record = self.get(key)
            assert record is not None
            yield record

    def append(self, key: str, record: dict[str, Any]) -> None:
        """Write a record; when this returns it is on the disk."""
        line = json.dumps({"key": key, **record}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._offsets[key] = offset

    def _index(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._offsets[json.loads(line)["key"]] = end
            except (ValueError, KeyError, TypeError):
                raise JournalError(f"{self.path}:{number}: got no record with a key; take the line out") from None
            end += len(line)
        self._file.truncate(end)
