"""The fused kernels against float64, and dense and lean on them; test_fused.py runs this file in a process of its own.

On a GPU they run for real, and `activate` is left to find them. Without one Triton interprets them, on the CPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_adapter import activations, dense, fused, lean
from moe_adapter.activations import ACTIVATIONS, FUSED_DTYPES
from moe_adapter.experts import Experts, eager
from moe_adapter.ffn import FeedForward

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPES = [(0, 5), (1, 1), (3, 7), (2, 1024), (2, 1500)]
LAYOUTS = {
    "whole": lambda rows, width: torch.randn(rows, width, device=DEVICE),
    "half of a matrix": lambda rows, width: torch.randn(rows, 2 * width, device=DEVICE)[:, width:],
    "every other row": lambda rows, width: torch.randn(2 * rows, width + 3, device=DEVICE)[::2, 1 : width + 1],
    "one row": lambda rows, width: torch.randn(1, width, device=DEVICE).expand(rows, width),
}


def rounding(dtype: torch.dtype) -> float:
    """Half a last place; the interpreter cuts bfloat16 off where a GPU rounds."""
    return torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 and not ON_GPU else 0.51)


def assert_rounded_once(got: Tensor, exact: Tensor, scale: Tensor, what: str) -> None:
    """Within one rounding of the exact value, and float32's error on `scale`, the product without the activation."""
    limit = rounding(got.dtype) * exact.abs() + 4 * torch.finfo(torch.float32).eps * scale.abs()
    limit += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # the step of the smallest numbers
    worst = ((got.double() - exact).abs() - limit).max().item() if got.numel() else 0.0
    assert worst <= 0, f"{what} is {worst:.1e} beyond its limit"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_outputs_and_gradients(name, dtype, shape, layout):
    gate, up = ((LAYOUTS[layout](*shape) * 3).to(dtype) for _ in range(2))  # .to keeps strides
    around = torch.randn(shape[0] + 1, shape[1] + 3, device=DEVICE).to(dtype)
    da, kept = around[:-1, :-3], around.clone()
    gate64, up64, da64 = (tensor.double().requires_grad_() for tensor in (gate, up, da))
    expected = ACTIVATIONS[name][0](gate64) * up64
    expected.backward(da64)
    before = gate.clone(), up.clone()
    assert_rounded_once(fused.activate(name, gate, up), expected.detach(), (gate64 * up64).detach(), "act(gate)·up")
    dgate, dup = fused.activate_backward(name, da, gate, up)
    slope = gate64.detach().abs() + 1  # relu_squared's grows with the gate, the others' is near 1
    assert_rounded_once(dgate, gate64.grad, (da64 * up64).detach() * slope, "gate's gradient")
    assert_rounded_once(dup, up64.grad, (da64 * gate64).detach() * slope, "up's gradient")
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
    kept[:-1, :-3] = dgate
    assert dgate is da and torch.equal(around, kept)  # its own memory, and none beside it


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_as_separate_operators_to_their_rounding(name, dtype):
    """They round two or three times, here once: three last places at most, from values within float32's reach."""
    gate, up, da = (torch.randn(4, 300, device=DEVICE).to(dtype) for _ in range(3))
    function, derivative = ACTIVATIONS[name]
    dgate, dup = derivative(da * up, gate), function(gate) * da
    pairs = [(fused.activate(name, gate, up), function(gate) * up)]
    pairs += zip(fused.activate_backward(name, da.clone(), gate, up), (dgate, dup), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=3 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_large_numbers_as_separate_operators_have_them(name):
    gate = torch.tensor([[torch.nan, 0.0, -0.0, 1e4, -1e4]], device=DEVICE)
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(fused.activate(name, gate, up), ACTIVATIONS[name][0](gate) * up, equal_nan=True)
    exact = gate.double().requires_grad_()
    ACTIVATIONS[name][0](exact).sum().backward()
    dgate, _ = fused.activate_backward(name, torch.ones_like(gate), gate, torch.ones_like(gate))
    torch.testing.assert_close(dgate[:, 1:], exact.grad[:, 1:].float())
    assert dgate[0, 0].isnan() or name.startswith("relu")  # whose slope at NaN is a constant


def test_a_row_beyond_two_to_the_31():
    """4.3 GB, of which three rows of eight numbers are touched."""
    step = 2**30
    gate = torch.empty(2 * step + 8, device=DEVICE, dtype=torch.bfloat16).as_strided((3, 8), (step, 1)).fill_(2)
    up = torch.full((3, 8), 3.0, device=DEVICE, dtype=torch.bfloat16)
    assert (fused.activate("relu", gate, up) == 6).all()


def test_which_tensors_they_take():
    gate, up = torch.randn(4, 16, device=DEVICE).chunk(2, dim=1)
    assert activations.fused_for(gate, up) is fused
    assert activations.fused_for(gate.bfloat16(), up.bfloat16()) is fused
    for others in (
        (gate.double(), up.double()),
        (gate, up.half()),
        (gate.T, up.T),
        (gate[None], up[None]),
        (nn.Parameter(gate), nn.Parameter(up)),
    ):
        assert activations.fused_for(*others) is None


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which kernels ran. Without a GPU `activate` would not look for them, and is put past its look at the device."""
    seen: list[str] = []
    for kernel in (fused.activate, fused.activate_backward):

        def spy(*args, kernel=kernel):
            seen.append(kernel.__name__)
            return kernel(*args)

        name = kernel.__name__

        monkeypatch.setattr(fused, name, spy)
        for module in () if ON_GPU else (dense, lean):
            monkeypatch.setattr(module, name, spy)
    return seen


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_dense_ffn_on_them(name, trains, calls):
    shapes = ((24, 16), (24, 16), (16, 24))
    weights = [torch.randn(shape, device=DEVICE).mul_(0.3).requires_grad_(trains) for shape in shapes]
    x, factor = torch.randn(9, 16, device=DEVICE).requires_grad_(), torch.rand(9, 1, device=DEVICE).requires_grad_()
    wanted = [tensor for tensor in (x, factor, *weights) if tensor.requires_grad]
    y = dense.dense_ffn(x, factor, dense.Maps(*weights), name)
    assert calls == ["activate"]
    grads = torch.autograd.grad(y.square().sum(), wanted)
    assert calls[1:] == ["activate"] * trains + ["activate_backward"]
    x, factor, *weights = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, factor, *weights))
    a = ACTIVATIONS[name][0](F.linear(x, weights[0])) * F.linear(x, weights[1])
    expected = factor * F.linear(a, weights[2])
    wanted = [tensor for tensor in (x, factor, *weights) if tensor.requires_grad]
    assert_close((y, *grads), (expected, *torch.autograd.grad(expected.square().sum(), wanted)))
    plain = dense.Maps(*weights).to(torch.float32)
    with torch.no_grad():
        assert_close([dense.dense_ffn(x.float(), factor.float(), plain, name)], [y])


def test_lean_on_them(calls):
    """The halves of one matrix, and experts without tokens."""
    ffn = FeedForward(hidden=16, intermediate=24, gate="gate", up="up", down="down", bias=True, activation=nn.SiLU())
    experts = Experts(ffn, 5, 24, backend="lean", device=DEVICE, dtype=torch.float32)
    twin = Experts(ffn, 5, 24, backend="eager", device=DEVICE, dtype=torch.float64)
    with torch.no_grad():
        for parameter, other in zip(experts.parameters(), twin.parameters(), strict=True):
            other.copy_(parameter.normal_(0, 0.3))
    index = torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1]], device=DEVICE)
    x, weights = torch.randn(4, 16, device=DEVICE).requires_grad_(), torch.rand(4, 2, device=DEVICE).requires_grad_()
    found = []
    for module, run, dtype in ((experts, lean.lean, torch.float32), (twin, eager, torch.float64)):
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weights)]
        y = run(module, given[0], index, given[1])
        found.append((y, *torch.autograd.grad(y.square().sum(), [*given, *module.parameters()])))
    assert set(calls) == {"activate", "activate_backward"}
    assert_close(*found)


def assert_close(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other.double()).norm() <= 1e-5 * other.double().norm()
