"""What a step of the pipeline was given, kept and dropped, and why; the numbers of the paper's Figure 3."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_adapter.directory import replace_file

MANIFEST, DROPPED = "manifest.json", "dropped.jsonl"


@dataclass(kw_only=True)
class Manifest:
    """The account of one step: `given` items came in; of those, `keep` and `drop` are told of each.

    `settings`: what decided, of JSON's types. `more`: what else the step has found.
    """

    step: str
    given: int
    settings: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    kept: int = 0
    drops: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, count: int = 1) -> None:
        self.kept += count

    def drop(self, id: str, reason: str, **why: Any) -> None:
        """An item that is left out, for one reason; `why` may say more, and nothing of a patient."""
        self.drops.append({"id": id, "reason": reason, **why})

    @property
    def dropped(self) -> dict[str, int]:
        """How many were dropped for each reason, the most frequent first."""
        return dict(Counter(drop["reason"] for drop in self.drops).most_common())

    def write(self, folder: Path) -> Path:
        """Write `manifest.json` and `dropped.jsonl` into `folder`; the path of the first."""
        assert self.given == self.kept + len(self.drops), f"{self.given} given, {self.kept} kept, {len(self.drops)} not"
        lines = "".join(json.dumps(drop, ensure_ascii=False) + "\n" for drop in self.drops)
        replace_file(folder / DROPPED, lines.encode())
        told = dict(step=self.step, settings=self.settings, given=self.given, kept=self.kept, dropped=self.dropped)
        replace_file(folder / MANIFEST, json.dumps(told | self.more, ensure_ascii=False, indent=1).encode())
        return folder / MANIFEST
