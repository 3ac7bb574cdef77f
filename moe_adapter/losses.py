"""Equations (5) to (9): the language-model loss, the load-balance loss and their sum.

(5) L_ar = −Σ log p(y_i | X, y_<i) is the model's own loss over the label tokens; prompt and image tokens carry the
label −100. transformers averages it where the paper sums, so γ is relative to a mean. All quantities of (6) to (8)
are per layer, over the real tokens B of one micro-batch, padding left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

IGNORED_LABEL = -100


class RouterCall(NamedTuple):
    """One call of a router: logits (T, E), chosen experts (T, K), boolean mask (T,) of real tokens or None for all."""

    logits_TE: torch.Tensor
    index_TK: torch.Tensor
    mask_T: torch.Tensor | None


def routed_fraction(calls: Sequence[RouterCall]) -> torch.Tensor:
    """Equation (6): F_e = (1/|B|)·Σ_t 1[t is routed to e], shape (E,), sums to k; carries no gradient."""
    return routed_counts(calls) / real_tokens(calls)


def routed_counts(calls: Sequence[RouterCall]) -> torch.Tensor:
    """Σ_t 1[t is routed to e] over real tokens, shape (E,)."""
    first = calls[0].logits_TE
    counts_E = first.new_zeros(first.shape[-1])
    for _, index_TK, mask_T in calls:
        real_T = counts_E.new_ones(len(index_TK)) if mask_T is None else mask_T.to(counts_E.dtype)
        counts_E.index_add_(0, index_TK.flatten(), real_T.repeat_interleave(index_TK.shape[1]))
    return counts_E


def mean_probability(calls: Sequence[RouterCall], tokens: int | torch.Tensor) -> torch.Tensor:
    """Equation (7): G_e = (1/|B|)·Σ_t softmax(f(t))_e over all E experts, shape (E,); |B| is `tokens`."""
    total_E: Any = 0
    for logits_TE, _, mask_T in calls:
        if mask_T is not None:  # padding may hold NaN, whose gradient a product with 0 would keep
            logits_TE = logits_TE.masked_fill(~mask_T[:, None], 0.0)
        probability_TE = logits_TE.softmax(dim=-1)
        total_E = total_E + (probability_TE if mask_T is None else probability_TE * mask_T[:, None]).sum(dim=0)
    return total_E / tokens


def layer_balance_loss(
    calls: Sequence[RouterCall],
    part: Sequence[RouterCall] | None = None,
    fraction_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Equation (8): L_bal = Σ_e F_e·G_e of one layer; k/E at perfect balance, 0 without tokens.

    The loss is additive in G: `part` asks for what some of the layer's calls contribute to it. `fraction_E` is an F
    over more than these calls.
    """
    if fraction_E is None:
        with torch.no_grad():
            fraction_E = routed_fraction(calls)
    return (fraction_E * mean_probability(calls if part is None else part, real_tokens(calls))).sum()


def total_loss(ar_loss: torch.Tensor, balance: torch.Tensor, balance_coef: float) -> torch.Tensor:
    """Equation (9): L_total = L_ar + γ·L_bal."""
    return ar_loss + (balance_coef * balance).to(ar_loss.device, ar_loss.dtype)


def real_tokens(calls: Sequence[RouterCall]) -> int | torch.Tensor:
    """|B|, at least 1, so that a batch of nothing but padding has the loss 0."""
    tokens: Any = 0
    for _, index_TK, mask_T in calls:
        tokens = tokens + (len(index_TK) if mask_T is None else mask_T.sum())
    return tokens.clamp(min=1) if isinstance(tokens, torch.Tensor) else max(tokens, 1)
