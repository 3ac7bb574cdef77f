"""Blocks of instances as bitmaps, and the pairs of two blocks whose bitmaps are near each other.

Shape letters: N instances of a block, W words of 64 bits, R and C rows of one block and columns of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

WORD = 64


@dataclass(frozen=True)
class Block:
    """N instances, the shortest first, so that those which the length allows to be duplicates lie side by side.

    `position` says when each came, `size` is its number of tokens or features, `bits` its bitmap, and `text` its
    tokens, a character each ("" where the bitmap alone decides).
    """

    position: np.ndarray  # int64 [N]
    size: np.ndarray  # int64 [N]
    bits: np.ndarray  # uint64 [W, N]
    text: np.ndarray  # object [N]

    def __len__(self) -> int:
        return len(self.position)

    def take(self, rows: np.ndarray) -> Block:
        """The block of these rows, by number or mask."""
        return Block(*(getattr(self, f.name)[..., rows] for f in fields(self)))

    @staticmethod
    def join(blocks: Sequence[Block]) -> Block:
        """All instances of the blocks, sorted anew."""
        whole = Block(*(np.concatenate([getattr(b, f.name) for b in blocks], axis=-1) for f in fields(Block)))
        return whole.take(np.argsort(whole.size, kind="stable"))


def pack(bits_NB: np.ndarray) -> np.ndarray:
    """B bits an instance as words of 64: bool [N, B] → uint64 [B / 64, N]."""
    return np.ascontiguousarray(np.packbits(bits_NB, axis=1).view(np.uint64).T)


def fold(bits: np.ndarray, words: int) -> np.ndarray:
    """The bitmaps [W, N] folded by XOR onto `words` words; two folded ones differ in no more bits than before."""
    while len(bits) > words:
        bits = bits[: len(bits) // 2] ^ bits[len(bits) // 2 :]
    return bits


def near(a_WR: np.ndarray, b_WC: np.ndarray, limit: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs whose bitmaps differ in at most `limit` bits (a number, or one a column)."""
    different = np.bitwise_count(a_WR[0][:, None] ^ b_WC[0])
    if len(a_WR) > 2:
        different = different.astype(np.uint16)
    for a_R, b_C in zip(a_WR[1:], b_WC[1:], strict=True):
        different += np.bitwise_count(a_R[:, None] ^ b_C)
    return np.divmod(np.flatnonzero(different <= limit), b_WC.shape[1])


def by_row(row: np.ndarray, column: np.ndarray, position: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pairs as rows, each with its columns in the order of arrival."""
    if not len(row):
        return
    order = np.lexsort((position[column], row))
    row, column = row[order], column[order]
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    yield from zip(row[starts].tolist(), np.split(column, starts[1:]), strict=True)
