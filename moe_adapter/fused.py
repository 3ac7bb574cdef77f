"""act(gate)·up and its gradients, each in one pass over a GPU's memory: Triton kernels that compute in float32.

Separate operators write act(gate) down and read it again; here each number is read once and rounded once. Rows may lie
apart, as the halves of one matrix do, and each tensor's in their own way, which Liger's kernel doesn't take.
activations.py imports this file where it may run; `import moe_adapter` does without Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns


def activate(name: str, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """act(gate)·up, a new tensor (T, F), for a `name` in ACTIVATIONS and columns that lie side by side."""
    out_TF = torch.empty_like(up_TF, memory_format=torch.contiguous_format)
    _launch(_forward, name, gate_TF, up_TF, out_TF)
    return out_TF


def activate_backward(name: str, da_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate, in the memory of `da_TF`, and up for the gradient `da_TF` of `activate`, each (T, F)."""
    dup_TF = torch.empty_like(da_TF, memory_format=torch.contiguous_format)
    _launch(_backward, name, gate_TF, up_TF, da_TF, dup_TF)
    return da_TF, dup_TF


def _launch(kernel, name: str, *tensors: Tensor) -> None:
    rows, width = tensors[0].shape
    block = min(BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, whatever its tensors are on
        steps = (tensor.stride(0) for tensor in tensors)
        kernel[rows, triton.cdiv(width, block)](*tensors, *steps, width, NAME=name, BLOCK=block)


@triton.jit
def _forward(gate, up, out, gate_step, up_step, out_step, width, NAME: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # rows times width passes 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_step + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=inside, other=0).to(tl.float32)
    y, _ = _activation(g, NAME)
    tl.store(out + row * out_step + column, (y * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, da, dup, gate_step, up_step, da_step, dup_step, width, NAME: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_step + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=inside, other=0).to(tl.float32)
    d = tl.load(da + row * da_step + column, mask=inside, other=0).to(tl.float32)
    y, slope = _activation(g, NAME)
    tl.store(da + row * da_step + column, (d * u * slope).to(da.dtype.element_ty), mask=inside)
    tl.store(dup + row * dup_step + column, (d * y).to(dup.dtype.element_ty), mask=inside)


@triton.jit
def _activation(x, NAME: tl.constexpr):
    """f(x) and f′(x); forward drops the second, and the compiler what leads to it alone."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        y, slope = x * s, s * (1 + x * (1 - s))
    elif NAME == "gelu":
        s = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y, slope = x * s, s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":  # ½(1 + tanh z) is sigmoid(2z)
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        y, slope = x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu_squared")
        y, slope = tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)  # NaN stays
        if NAME == "relu_squared":
            y, slope = y * y, 2 * y
    return y, slope
