"""Our backends for transformers' own mixture-of-experts models, through its registry of experts functions.

After `register_experts_functions()` a Mixtral, OLMoE or Qwen2-MoE runs on `lean` or `megablocks`:
`model.set_experts_implementation("lean")`, or `from_pretrained(…, experts_implementation="lean")`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from moe_adapter.activations import activation_name
from moe_adapter.backends import run_backend
from moe_adapter.errors import MoEAdapterError

NAMES = ("lean", "megablocks")


def register_experts_functions() -> None:
    """Enter `lean` and `megablocks` into transformers' ALL_EXPERTS_FUNCTIONS, under these names."""
    for name in NAMES:
        moe.ALL_EXPERTS_FUNCTIONS.register(name, _function(name))


def _function(name: str):
    def experts_forward(experts: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return run_backend(name, HostExperts(experts, name), hidden_TD, index_TK, weights_TK)

    experts_forward.__name__ = f"{name}_experts_forward"
    return experts_forward


class HostExperts:
    """transformers' experts module, seen through the attributes of `moe_adapter.experts.Experts`.

    Raises:
        MoEAdapterError: the module keeps its weights otherwise, or gates in its own way.
    """

    def __init__(self, experts: nn.Module, backend: str):
        own_gate = getattr(type(experts), "_apply_gate", moe._default_apply_gate) is not moe._default_apply_gate
        unusual = [
            what
            for what, is_so in {
                "transposed weights": experts.is_transposed,
                "a gate of its own": experts.has_gate and own_gate,
                "interleaved gate and up": not getattr(experts, "is_concatenated", True),
                "a norm after the experts": getattr(experts, "has_post_expert_norm", False),
                "experts spread over devices": getattr(experts, "_is_expert_parallel", False),
            }.items()
            if is_so
        ]
        if unusual:
            raise MoEAdapterError(
                f"{type(experts).__name__} has {', '.join(unusual)}, which the experts function {backend!r} does not "
                'compute; use model.set_experts_implementation("grouped_mm") or "eager".'
            )
        self.module, self.num_experts = experts, experts.down_proj.shape[0]  # pyright: ignore
        self.has_gate, self.has_bias, self.act_fn = experts.has_gate, experts.has_bias, experts.act_fn
        self.activation = activation_name(experts.act_fn)  # pyright: ignore

    @property
    def first(self) -> torch.Tensor:
        return self.module.gate_up_proj if self.has_gate else self.module.up_proj  # pyright: ignore

    @property
    def first_bias(self) -> torch.Tensor | None:
        name = "gate_up_proj_bias" if self.has_gate else "up_proj_bias"
        return getattr(self.module, name) if self.has_bias else None

    @property
    def down_proj(self) -> torch.Tensor:
        return self.module.down_proj  # pyright: ignore

    @property
    def down_proj_bias(self) -> torch.Tensor | None:
        return self.module.down_proj_bias if self.has_bias else None  # pyright: ignore

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.module._apply_gate(gate_up)  # pyright: ignore
