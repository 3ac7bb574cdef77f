"""The audit trail of one instance, put together again from the folders of the steps that it went through."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.client import INVALID
from examples.echovlm.corpus.generation import ANSWERS
from examples.echovlm.corpus.instances import INSTANCES, InstanceError
from examples.echovlm.corpus.judging import VERDICTS
from examples.echovlm.corpus.manifest import DROPPED
from examples.echovlm.corpus.review import DECIDED

TEXT_LOST = "not kept: the answer is older than the keeping of texts"
NOT_NAMED = "not kept with this drop, which is older than that: the step's command, run again, finds it in its journal"
NOT_HERE = "in none of these folders: name that of the step, too"


def trail(folders: Sequence[Path], id: str) -> dict[str, Any]:
    """The instance's fields, `dropped` where a step has dropped it, and under `asked` the journals' records of its
    requests to "generate" and "judge" (empty if in no folder, None if the drop does not say which); a later folder's
    word counts over an earlier one's.

    A journal that is being written to is read all the same. Raises: InstanceError where no folder holds the id.
    """
    known: dict[str, Any] = {}
    invalid_in = None
    for folder in folders:
        known |= _said(_find(folder / INSTANCES, "id", id))
        if drop := _find(folder / DROPPED, "id", id):
            reason = drop.pop("reason")
            invalid_in = folder if reason == INVALID else None
            known |= _said(drop) | {"dropped": f"{reason} ({folder})"}
        if decision := _find(folder / DECIDED, "key", id):  # of a review that is not closed yet
            known.setdefault("review", {name: value for name, value in decision.items() if name != "key"})
    if not known:
        raise InstanceError(f"instance {id!r}: in none of {', '.join(map(str, folders))}; expected the steps' folders")
    keys = {"generate": (ANSWERS, known.get("prompt")), "judge": (VERDICTS, known.get("judge", {}).get("prompt"))}
    asked = {}
    for step, (file, key) in keys.items():
        if key:
            records = [record for folder in folders if (record := _find(folder / file, "key", key))]
            asked[step] = records[-1] if records else {}
        elif invalid_in and (invalid_in / file).is_file():
            asked[step] = None
    return known | {"asked": asked}


def told(known: dict[str, Any]) -> str:
    """A trail to be read: a line for each field, then what was sent and what came back."""
    lines = [f"{name}: {_plain(value)}" for name, value in known.items() if name != "asked"]
    for step, record in known["asked"].items():
        messages = (record or {}).get("messages", [])
        missing = TEXT_LOST if record else NOT_NAMED if record is None else NOT_HERE
        lines += ["", f"--- {step}: what was sent{'' if messages else f' is {missing}'}"]
        for message in messages:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text", _plain(part)) for part in content]
            lines += [f"[{message['role']}]", *parts]
        lines += [f"--- {step}: what {record['model']} answered", record["text"]] if record else []
    return "\n".join(lines)


def _find(path: Path, name: str, value: str) -> dict[str, Any] | None:
    """The last row of a JSONL file with this value; a line that is being written is none."""
    if not path.is_file():
        return None
    found, sought = None, json.dumps(value, ensure_ascii=False).encode()
    with path.open("rb") as file:
        for line in file:
            if sought in line and line.endswith(b"\n") and (row := json.loads(line)).get(name) == value:
                found = row
    return found


def _said(row: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (row or {}).items() if value not in ("", {})}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
