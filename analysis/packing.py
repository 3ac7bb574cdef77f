"""Rows that hold several sequences one behind the other, without an attention mask ("packed", "padding-free").

transformers keeps such sequences apart by position ids that don't go on by one (`create_causal_mask`); its collator and
TRL's may say where they start in `seq_idx` or `cu_seq_lens_q` too. Shape letters: B rows, S columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Per token of a batch, (B, S) each; what is not real is padding at a row's end."""

    real_BS: np.ndarray
    sequence_BS: np.ndarray  # numbered from 0 through the batch, row by row
    position_BS: np.ndarray


def packed_rows(inputs: Mapping[str, Any], ids_BS: np.ndarray, pad_id: int | None) -> PackedRows | None:
    """The sequences of a forward's rows; None where each row is one sequence.

    As in transformers, a forward with an attention mask or a cache is not packed, whatever its position ids are.
    """
    if any(inputs.get(name) is not None for name in ("attention_mask", "cache", "past_key_values")):
        return None
    starts_BS = _starts(inputs, ids_BS.shape)
    if not starts_BS[:, 1:].any():
        return None
    real_BS = ~_padding(starts_BS, ids_BS, pad_id)
    column_S = np.arange(ids_BS.shape[1])
    first_BS = np.maximum.accumulate(np.where(starts_BS, column_S, 0), axis=1)
    number_BS = (starts_BS & real_BS).cumsum().reshape(starts_BS.shape) - 1
    return PackedRows(real_BS=real_BS, sequence_BS=number_BS, position_BS=column_S - first_BS)


def _starts(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """(B, S): True where a sequence starts; of a row without news of that, at its first column."""
    starts_BS = np.zeros(shape, bool)
    if _fits(index := inputs.get("seq_idx"), shape):
        starts_BS[:, 1:] = np.diff(to_numpy(index)) != 0
    elif isinstance(ends := inputs.get("cu_seq_lens_q"), torch.Tensor):  # over the flattened batch
        first = to_numpy(ends)
        starts_BS.reshape(-1)[first[first < starts_BS.size]] = True
    elif _fits(positions := _text_positions(inputs.get("position_ids")), shape):
        starts_BS[:, 1:] = np.diff(to_numpy(positions)) != 1
    starts_BS[:, :1] = True
    return starts_BS


def _fits(given: Any, shape: tuple[int, ...]) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor (B, S), or (1, S) for all rows."""
    return isinstance(given, torch.Tensor) and tuple(given.shape) in (shape, (1, shape[1]))


def _text_positions(positions: Any) -> Any:
    """Those of the text, which M-RoPE has as the first of four or not at all: its three go back within an image."""
    if isinstance(positions, torch.Tensor) and positions.dim() == 3 and len(positions) == 4:
        return positions[0]
    return positions


def _padding(starts_BS: np.ndarray, ids_BS: np.ndarray, pad_id: int | None) -> np.ndarray:
    """(B, S): True in the sequences at a row's end that hold the pad token alone: a tail of position 0 makes such."""
    if pad_id is None or pad_id < 0:
        return np.zeros_like(starts_BS)
    blank_BS = np.logical_and.accumulate((ids_BS == pad_id)[:, ::-1], axis=1)[:, ::-1]  # from here on
    return np.logical_or.accumulate(starts_BS & blank_BS, axis=1)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Its values on the host."""
    return tensor.detach().cpu().numpy()
