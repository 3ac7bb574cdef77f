"""The activations that kernels know by name, with their derivatives; found by what they compute, not by class."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)
aten = torch.ops.aten
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


# name → (f(x), gradient(dy, x))
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (gelu_tanh, lambda dy, x: aten.gelu_backward(dy, x, approximate="tanh")),
    "relu": (F.relu, lambda dy, x: aten.threshold_backward(dy, x, 0)),
    "relu_squared": (relu_squared, lambda dy, x: dy * 2 * F.relu(x)),
}


def activation_name(function: Callable[[Tensor], Tensor], *, to_the_bit: bool = False) -> str | None:
    """The name in ACTIVATIONS of what `function` computes, tried on a grid; None if it is none or has parameters.

    It is taken for the same where float64 agrees to rounding or, `to_the_bit`, float32 in every bit.
    """
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    x = torch.linspace(-6, 6, 97, dtype=torch.float32 if to_the_bit else torch.float64, device="cpu")
    limit = 0.0 if to_the_bit else 1e-12
    with torch.no_grad():
        y = function(x)
        return next((name for name, (known, _) in ACTIVATIONS.items() if (known(x) - y).abs().max() <= limit), None)


def activate(name: str, gate: Tensor | None, up: Tensor) -> Tensor:
    """act(gate)·up, or act(up) where there is no gate; a new tensor."""
    function = ACTIVATIONS[name][0]
    if gate is None:
        return function(up)
    if up.is_cuda and (fused := fused_for(gate, up)):
        return fused.activate(name, gate, up)
    return function(gate).mul_(up)


def activate_backward(name: str, da: Tensor, gate: Tensor | None, up: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradients of gate and up for the gradient `da` of `activate`, whose memory they may take.

    ⟨up, gradient of up⟩ is ⟨da, activate⟩ where there is a gate.
    """
    function, derivative = ACTIVATIONS[name]
    if gate is None:
        return None, derivative(da, up)
    if up.is_cuda and (fused := fused_for(gate, up, da)):
        return fused.activate_backward(name, da, gate, up)
    dup = function(gate).mul_(da)
    return derivative(da.mul_(up), gate), dup


def fused_for(*tensors: Tensor) -> ModuleType | None:
    """fused.py, where its kernels can take these: half or single precision, real memory, columns side by side."""
    first = tensors[0]
    fits = (type(t) is Tensor and t.dtype == first.dtype and t.dim() == 2 and t.stride(1) == 1 for t in tensors)
    return _tried(first.device, first.dtype) if first.dtype in FUSED_DTYPES and all(fits) else None


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """fused.py, once a kernel of it has run on the device; where Triton is missing or fails None, said in the log."""
    try:
        fused = importlib.import_module("moe_adapter.fused")
        fused.activate("silu", *torch.ones(2, 1, 1, device=device, dtype=dtype))
    except Exception as error:  # no Triton, no C compiler, a GPU that is too old
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(f"gated activations of {dtype} on {device} take separate operators, for Triton gave: {lines[0]}")
        return None
    return fused
