"""The routed experts E_i and the shared expert S of equation (3); both mirror the host's FFN."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from moe_adapter.activations import ACTIVATIONS, activation_name
from moe_adapter.backends import run_backend
from moe_adapter.ffn import FeedForward


class Experts(nn.Module):
    """E routed experts as stacked weights, in the layout of transformers' experts.

    Gated: `gate_up_proj` (E, 2F, D), rows 0…F the gate, F…2F up. Ungated: `up_proj` (E, F, D). Both: `down_proj`
    (E, D, F). Where the host has biases: `gate_up_proj_bias` (E, 2F) or `up_proj_bias` (E, F), and
    `down_proj_bias` (E, D).
    """

    # What transformers' experts functions read beside the weights.
    is_transposed = False
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self, ffn: FeedForward, num_experts: int, expert_dim: int, *, backend: str, device, dtype):
        super().__init__()
        self.num_experts = num_experts
        self.backend = backend
        self.has_gate = ffn.gated
        self.has_bias = ffn.bias
        self.act_fn = own_activation(ffn)
        self.activation = activation_name(self.act_fn)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        up, rows = ("gate_up_proj", 2 * expert_dim) if ffn.gated else ("up_proj", expert_dim)
        self.register_parameter(up, empty(rows, ffn.hidden))
        self.down_proj = empty(ffn.hidden, expert_dim)
        if ffn.bias:
            self.register_parameter(f"{up}_bias", empty(rows))
            self.down_proj_bias = empty(ffn.hidden)

    @property
    def first(self) -> nn.Parameter:
        """The first projection of all experts: `gate_up_proj` or `up_proj`."""
        return self.gate_up_proj if self.has_gate else self.up_proj  # pyright: ignore

    @property
    def first_bias(self) -> nn.Parameter | None:
        return getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias", None)

    def forward(self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Σ_{i ∈ top-k} g_i(x)·E_i(x) of equation (3), shape (T, D), by the configured backend."""
        backend = self.backend if len(x_TD) else "eager"  # the kernels of others fail on no tokens
        return run_backend(backend, self, x_TD, index_TK, weights_TK)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def extra_repr(self) -> str:
        shapes = ", ".join(
            f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters(recurse=False)
        )
        return f"{shapes}, backend={self.backend!r}"


class SharedExpert(nn.Module):
    """The expert that sees every token: `gate_proj` (gated hosts only), `up_proj`, `down_proj`."""

    def __init__(self, ffn: FeedForward, width: int, *, device, dtype):
        super().__init__()
        like = dict(bias=ffn.bias, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(ffn.hidden, width, **like) if ffn.gated else None
        self.up_proj = nn.Linear(ffn.hidden, width, **like)
        self.down_proj = nn.Linear(width, ffn.hidden, **like)
        self.act_fn = own_activation(ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """S(x) of equation (3), shape as x."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def own_activation(ffn: FeedForward):
    """The host's activation: the known function that it equals, else itself, as a copy where it is a module."""
    if name := activation_name(ffn.activation):
        return ACTIVATIONS[name][0]
    return copy.deepcopy(ffn.activation) if isinstance(ffn.activation, nn.Module) else ffn.activation


def eager(experts: Experts, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The plain reference of every backend: one expert after another on the tokens routed to it, summed in place."""
    out_TD = torch.zeros(x_TD.shape, device=x_TD.device, dtype=torch.promote_types(x_TD.dtype, weights_TK.dtype))
    firsts, downs = experts.first.unbind(0), experts.down_proj.unbind(0)
    for expert in range(experts.num_experts):
        token, slot = torch.where(index_TK == expert)
        first_bias = None if experts.first_bias is None else experts.first_bias[expert]
        down_bias = experts.down_proj_bias[expert] if experts.has_bias else None
        h = F.linear(x_TD[token], firsts[expert], first_bias)
        h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        y = F.linear(h, downs[expert], down_bias) * weights_TK[token, slot, None]
        out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype))
    return out_TD.to(x_TD.dtype)
