"""Expert review: some batches are drawn, experts decide on their instances, and what they fail is generated again.

Figure 3: 5 % of the batches of ten are read by experts; the sources of a batch that fails are looked at once more and
generated anew. What makes a batch fail is our reading: more rejected instances than are allowed, by default none.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.corpus.instances import INSTANCES, Instance, InstanceError, read_instances, write_instances
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.journal import Journal
from moe_adapter.directory import replace_file
from moe_adapter.errors import MoEAdapterError

ACCEPT, CORRECT, REJECT = DECISIONS = ("accept", "correct", "reject")
DECIDED, DRAWN, AGAIN = "decisions.jsonl", "drawn.json", "again.jsonl"
BATCH_FAILED, REJECTED = "its batch failed the review", "rejected"


class ReviewError(MoEAdapterError):
    """A review that does not fit its instances, is not finished, or a decision that cannot be taken."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which batches are read: `share` of those of `size` instances in a row, at least one, drawn by `seed`."""

    share: float = 0.05
    size: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.size < 1:
            raise ReviewError(f"got share {self.share} and size {self.size}, expected a share in (0, 1] and a size ≥ 1")

    def batches(self, instances: int) -> list[int]:
        """The numbers of the drawn batches, from 0, in order."""
        count = math.ceil(instances / self.size)
        drawn = math.ceil(round(self.share * count, 9))  # 0.05 · 20 is 1, whatever the last bit says
        return sorted(np.random.default_rng(self.seed).permutation(count)[:drawn].tolist())


class Review:
    """A review in a folder: the drawn batches, and the experts' decisions, each on the disk as soon as it is made."""

    def __init__(self, instance_files: Sequence[Path], cases_file: Path, out: Path, draw: Draw | None = None) -> None:
        """Begin a review, or go on with the one in `out`. Raises ReviewError if that is one of other instances."""
        self.draw, self.out, self.folder = draw or Draw(), out, cases_file.parent
        self.instances = read_instances(*instance_files)
        self.cases: dict[str, Case] = {case.id: case for case in read_cases(cases_file)}
        if not self.instances:
            raise ReviewError(f"{', '.join(map(str, instance_files))}: got no instances, expected some to review")
        for instance in self.instances:
            if instance.case not in self.cases:
                raise InstanceError(f"instance {instance.id!r}: its case {instance.case!r} is not in {cases_file}")
        self._begin(b"".join(Path(file).read_bytes() for file in instance_files))
        self.journal = Journal(out / DECIDED)

    def __enter__(self) -> Review:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.__exit__()

    @cached_property
    def drawn(self) -> list[Instance]:
        """The instances that an expert is to read, batch by batch."""
        size = self.draw.size
        batches = self.draw.batches(len(self.instances))
        return [item for n in batches for item in self.instances[n * size : (n + 1) * size]]

    @cached_property
    def batch_of(self) -> dict[str, int]:
        return {item.id: place // self.draw.size for place, item in enumerate(self.instances)}

    def decide(
        self, id: str, decision: str, reviewer: str, *, question: str = "", answer: str = "", note: str = ""
    ) -> None:
        """Write a decision down; a later one on the same instance counts in its place.

        Raises: ReviewError for an instance that was not drawn, an unknown decision, a correction without text, or a
        reviewer without a name.
        """
        item = next((item for item in self.drawn if item.id == id), None)
        if item is None or decision not in DECISIONS or not reviewer.strip():
            raise ReviewError(
                f"got {decision!r} on {id!r} by {reviewer!r}; expected one of {', '.join(DECISIONS)} on a drawn "
                "instance, by someone with a name"
            )
        record = {"decision": decision, "reviewer": reviewer, "note": note.strip(), "time": _now()}
        if decision == CORRECT:
            question, answer = question.strip(), answer.strip()
            if not (question and answer) or (question, answer) == (item.question, item.answer):
                raise ReviewError("a correction needs a question and an answer, and one of them changed")
            record |= {"question": question, "answer": answer}
        self.journal.append(id, record)

    def close(self, *, allowed: int = 0) -> Manifest:
        """Settle the review: write instances.jsonl, again.jsonl for `generate --again`, and the manifest.

        A batch with more than `allowed` rejected instances fails, and all instances of its sources are left out.
        Raises: ReviewError while drawn instances are undecided.
        """
        decided = {item.id: self.journal.get(item.id) for item in self.drawn}
        if undecided := sum(record is None for record in decided.values()):
            raise ReviewError(f"{undecided} of {len(decided)} drawn instances are undecided; review them, then close")
        rejected = [item for item in self.drawn if decided[item.id]["decision"] == REJECT]
        rejects = Counter(self.batch_of[item.id] for item in rejected)
        failed = {batch for batch, count in rejects.items() if count > allowed}
        sources = {item.source: None for item in self.instances if self.batch_of[item.id] in failed}
        manifest = Manifest(step="review", given=len(self.instances), settings=self._settings | {"allowed": allowed})
        manifest.more = {
            "batches": math.ceil(len(self.instances) / self.draw.size),
            "drawn": len(self.draw.batches(len(self.instances))),
            "failed": sorted(failed),
            "decisions": dict(Counter(record["decision"] for record in decided.values())),
            "rejected": {name: dict(Counter(getattr(item, name) for item in rejected)) for name in ASPECTS},
        }
        kept = [seen for item in self.instances if (seen := self._seen(item, decided.get(item.id), sources, manifest))]
        write_instances(self.out / INSTANCES, kept)
        replace_file(self.out / AGAIN, "".join(map(_line, self._regenerate(sources, rejected))).encode())
        manifest.write(self.out)
        return manifest

    def _begin(self, content: bytes) -> None:
        self._settings = vars(self.draw) | {"instances": hashlib.sha256(content).hexdigest()}
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / DRAWN
        if path.is_file() and (before := json.loads(path.read_text())) != self._settings:
            different = ", ".join(name for name in before if before[name] != self._settings.get(name))
            raise ReviewError(
                f"{self.out}: holds a review begun otherwise ({different}); take another folder for --out"
            )
        replace_file(path, json.dumps(self._settings).encode())

    def _seen(
        self, item: Instance, record: dict[str, Any] | None, failed: dict[Any, None], manifest: Manifest
    ) -> Instance | None:
        """The instance with what the review says of it; None, and a drop in the manifest, if it is left out."""
        review = {"batch": self.batch_of[item.id], "drawn": record is not None}
        review |= {name: record[name] for name in ("decision", "reviewer", "note", "time")} if record else {}
        reason = BATCH_FAILED if item.source in failed else ""
        if record and record["decision"] == REJECT:
            reason = REJECTED
        if reason:
            origin = {name: getattr(item, name) for name in ("model", "template", "prompt", "seed", "judge")}
            manifest.drop(item.id, reason, **origin, review=review)
            return None
        manifest.keep()
        if record and record["decision"] == CORRECT:
            review |= {"before": {"question": item.question, "answer": item.answer}}
            item = replace(item, question=record["question"], answer=record["answer"])
        return replace(item, review=review)

    def _regenerate(self, sources: dict[Any, None], rejected: Sequence[Instance]) -> list[dict[str, Any]]:
        """The failed batches' sources, with what the experts noted on their rejected instances."""
        rows = []
        for case, template, kind, round in sources:
            wrong = [item for item in rejected if item.source == (case, template, kind, round)]
            noted = [str((self.journal.get(item.id) or {}).get("note", "")) for item in wrong]
            row = dict(case=case, template=template, kind=kind, round=round)
            rows.append(row | {"notes": [note for note in noted if note], "rejected": [item.id for item in wrong]})
        return rows


ASPECTS = ("organ", "language", "component", "dimension", "kind", "template", "model")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
