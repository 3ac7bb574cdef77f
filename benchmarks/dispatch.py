"""What routing costs beside its products: the router; and sorting, gathering rows and combining results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import infer, train
from benchmarks.shapes import Shape
from benchmarks.subjects import our_layer
from benchmarks.timing import interleaved
from moe_adapter import DualPathMoE, lean
from moe_adapter.backends import choose, load_backend
from moe_adapter.experts import Experts


def router_share(shape: Shape, like: Tensor, seconds: float) -> float:
    """The router's part of the layer's forward."""
    layer, x = _layer_and_input(shape, like)
    calls = {"router": lambda: infer(layer.router, x), "layer": lambda: infer(layer, x)}  # pyright: ignore
    return _share(calls, seconds)


def dispatch_share(shape: Shape, like: Tensor, seconds: float) -> tuple[str, float]:
    """What `auto` chooses, and the part of the layer's training step in which it sorts, gathers and adds up."""
    layer, x = _layer_and_input(shape, like)
    with torch.no_grad():
        _, weights, index = layer.router(x)  # pyright: ignore
    backend = choose(layer.experts, x)
    step = {"lean": lean_dispatch, "grouped_mm": grouped_mm_dispatch}[backend]
    calls = {"dispatch": lambda: step(layer.experts, x, index, weights), "layer": lambda: train(layer, x)}  # pyright: ignore
    return backend, _share(calls, seconds)


def lean_dispatch(experts: Experts, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
    """What `lean` does in a forward, then in a backward, which gathers the gradient's rows beside the input's."""
    y_SD = x_TD.new_zeros(index_TK.numel(), x_TD.shape[1])
    for gathers in (1, 2):
        slot_S, groups = lean._groups(index_TK, experts.num_experts)
        token_S, _ = slot_S // index_TK.shape[1], weights_TK.reshape(-1, 1)[slot_S].to(x_TD.dtype)
        for rows, _ in lean._blocks(groups, lean.BLOCK):
            for _ in range(gathers):
                x_TD[token_S[rows]]
        lean._combine(y_SD, slot_S, index_TK)


def grouped_mm_dispatch(experts: Experts, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """transformers' function, forward and backward, whose products and activation give back what they are given."""
    bare = copy.copy(experts)
    bare._apply_gate = lambda h: h
    x, weights = (tensor.detach().requires_grad_() for tensor in (x_TD, weights_TK))
    with patch.object(F, "grouped_mm", lambda rows, weight, offs: rows):
        y_TD = load_backend("grouped_mm")(bare, x, index_TK, weights)
    y_TD.backward(x_TD)
    return y_TD


def _layer_and_input(shape: Shape, like: Tensor) -> tuple[DualPathMoE, Tensor]:
    return our_layer(shape, like, "auto"), torch.randn(shape.tokens, shape.hidden, device=like.device).to(like.dtype)


def _share(calls: dict[str, Callable[[], object]], seconds: float) -> float:
    part, whole = interleaved(calls, seconds=seconds).values()
    return part.median / whole.median
