"""What each token of a forward is: padding or real, of which modality, and where in its sequence.

Shape letters: B rows, S columns of this forward, P columns of a prompt, T = B·S tokens, row-major.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch

from moe_adapter.analysis.packing import packed_rows, to_numpy
from moe_adapter.analysis.schema import GENERATED, IMAGE, PROMPT, VIDEO
from moe_adapter.errors import MoEAdapterError
from moe_adapter.masks import token_mask


@dataclass(kw_only=True)
class Generation:
    """One call of generate: its prompt, what ends a sequence, and how far it has come."""

    rows: int
    prompt_columns: int
    prompt_mask: torch.Tensor | None  # (rows, P)
    stop_ids: tuple[int, ...]
    columns_seen: int = 0
    ended_B: np.ndarray | None = None


@dataclass(kw_only=True)
class Forward:
    """The inputs of one forward, by name, and the state in which it found its cache and generation."""

    inputs: Mapping[str, Any]
    generation: Generation | None
    past: int = field(init=False)  # columns before the first one of this forward

    def __post_init__(self) -> None:
        mask, cache = self.inputs.get("attention_mask"), self.inputs.get("cache")
        if cache is None:
            cache = self.inputs.get("past_key_values")
        if is_padding_mask(mask):
            self.past = mask.shape[1] - self.shape[1]
        else:
            self.past = 0 if cache is None else int(cache.get_seq_length())

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        for name in ("input_ids", "inputs_embeds"):
            if (given := self.inputs.get(name)) is not None:
                return tuple(given.shape[:2])
        raise MoEAdapterError("the model was called with neither input_ids nor inputs_embeds; give it one of them.")


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """Per token of a forward, (B, S) each; `keep_BS` is False for padding and for tokens already recorded."""

    keep_BS: np.ndarray
    sequence_BS: np.ndarray  # of the forward's `sequences`: its row, but where rows are packed
    modality_BS: np.ndarray
    position_BS: np.ndarray
    token_id_BS: np.ndarray
    sequences: int


def is_padding_mask(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def describe_tokens(
    forward: Forward, image_id: int | None, video_id: int | None, pad_id: int | None = None
) -> TokenFacts:
    """The facts of each token of a forward; moves its Generation on."""
    ids = forward.inputs.get("input_ids")
    ids_BS = np.full(forward.shape, -1) if ids is None else to_numpy(ids)
    real_BS, sequence_BS, position_BS = _sequences(forward, ids_BS, pad_id)
    modality_BS = _modality(forward, ids_BS, image_id, video_id)
    generation = forward.generation
    if generation is None:
        if forward.past:  # a hand-written decoding loop
            modality_BS = np.where(modality_BS == PROMPT, GENERATED, modality_BS)
        keep_BS = real_BS
    else:
        generated_S = _columns(forward) >= generation.prompt_columns
        modality_BS = np.where(generated_S, GENERATED, modality_BS)
        keep_BS = real_BS & _running(generation, ids_BS, generated_S) & (_columns(forward) >= generation.columns_seen)
        generation.columns_seen = forward.past + forward.shape[1]
    return TokenFacts(
        keep_BS=keep_BS,
        sequence_BS=sequence_BS,
        modality_BS=modality_BS,
        position_BS=position_BS,
        token_id_BS=ids_BS,
        sequences=int(sequence_BS.max(initial=-1)) + 1,
    )


def _columns(forward: Forward) -> np.ndarray:
    return forward.past + np.arange(forward.shape[1])


def _sequences(forward: Forward, ids_BS: np.ndarray, pad_id: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(real, number of its sequence, position in it), (B, S) each."""
    if forward.generation is None and (packed := packed_rows(forward.inputs, ids_BS, pad_id)):
        return packed.real_BS, packed.sequence_BS, packed.position_BS
    real_BS, position_BS = _real_tokens(forward)
    return real_BS, np.broadcast_to(np.arange(len(ids_BS))[:, None], ids_BS.shape), position_BS


def _real_tokens(forward: Forward) -> tuple[np.ndarray, np.ndarray]:
    """(real, position in its sequence), (B, S) each. Padding, left or right, has no position of its own."""
    columns = forward.shape[1]
    mask = forward.inputs.get("attention_mask")
    if not is_padding_mask(mask) and forward.generation and forward.generation.prompt_mask is not None:
        mask = _grown(forward.generation.prompt_mask, forward)  # a static cache: the model is given a 4-D mask
    if is_padding_mask(mask):
        mask_BS = to_numpy(mask) != 0
        return mask_BS[:, -columns:], (mask_BS.cumsum(axis=1) - 1)[:, -columns:]
    real_T = token_mask(mask, forward.shape)
    real_BS = np.ones(forward.shape, bool) if real_T is None else to_numpy(real_T).reshape(forward.shape)
    return real_BS, forward.past + real_BS.cumsum(axis=1) - 1


def _grown(prompt_mask: torch.Tensor, forward: Forward) -> torch.Tensor:
    """The prompt's mask (rows, P) as it stands after this forward: (B, past + S), generated columns real."""
    rows = prompt_mask.repeat_interleave(forward.shape[0] // prompt_mask.shape[0], dim=0)
    total = forward.past + forward.shape[1]
    return torch.nn.functional.pad(rows, (0, max(0, total - rows.shape[1])), value=1)[:, :total]


def _modality(forward: Forward, ids_BS: np.ndarray, image_id: int | None, video_id: int | None) -> np.ndarray:
    """From mm_token_type_ids where the model gets them (of the sequence so far, or of these columns), else from ids."""
    columns = forward.shape[1]
    if (types := forward.inputs.get("mm_token_type_ids")) is not None:
        types_BS = to_numpy(types)
        start = forward.past if types_BS.shape[1] > columns else 0
        types_BS = types_BS[:, start : start + columns]
        return np.pad(types_BS, ((0, 0), (0, columns - types_BS.shape[1]))).astype(np.int32)
    modality_BS = np.full(forward.shape, PROMPT, np.int32)
    for modality, token_id in ((IMAGE, image_id), (VIDEO, video_id)):
        if token_id is not None:
            modality_BS[ids_BS == token_id] = modality
    return modality_BS


def _running(generation: Generation, ids_BS: np.ndarray, generated_S: np.ndarray) -> np.ndarray:
    """False from a row's end-of-sequence token on: what a batch feeds there only waits for its other rows."""
    ended_B = np.zeros(len(ids_BS), bool) if generation.ended_B is None else generation.ended_B
    stops_BS = np.isin(ids_BS, generation.stop_ids) & generated_S
    ended_BS = ended_B[:, None] & generated_S | (stops_BS.cumsum(axis=1) > 0)
    generation.ended_B = ended_BS[:, -1]
    return ~ended_BS
