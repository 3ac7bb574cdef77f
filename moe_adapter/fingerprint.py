"""Telling whether two base models are the same where an adapter meets them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from moe_adapter.lora import lora_parameters, plain_name
from moe_adapter.objective import dual_path_layers
from moe_adapter.offload import weights_in_place
from moe_adapter.sharding import whole

SAMPLES = 64  # values hashed of each weight


def fingerprint(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For each static expert, by layer name: the shapes of its weights, and a hash of sampled values.

    Values are rounded to bfloat16 first, so that a base loaded in another dtype has the same hash. The hash is None
    where weights are quantised or on the meta device, and so can't be compared. Of a model whose parameters are spread
    over ranks every rank asks.
    """
    return {plain_name(name): describe_module(layer.static_expert) for name, layer in dual_path_layers(model).items()}


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Shapes and hash of one static expert."""
    with weights_in_place(module):
        lora = {id(parameter) for parameter in lora_parameters(module).values()}
        weights = {name: parameter for name, parameter in module.named_parameters() if id(parameter) not in lora}
        plain = {plain_name(name): whole(parameter) for name, parameter in weights.items()}
        return {"shapes": {name: list(tensor.shape) for name, tensor in plain.items()}, "hash": _hash(plain)}


def _hash(tensors: dict[str, torch.Tensor]) -> str | None:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.is_meta or type(tensor) is not torch.Tensor or not tensor.numel():
            return None
        flat = tensor.reshape(-1)
        sampled = flat[torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), device=flat.device).long()]
        digest.update(sampled.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
