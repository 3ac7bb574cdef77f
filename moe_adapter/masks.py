"""Which tokens of a forward pass are padding, from whatever mask the model was given."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

MASK_ARGUMENTS = ("attention_mask",)  # names under which a stack of blocks is given its mask


def token_mask(mask: Any, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Boolean mask (T,) of real tokens for hidden states of shape (B, S) or (T,); None where all are real.

    `mask` is (B, S), or longer than the hidden states, as under cached decoding: its last columns count; or
    (B, 1, Q, S) or (B, Q, S), boolean or additive: a key that no query sees is padding; or a dict of such masks by
    layer type.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor):
        return None
    keep_BS = mask != 0 if mask.dim() <= 2 else _seen_keys(mask, shape[-1])
    tokens = torch.Size(shape).numel()
    batch = shape[0] if len(shape) == 2 else keep_BS.shape[0]
    if keep_BS.dim() == 2 and keep_BS.shape[0] == batch and tokens % batch == 0:
        length = tokens // batch
        if length <= keep_BS.shape[1]:
            return keep_BS[:, keep_BS.shape[1] - length :].reshape(-1)
    if tokens != keep_BS.sum():  # equal: the model has already taken the padding out
        _warn_once(tuple(mask.shape), shape)
    return None


def _seen_keys(mask: torch.Tensor, length: int) -> torch.Tensor:
    """(B, S) from an attention mask (B, …, Q, S), where additive masks hold large negative numbers."""
    seen_BQS = mask if mask.dtype == torch.bool else mask > -1.0
    seen_BQS = seen_BQS.flatten(1, -3).any(dim=1) if mask.dim() > 3 else seen_BQS
    if seen_BQS.shape[-1] > length:  # queries against a longer (static) cache: rows are the tokens
        return seen_BQS.any(dim=-1)
    return seen_BQS.any(dim=-2)


@cache
def _warn_once(mask_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    logger.warning("a mask %s fits no hidden states %s: every token counts as real", mask_shape, tuple(shape))
