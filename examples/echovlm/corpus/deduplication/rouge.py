"""ROUGE-L F1 above a threshold, exactly and in whole numbers (Lin, "ROUGE", 2004).

F1 of sequences of m and n tokens is 2·LCS/(m + n), so above p/q means 2q·LCS > p·(m + n); floats put some pairs at
exactly 0.7 above it. Filters that lose nothing go before the LCS: the tokens that the pair does not share, counted
with their repetitions, number at least m + n − 2·LCS below (1 − p/q)·(m + n), and no fewer than the bits in which
their parity bitmaps differ. (Bitmap filter: Sandes et al., Information Systems 88, 2020.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from rapidfuzz.distance import LCSseq

from examples.echovlm.corpus.deduplication import tokens
from examples.echovlm.corpus.deduplication.blocks import WORD, Block, by_row, fold, near, pack
from examples.echovlm.corpus.deduplication.errors import DeduplicationError

WORDS = 8  # 64 bits each, of an instance's bitmap
ROWS = 32  # compared at a time, so that their tables stay in the processor's cache
LARGEST_VOCABULARY = 0x110000  # a token is a Unicode character to rapidfuzz


@dataclass(frozen=True)
class Above:
    """The rule: duplicates are pairs whose ROUGE-L F1 is above p/q."""

    p: int
    q: int

    def candidates(self, queries: Block, others: Block) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of `queries`, each with the rows of earlier `others` that may be duplicates of it, in order."""
        p, q = self.p, self.q
        for start in range(0, len(queries), ROWS):
            rows = slice(start, min(start + ROWS, len(queries)))
            least, most = int(queries.size[start]), int(queries.size[rows.stop - 1])
            # LCS <= min(m, n), so that m and n differ by a factor of (2q - p) / p at most
            first = int(np.searchsorted(others.size, -(-p * least // (2 * q - p)), side="left"))
            end = int(np.searchsorted(others.size, most * (2 * q - p) // p, side="right"))
            if first >= end:
                continue
            words = 2 if most <= 60 else 4 if most <= 120 else WORDS  # fewer for fewer tokens, which fill fewer bits
            limit = np.minimum(((q - p) * (most + others.size[first:end]) - 1) // q, WORD * words)
            row, column = near(
                fold(queries.bits[:, rows], words),
                fold(others.bits[:, first:end], words),
                limit.astype(np.uint8 if words <= 2 else np.uint16),
            )
            yield from self._sifted(queries, others, row + start, column + first)

    def _sifted(
        self, queries: Block, others: Block, row: np.ndarray, column: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What the whole bitmap and the order of arrival leave of the pairs, by row."""
        p, q = self.p, self.q
        different = np.bitwise_count(queries.bits[:, row] ^ others.bits[:, column]).sum(axis=0, dtype=np.int64)
        total = queries.size[row] + others.size[column]
        stays = (q * different < (q - p) * total) & (others.position[column] < queries.position[row])
        yield from by_row(row[stays], column[stays], others.position)

    def score(self, queries: Block, row: int, others: Block, column: int) -> float | None:
        """The pair's F1, or None if it is not above the threshold."""
        a, b = queries.text[row], others.text[column]
        total = len(a) + len(b)
        least = self.p * total // (2 * self.q) + 1
        lcs = LCSseq.similarity(a, b, score_cutoff=least)
        return 2 * lcs / total if lcs >= least else None


@dataclass(frozen=True)
class RougeL:
    """Compares instances by ROUGE-L F1 of their tokens.

    `threshold`: between 0 and 1, a pair at it is no duplicate. `tokenizer`: "character" or "jieba", of Chinese.
    Raises: DeduplicationError on any other.
    """

    threshold: float = 0.7
    tokenizer: str = "character"
    vocabulary: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise DeduplicationError(f"threshold: got {self.threshold}; expected an F1 between 0 and 1, as 0.7")
        tokens.tokenizer(self.tokenizer)

    @property
    def rule(self) -> Above:
        """What decides on a pair."""
        return Above(*Fraction(str(self.threshold)).as_integer_ratio())

    def describe(self) -> dict[str, object]:
        """For the manifest."""
        return {"method": "rouge-l", "score": "ROUGE-L F1", "above": self.threshold, **tokens.describe(self.tokenizer)}

    def reason(self, score: float) -> str:
        """What an instance of this score is dropped for."""
        return "identical tokens" if score == 1 else f"ROUGE-L above {self.threshold}"

    def parts(self, text: str) -> list[str]:
        """The text's tokens."""
        return tokens.TOKENIZERS[self.tokenizer](text)

    def encode(self, position: Sequence[int], parts: Sequence[list[str]]) -> Block:
        """The instances' tokens as a block. Raises: DeduplicationError beyond 1,114,112 different tokens."""
        known = self.vocabulary
        codes = [[known.setdefault(token, len(known)) for token in instance] for instance in parts]
        if len(known) > LARGEST_VOCABULARY:
            raise DeduplicationError(
                f"got {len(known)} different tokens; expected at most {LARGEST_VOCABULARY}; deduplicate in parts"
            )
        text = np.empty(len(codes), dtype=object)
        text[:] = ["".join(map(chr, code)) for code in codes]
        size = np.array([len(code) for code in codes])
        return Block.join([Block(np.asarray(position), size, _parity_bitmaps(codes, size), text)])


def _parity_bitmaps(codes: Sequence[list[int]], size: np.ndarray) -> np.ndarray:
    """Each (token, how often it came before) flips one bit of its instance's bitmap: uint64 [WORDS, N]."""
    flat = np.fromiter((code for text in codes for code in text), dtype=np.uint64, count=int(size.sum()))
    row = np.repeat(np.arange(len(codes)), size)
    order = np.lexsort((flat, row))
    flat, row = flat[order], row[order]
    new = np.flatnonzero((np.diff(flat.astype(np.int64), prepend=-1) != 0) | (np.diff(row, prepend=-1) != 0))
    before = np.arange(len(flat)) - np.repeat(new, np.diff(new, append=len(flat)))
    bit = _mixed(flat + (before.astype(np.uint64) << np.uint64(32))) % np.uint64(WORDS * WORD)
    flips = np.bincount(row * (WORDS * WORD) + bit.astype(np.int64), minlength=len(codes) * WORDS * WORD)
    return pack((flips.reshape(len(codes), WORDS * WORD) & 1).astype(bool))


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finisher: neighbouring numbers land far apart (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
