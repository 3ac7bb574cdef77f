"""Equation (4): which experts a token goes to, and with which weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moe_adapter.precision import KeepsFloat32, wide


class Router(KeepsFloat32):
    """A bias-free linear map to one logit an expert, and the top-k of it; computed in float32.

    `weight` has shape (E, D).
    """

    def __init__(self, hidden: int, num_experts: int, top_k: int, *, softmax: str, device, dtype: torch.dtype):
        super().__init__()
        self.top_k = top_k
        self.softmax = softmax
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits_TE, top_k_weights_TK, top_k_index_TK), the order of transformers' routers.

        Equation (4): g_i = exp(f_i) / Σ_{j ∈ top-k} exp(f_j), so the K weights of a token sum to 1. With
        softmax="all", as in the authors' released code, the sum runs over all experts and they don't.
        """
        dtype = wide(x_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(dtype), self.precise("weight").to(dtype))
            if self.softmax == "selected":
                top_TK, index_TK = logits_TE.topk(self.top_k, dim=-1)
                weights_TK = top_TK.softmax(dim=-1)
            else:
                weights_TK, index_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, weights_TK, index_TK

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, top_k={self.top_k}, softmax={self.softmax!r}"
