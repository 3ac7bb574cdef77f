"""SimHash fingerprints of 64 bits, duplicates within a Hamming distance, exactly (Charikar, STOC 2002).

Every pair's bits are counted: no bands to tune, and the count is as fast as memory. Which features are hashed
decides what is a duplicate, so they have a name: "word-2" is pairs of tokens, "char-4" runs of four characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import chain

import numpy as np

from examples.echovlm.corpus.deduplication import tokens
from examples.echovlm.corpus.deduplication.blocks import WORD, Block, by_row, near, pack
from examples.echovlm.corpus.deduplication.errors import DeduplicationError

ROWS = 64  # compared at a time, so that their tables stay in the processor's cache


@dataclass(frozen=True)
class Within:
    """The rule: duplicates are pairs whose fingerprints differ in at most `distance` bits."""

    distance: int

    def candidates(self, queries: Block, others: Block) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of `queries`, each with the rows of earlier `others` that are duplicates of it, in order."""
        for start in range(0, len(queries), ROWS):
            row, column = near(queries.bits[:, start : start + ROWS], others.bits, self.distance)
            row += start
            stays = others.position[column] < queries.position[row]
            yield from by_row(row[stays], column[stays], others.position)

    def score(self, queries: Block, row: int, others: Block, column: int) -> int | None:
        """The pair's Hamming distance, or None if it is too large."""
        different = int(np.bitwise_count(queries.bits[0, row] ^ others.bits[0, column]))
        return different if different <= self.distance else None


@dataclass(frozen=True)
class SimHash:
    """Compares instances by the Hamming distance of their SimHash fingerprints.

    `features`: "word-N" or "char-N", N in a row. `tokenizer`: "character" or "jieba", which makes the words.
    Raises: DeduplicationError on any other, or a distance that 64 bits cannot have.
    """

    distance: int = 3
    features: str = "word-2"
    tokenizer: str = "character"
    vocabulary: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # stays empty

    def __post_init__(self) -> None:
        if not 0 <= self.distance < WORD:
            raise DeduplicationError(f"distance: got {self.distance}; expected a number of bits from 0 to {WORD - 1}")
        if not re.fullmatch(r"(word|char)-[1-9]", self.features):
            raise DeduplicationError(f"features: got {self.features!r}; expected word-N or char-N, as char-4")
        tokens.tokenizer(self.tokenizer)

    @property
    def rule(self) -> Within:
        """What decides on a pair."""
        return Within(self.distance)

    def describe(self) -> dict[str, object]:
        """For the manifest."""
        words = tokens.describe(self.tokenizer) if self.features.startswith("word") else {}
        settings = {"method": "simhash", "score": "Hamming distance of 64 bits", "up to": self.distance}
        return {**settings, "features": self.features, "hash": "BLAKE2b", **words}

    def reason(self, score: float) -> str:
        """What an instance of this score is dropped for."""
        return "identical fingerprint" if score == 0 else f"Hamming distance up to {self.distance}"

    def parts(self, text: str) -> list[str]:
        """The text's features; a shorter text than N is one."""
        kind, n = self.features[:4], int(self.features[5:])
        if kind == "word":
            words = tokens.TOKENIZERS[self.tokenizer](text)
            return [" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))] if words else []
        plain = " ".join(tokens.normalized(text).split())
        return [plain[i : i + n] for i in range(max(len(plain) - n + 1, 1))] if plain else []

    def encode(self, position: Sequence[int], parts: Sequence[list[str]]) -> Block:
        """The instances' fingerprints as a block: a bit is set where most of the features' hashes have it set."""
        size = np.array([len(instance) for instance in parts])
        hashes = np.frombuffer(b"".join(map(_hash, chain.from_iterable(parts))), dtype=np.uint8).reshape(-1, 8)
        starts = np.cumsum(size) - size
        votes = np.add.reduceat(np.unpackbits(hashes, axis=1), starts, axis=0, dtype=np.int32)
        text = np.full(len(parts), "", dtype=object)
        return Block(np.asarray(position), size, pack(2 * votes > size[:, None]), text)


@lru_cache(maxsize=1 << 18)  # reports repeat their phrases
def _hash(feature: str) -> bytes:
    return blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=8).digest()
