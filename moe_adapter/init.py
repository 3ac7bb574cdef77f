"""Start values of a new layer: the identity on the base, or the literal equation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.ffn import weight_and_bias
from moe_adapter.layer import DualPathMoE
from moe_adapter.offload import weights_in_place

DEFAULT_STD = 0.02


@torch.no_grad()
def initialise(layer: DualPathMoE, host: nn.Module, model_config: Any = None) -> None:
    """Fill the layer's new parameters: normal(0, std), biases zero, α and λ at their start values.

    `host` is the module in which the FFN's maps are named. std is the config's `init_std`, else the model's
    `initializer_range`, else 0.02. With `preserve_base` the output projections are zero, so that the MoE path gives
    exactly 0; with expert_init="ffn_slice" the experts' first
    projections (and, without `preserve_base`, their output projections) are slices of the host's FFN.
    """
    config = layer.config
    std = config.init_std or getattr(model_config, "initializer_range", None) or DEFAULT_STD
    for name, parameter in layer.new_parameters().items():
        if name.endswith("_logit"):
            start = config.alpha_init if name == "alpha_logit" else config.lam_init
            parameter.fill_(math.log(start / (1 - start)))
        elif name.startswith("experts.act_fn.") or name.startswith("shared_expert.act_fn."):
            continue  # a copy of the host's own
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, std)
    if config.expert_init == "ffn_slice":
        with weights_in_place(host):
            _slices(layer, host)
    if layer.coefficient is not None:
        _start_coefficient(layer)
    if config.preserve_base:
        for down in _output_projections(layer):
            down.zero_()


def _start_coefficient(layer: DualPathMoE) -> None:
    """Token-wise mixing starts at α₀ for every token where the base is to be preserved."""
    start, coefficient = layer.config.alpha_init, layer.coefficient
    if layer.config.preserve_base:
        coefficient.weight.zero_()  # pyright: ignore
        coefficient.bias.copy_(torch.tensor([0.0, math.log(start / (1 - start))]))  # pyright: ignore


def _output_projections(layer: DualPathMoE) -> list[torch.Tensor]:
    downs = []
    if layer.experts is not None:
        downs += [layer.experts.down_proj, getattr(layer.experts, "down_proj_bias", None)]
    if layer.shared_expert is not None:
        downs += [layer.shared_expert.down_proj.weight, layer.shared_expert.down_proj.bias]
    return [down for down in downs if down is not None]


def _slices(layer: DualPathMoE, host: nn.Module) -> None:
    """Expert e takes rows [e·F, (e+1)·F) of the host's hidden units, cyclically; the shared expert the first rows."""
    ffn = layer.ffn
    gate, up, down = _host_weights(host, ffn)
    if layer.experts is not None:
        width = layer.experts.down_proj.shape[2]
        for expert in range(layer.experts.num_experts):
            rows = (torch.arange(width, device=up[0].device) + expert * width) % ffn.intermediate
            firsts = [gate, up] if gate is not None else [up]
            layer.experts.first[expert].copy_(torch.cat([weight[rows] for weight, _ in firsts]))
            layer.experts.down_proj[expert].copy_(down[0][:, rows])
            if layer.experts.first_bias is not None:
                layer.experts.first_bias[expert].copy_(torch.cat([bias[rows] for _, bias in firsts]))
                layer.experts.down_proj_bias[expert].copy_(down[1])
    if layer.shared_expert is not None:
        shared = layer.shared_expert
        width = shared.up_proj.out_features
        rows = torch.arange(width, device=up[0].device) % ffn.intermediate
        pairs = [(shared.up_proj, up)] + ([(shared.gate_proj, gate)] if gate is not None else [])
        for linear, (weight, bias) in pairs:
            linear.weight.copy_(weight[rows])  # pyright: ignore
            if linear.bias is not None:  # pyright: ignore
                linear.bias.copy_(bias[rows])  # pyright: ignore
        shared.down_proj.weight.copy_(down[0][:, rows])
        if shared.down_proj.bias is not None:
            shared.down_proj.bias.copy_(down[1])


def _host_weights(host: nn.Module, ffn):
    """((weight, bias) of gate or None, of up, of down) as (out, in), biases zero where the host has none."""

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = weight_and_bias(host.get_submodule(name))
        if not weight.is_floating_point() or weight.dim() != 2:
            raise MoEAdapterError(f'expert_init="ffn_slice" needs plain weights; {name} is quantised: use "normal".')
        return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias

    if ffn.gate is not None and ffn.gate == ffn.up:
        weight, bias = read(ffn.up)
        gate, up = zip(weight.chunk(2), bias.chunk(2), strict=True)
        return gate, up, read(ffn.down)
    return read(ffn.gate) if ffn.gate else None, read(ffn.up), read(ffn.down)
