"""One pass over instances in their order: each is a duplicate of the earliest one that the rule names, or is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, Protocol

import numpy as np

from examples.echovlm.corpus.deduplication.blocks import Block
from examples.echovlm.corpus.deduplication.errors import DeduplicationError
from examples.echovlm.corpus.deduplication.instances import Instance

CHUNK = 4096  # instances read, compared and put into a block at a time
AGAINST = {"prior": "any prior instance", "kept": "any kept instance"}


class Rule(Protocol):
    """Decides on pairs. `candidates` may name too many, `score` may not."""

    def candidates(self, queries: Block, others: Block) -> Iterator[tuple[int, np.ndarray]]: ...
    def score(self, queries: Block, row: int, others: Block, column: int) -> float | None: ...


class Measure(Protocol):
    """What instances are compared by."""

    vocabulary: dict[str, int]

    @property
    def rule(self) -> Rule: ...
    def describe(self) -> dict[str, object]: ...
    def reason(self, score: float) -> str: ...
    def parts(self, text: str) -> list[str]: ...
    def encode(self, position: Sequence[int], parts: Sequence[list[str]]) -> Block: ...


class Match(NamedTuple):
    """When the earlier instance came, and the pair's score."""

    position: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Why an instance is dropped: the earliest instance that it duplicates, and the pair's score."""

    id: str
    duplicate_of: str
    score: float
    reason: str


def first_matches(rule: Rule, queries: Block, blocks: Iterable[Block]) -> dict[int, Match]:
    """The earliest duplicate of each query in the blocks, which are in the order of arrival, by its position."""
    found: dict[int, Match] = {}
    for others in blocks:
        if not len(queries):
            break
        for row, columns in rule.candidates(queries, others):
            for column in columns.tolist():
                score = rule.score(queries, row, others, column)
                if score is not None:
                    found[int(queries.position[row])] = Match(int(others.position[column]), score)
                    break
        queries = queries.take(~np.isin(queries.position, list(found)))
    return found


class Index:
    """The instances that later ones are compared with, in blocks."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        """Add later instances; a short last block is filled up first, for each has a cost of its own."""
        if self.blocks and len(self.blocks[-1]) + len(block) <= CHUNK:
            block = Block.join([self.blocks.pop(), block])
        self.blocks.append(block)

    def search(self, rule: Rule, queries: Block) -> dict[int, Match]:
        """The earliest duplicate of each query."""
        return first_matches(rule, queries, self.blocks)


class Deduplicator:
    """Judges instances in the order in which they come, over any number of batches.

    `against`: "prior" compares an instance with every one before it, dropped or not (the paper's word), "kept" with
    those that were kept. Memory grows with the instances: no pair outlives its block.
    Raises: DeduplicationError on another `against`.
    """

    def __init__(
        self, measure: Measure, *, against: Literal["prior", "kept"] = "prior", index: Index | None = None
    ) -> None:
        if against not in AGAINST:
            raise DeduplicationError(f"against: got {against!r}; expected one of {', '.join(AGAINST)}")
        self.measure = measure
        self.against = against
        self.index = index or Index()
        self.ids: list[str] = []
        self.without_tokens = 0
        self._known: set[str] = set()

    def verdicts(self, instances: Iterable[Instance]) -> Iterator[tuple[Instance, Drop | None]]:
        """Each instance with the reason to drop it, or None; one without tokens is kept and compared with none.

        Raises: DeduplicationError on an id that came before.
        """
        stream = iter(instances)
        while chunk := list(islice(stream, CHUNK)):
            yield from zip(chunk, self._judged(chunk), strict=True)

    def describe(self) -> dict[str, object]:
        """All settings that decide on a verdict."""
        return {**self.measure.describe(), "compared": "question and answer", "against": AGAINST[self.against]}

    def register(self, ids: Iterable[str]) -> None:
        """Take note of the ids that come next."""
        self.ids.extend(ids)
        self._known.update(self.ids[len(self._known) :])

    def _judged(self, chunk: list[Instance]) -> list[Drop | None]:
        first = len(self.ids)
        self._check_ids(chunk)
        self.register(instance.id for instance in chunk)
        parts = {first + n: self.measure.parts(instance.text) for n, instance in enumerate(chunk)}
        parts = {position: found for position, found in parts.items() if found}
        self.without_tokens += len(chunk) - len(parts)
        if not parts:
            return [None] * len(chunk)
        block = self.measure.encode(list(parts), list(parts.values()))
        matches = self._matches(block)
        if self.against == "kept":
            block = block.take(~np.isin(block.position, list(matches)))
        if len(block):
            self.index.add(block)
        return [self._drop(instance.id, matches.get(first + n)) for n, instance in enumerate(chunk)]

    def _check_ids(self, chunk: list[Instance]) -> None:
        fresh: set[str] = set()
        for instance in chunk:
            if instance.id in self._known or instance.id in fresh:
                raise DeduplicationError(
                    f"{instance.where or 'instances'}: field 'id': got {instance.id!r}, which came before; "
                    "expected ids that occur once in all batches; rename one of them"
                )
            fresh.add(instance.id)

    def _matches(self, block: Block) -> dict[int, Match]:
        """The earliest duplicate of each instance of a block: in the index, or else in the block itself."""
        rule = self.measure.rule
        found = self.index.search(rule, block)
        rest = block.take(~np.isin(block.position, list(found)))
        others = rest if self.against == "kept" else block
        candidates = {int(rest.position[row]): (row, columns) for row, columns in rule.candidates(rest, others)}
        for position in sorted(candidates):
            row, columns = candidates[position]
            for column in columns.tolist():
                earlier = int(others.position[column])
                if self.against == "kept" and earlier in found:
                    continue
                score = rule.score(rest, row, others, column)
                if score is not None:
                    found[position] = Match(earlier, score)
                    break
        return found

    def _drop(self, name: str, match: Match | None) -> Drop | None:
        if match is None:
            return None
        reason = self.measure.reason(match.score)
        return Drop(id=name, duplicate_of=self.ids[match.position], score=match.score, reason=reason)
