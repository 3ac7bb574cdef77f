"""Which tokens of a forward pass are padding, from whatever mask the model was given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Names under which a stack of blocks is given its mask: real tokens not zero, or, as in torch, padding True.
MASK_ARGUMENTS = ("attention_mask",)
PADDING_ARGUMENTS = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask")


def given_mask(arguments: Mapping[str, Any]) -> Any:
    """The mask among the arguments of a stack's forward, for `token_mask`; None without one.

    Packed rows, told by position ids that start anew, have none: of them the tail is padding, if there is one.
    """
    for name in MASK_ARGUMENTS:
        if arguments.get(name) is not None:
            return arguments[name]
    for name in PADDING_ARGUMENTS:
        if isinstance(padding := arguments.get(name), torch.Tensor):
            return padding == 0  # False, or 0.0 where the mask is additive
    return _without_tail(arguments)


def token_mask(mask: Any, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Boolean mask (T,) of real tokens for hidden states of shape (B, S), (S, B) or (T,); None where all are real.

    `mask` is (B, S), or longer than the hidden states, as under cached decoding: its last columns count; or
    (B, 1, Q, S) or (B, Q, S), boolean or additive: a key that no query sees is padding; or a dict of such masks by
    layer type. Without one, as with packed sequences told by their position ids, all tokens are real. Hidden states
    that lie sequence first are known by their shape, so not where B = S: there the mask is read as batch first.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor):
        return None
    keep_BS = mask != 0 if mask.dim() <= 2 else _seen_keys(mask, shape[-1])
    if keep_BS.dim() == 2:
        if (keep := _last_columns(keep_BS, shape)) is not None:
            return keep.reshape(-1)
        if tuple(shape) == tuple(reversed(keep_BS.shape)):
            return keep_BS.T.reshape(-1)
    if torch.Size(shape).numel() != keep_BS.sum():  # equal: the model has already taken the padding out
        _warn_once(tuple(mask.shape), shape)
    return None


def _without_tail(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, S) for packed rows: False where the position ids are 0 from there on to a row's end, which a collator puts
    behind the last sequence to fill the row (TRL's `pad_to_multiple_of`). Of M-RoPE's four the text's count. None
    without position ids of each token's own, and in a step of decoding.
    """
    positions_BS, shape = arguments.get("position_ids"), _given_shape(arguments)
    if not isinstance(positions_BS, torch.Tensor) or shape is None or shape[1] == 1:
        return None
    if positions_BS.dim() == 3 and len(positions_BS) == 4:
        positions_BS = positions_BS[0]
    if positions_BS.shape != shape:
        return None
    ahead_BS = positions_BS.flip(1).cumsum(1).flip(1)  # 0 in the tail
    return (ahead_BS > 0) | (ahead_BS[:, :1] == 0)  # a row of nothing but 0 tells nothing


def _given_shape(arguments: Mapping[str, Any]) -> torch.Size | None:
    """(B, S) of what a stack is given."""
    given = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((tensor.shape[:2] for tensor in given if isinstance(tensor, torch.Tensor) and tensor.dim() > 1), None)


def _last_columns(keep_BS: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """As many of a mask's columns as the hidden states have tokens a sequence; None if they can't be told."""
    batch, length = keep_BS.shape
    tokens = torch.Size(shape).numel()
    flat = len(shape) == 1
    if flat and tokens == keep_BS.sum() != keep_BS.numel():  # without the padding
        return None
    if (not flat and shape[0] != batch) or tokens % batch or tokens // batch > length:
        return None
    return keep_BS[:, length - tokens // batch :]


def _seen_keys(mask: torch.Tensor, length: int) -> torch.Tensor:
    """(B, S) from an attention mask (B, …, Q, S), where additive masks hold large negative numbers."""
    seen_BQS = mask if mask.dtype == torch.bool else mask > -1.0
    seen_BQS = seen_BQS.flatten(1, -3).any(dim=1) if mask.dim() > 3 else seen_BQS
    told_BQ = _telling_queries(seen_BQS)
    if seen_BQS.shape[-1] > length:  # queries against a longer (static) cache: rows are the tokens
        return seen_BQS.any(dim=-1) & told_BQ
    told_BQS = seen_BQS & told_BQ[..., None]
    keys_BS = told_BQS.any(dim=-2)
    if told_BQS.shape[-2] == length > 1:  # the last key of a causal mask, which no query but its own could see
        keys_BS[:, -1] |= seen_BQS[:, -1, -1] & told_BQS[:, -2, -2]
    return keys_BS


def _telling_queries(seen_BQS: torch.Tensor) -> torch.Tensor:
    """(B, Q): the queries that tell padding from tokens.

    A padding query is often made to see every key, or itself alone, lest its softmax be empty: such queries count
    only in a sequence that has no others.
    """
    queries, keys = seen_BQS.shape[-2:]
    told_BQ = ~seen_BQS.all(dim=-1)
    told_BQ |= ~told_BQ.any(dim=-1, keepdim=True)
    if queries != keys:
        return told_BQ
    itself_QS = torch.eye(keys, dtype=torch.bool, device=seen_BQS.device)
    wide_BQ = told_BQ & (seen_BQS & ~itself_QS).any(dim=-1)
    return torch.where(wide_BQ.any(dim=-1, keepdim=True), wide_BQ, told_BQ)


@cache
def _warn_once(mask_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    logger.warning("a mask %s fits no hidden states %s: every token counts as real", mask_shape, tuple(shape))
