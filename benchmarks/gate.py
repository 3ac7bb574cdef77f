"""The correctness gate: nothing is timed that does not compute what the float64 layer computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from moe_adapter import DualPathMoE

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOKENS = 48


class GateError(Exception):
    """A subject computes something else; no table is printed."""


def check(name: str, layer: DualPathMoE, call: Callable[[Tensor], Tensor]) -> None:
    """Compare output and gradients of `call`, which runs on the layer's weights, with the layer in float64.

    Raises:
        GateError: they differ by more than rounding.
    """
    reference = copy.deepcopy(layer).double()
    reference.experts.backend = "eager"
    object.__setattr__(reference.config, "backend", "eager")  # neither is fused
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(TOKENS, layer.ffn.hidden, generator=generator).to(layer.experts.down_proj)
    outputs, grads = [], []
    for run, module, dtype in ((call, layer, x.dtype), (reference, reference, torch.float64)):
        given = x.to(dtype).requires_grad_()
        output = run(given)
        wanted = [given, *(p for p in module.new_parameters().values())]
        outputs.append(output)
        grads.append(torch.autograd.grad(output.square().sum(), wanted))
    for got, expected in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        error = float((got.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-12))
        if got.numel() > 1 and not error < LIMITS[x.dtype]:
            raise GateError(f"{name} is off by {error:.1e} of the float64 layer, allowed {LIMITS[x.dtype]:.0e}")


def check_routed(name: str, layer: DualPathMoE, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """The same for the routed experts alone, called with (x, index, weights). Raises GateError."""
    x = torch.randn(TOKENS, layer.ffn.hidden, generator=torch.Generator().manual_seed(0)).to(layer.experts.down_proj)
    _, weights, index = layer.router(x)
    experts = copy.deepcopy(layer.experts).double()
    experts.backend = "eager"
    parameters = list(layer.experts.parameters())
    outputs = [call(x, index, weights), experts(x.double(), index, weights.double())]
    grads = [
        torch.autograd.grad(output.square().sum(), wanted)
        for output, wanted in zip(outputs, (parameters, list(experts.parameters())), strict=True)
    ]
    for got, expected in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        error = float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())
        if not error < LIMITS[x.dtype]:
            raise GateError(f"{name} is off by {error:.1e} of the float64 experts, allowed {LIMITS[x.dtype]:.0e}")
