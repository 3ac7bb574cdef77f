"""The activations that kernels know by name, with their derivatives; found by what they compute, not by class."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

aten = torch.ops.aten

# name → (f(x), gradient(dy, x))
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dy, x: aten.threshold_backward(dy, x, 0)),
    "relu_squared": (lambda x: F.relu(x).square(), lambda dy, x: dy * 2 * F.relu(x)),
}


def activation_name(function: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """The name in ACTIVATIONS of what `function` computes, tried on a grid; None if it is none or has parameters."""
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        y = function(x)
        return next((name for name, (known, _) in ACTIVATIONS.items() if torch.allclose(known(x), y, atol=1e-9)), None)
