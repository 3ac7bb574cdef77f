"""Every backend against the float64 reference: outputs and gradients of input, weights and routing weights."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import zoo
from torch import nn

from moe_adapter import MoEAdapterError, backends, dual_path_layers, inject_dual_path_moe
from moe_adapter.experts import Experts
from moe_adapter.ffn import FeedForward

BACKENDS = sorted(backends.BACKENDS)
SHAPES = {
    "plain": dict(tokens=37, experts=4, top_k=2, hidden=32, width=16),
    "one token": dict(tokens=1, experts=4, top_k=2, hidden=32, width=16),
    "no token": dict(tokens=0, experts=4, top_k=2, hidden=32, width=16),
    "top-1": dict(tokens=11, experts=4, top_k=1, hidden=32, width=16),
    "top-all": dict(tokens=11, experts=4, top_k=4, hidden=32, width=16),
    "odd sizes": dict(tokens=13, experts=5, top_k=3, hidden=33, width=7),
    "one expert": dict(tokens=5, experts=1, top_k=1, hidden=16, width=8),
    "many experts": dict(tokens=9, experts=64, top_k=8, hidden=16, width=8),
    "experts by the handful": dict(tokens=90, experts=16, top_k=3, hidden=16, width=8),
    "many tokens": dict(tokens=4097, experts=8, top_k=2, hidden=16, width=8),
}


def make_experts(backend: str, shape: dict, dtype: torch.dtype, *, gated: bool, bias: bool) -> Experts:
    ffn = FeedForward(
        hidden=shape["hidden"],
        intermediate=shape["width"],
        gate="gate" if gated else None,
        up="up",
        down="down",
        bias=bias,
        activation=nn.SiLU() if gated else nn.GELU(),
        residual=None,
    )
    experts = Experts(ffn, shape["experts"], shape["width"], backend=backend, device="cpu", dtype=dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.3)
    return experts


def make_routing(shape: dict, skew: str) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(shape["tokens"], shape["experts"])
    if skew == "empty":  # the last experts get nothing, the first almost everything
        scores += torch.linspace(9, 0, shape["experts"])
    weights, index = scores.topk(shape["top_k"], dim=-1)
    return index, weights.softmax(-1)


def reference(experts: Experts, x, index, weights, gated: bool):
    """Dense float64: every expert on every token, weighted by a (T, E) matrix."""
    first, down = experts.first.detach().double().requires_grad_(), experts.down_proj.detach().double().requires_grad_()
    dense = torch.zeros(len(x), experts.num_experts, dtype=torch.float64).scatter(1, index, weights)
    h = torch.einsum("td,efd->tef", x, first)
    h = h + (0 if experts.first_bias is None else experts.first_bias.double())
    half = h.shape[-1] // 2
    h = experts.act_fn(h[..., :half]) * h[..., half:] if gated else experts.act_fn(h)
    y = torch.einsum("tef,edf->ted", h, down)
    y = y + (experts.down_proj_bias.double() if experts.has_bias else 0)
    return torch.einsum("ted,te->td", y, dense), first, down


@pytest.mark.parametrize("skew", ["even", "empty"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_outputs_and_gradients(backend, shape, dtype, gated, bias, skew):
    shape = SHAPES[shape]
    experts = make_experts(backend, shape, dtype, gated=gated, bias=bias)
    index, weights = make_routing(shape, skew)
    x = torch.randn(shape["tokens"], shape["hidden"], dtype=dtype, requires_grad=True)
    weights = weights.to(dtype).requires_grad_()
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weights))
    y = experts(x, index, weights)
    expected, first, down = reference(experts, x64, index, w64, gated)
    assert y.dtype == dtype and y.shape == x.shape
    tight = dtype == torch.float64
    torch.testing.assert_close(y.double(), expected, rtol=1e-9 if tight else 1e-4, atol=1e-11 if tight else 1e-5)
    (y * y).sum().backward()
    (expected * expected).sum().backward()
    for got, wanted in ((x, x64), (weights, w64), (experts.first, first), (experts.down_proj, down)):
        grad = torch.zeros_like(got) if got.grad is None else got.grad
        limit = (1e-9 if tight else 1e-5) * max(1.0, float(wanted.grad.norm()))
        assert (grad.double() - wanted.grad).norm() <= limit


def contiguous(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape)


def transposed(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape[::-1]).T


def expanded(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape[1]).expand(shape)


@pytest.mark.parametrize("frozen", ["nothing", "x", "weights", "experts", "down_proj"])
@pytest.mark.parametrize("make_x", [contiguous, transposed, expanded])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_awkward_inputs(backend, make_x, frozen, nan_filled_memory):
    """Strided x, an expanded gradient, frozen parts, and memory that holds NaN before it is written."""
    shape = SHAPES["plain"]
    experts = make_experts(backend, shape, torch.float32, gated=True, bias=True)
    index, weights = make_routing(shape, "empty")
    x = make_x((shape["tokens"], shape["hidden"])).requires_grad_(frozen != "x")
    weights.requires_grad_(frozen != "weights")
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(frozen not in ("experts", name))
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    expected, first, down = reference(experts, x64, index, w64, gated=True)
    expected.sum().backward()
    experts(x, index, weights).sum().backward()
    for got, wanted in ((x, x64), (weights, w64), (experts.first, first), (experts.down_proj, down)):
        assert (got.grad is None) == (not got.requires_grad)
        if got.grad is not None:
            torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_run_repeats_bit_for_bit(backend, nan_filled_memory):
    shape = SHAPES["many tokens"]
    experts = make_experts(backend, shape, torch.float32, gated=True, bias=False)
    index, weights = make_routing(shape, "even")
    x = torch.randn(shape["tokens"], shape["hidden"])
    runs = []
    for _ in range(2):
        y = experts(x, index, weights)
        runs.append((y, *torch.autograd.grad(y.square().sum(), list(experts.parameters()))))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_lean_against_finite_differences(gated, bias):
    shape = dict(tokens=5, experts=3, top_k=2, hidden=4, width=3)
    experts = make_experts("lean", shape, torch.float64, gated=gated, bias=bias)
    index, weights = make_routing(shape, "even")
    names, parameters = zip(*experts.named_parameters(), strict=True)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def call(x, weights, *tensors):
        given = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(experts, given, (x, index, weights))

    assert torch.autograd.gradcheck(call, (x, weights.double().requires_grad_(), *parameters))


def test_lean_refuses_a_second_derivative():
    shape = SHAPES["plain"]
    experts = make_experts("lean", shape, torch.float64, gated=True, bias=False)
    index, weights = make_routing(shape, "even")
    x = torch.randn(shape["tokens"], shape["hidden"], dtype=torch.float64, requires_grad=True)
    with pytest.raises(MoEAdapterError, match="eager"):
        torch.autograd.grad(experts(x, index, weights.double()).sum(), x, create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_half_precision_stays_close(backend, dtype, autocast):
    shape = SHAPES["plain"]
    experts = make_experts(backend, shape, torch.float32 if autocast else dtype, gated=True, bias=False)
    index, weights = make_routing(shape, "even")
    x = torch.randn(shape["tokens"], shape["hidden"], dtype=experts.first.dtype, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    expected, first, _ = reference(experts, x64, index, weights.double(), gated=True)
    expected.square().sum().backward()
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = experts(x, index, weights)
    y.float().square().sum().backward()
    assert y.dtype == x.dtype and experts.first.grad.dtype == experts.first.dtype
    for got, wanted in ((y, expected), (x.grad, x64.grad), (experts.first.grad, first.grad)):
        assert (got.double() - wanted).norm() <= 0.02 * wanted.norm()


def test_the_choice_of_auto_is_said_once(caplog):
    shape = SHAPES["plain"]
    experts = make_experts("auto", shape, torch.float32, gated=True, bias=False)
    index, weights = make_routing(shape, "even")
    backends._said.clear()
    with caplog.at_level(logging.INFO, logger="moe_adapter.backends"):
        for _ in range(3):
            experts(torch.randn(37, 32), index, weights)
    assert [record.message for record in caplog.records] == ["backend auto is lean for float32 on cpu"]


def test_doctor_says_what_is_there_and_what_to_do():
    found = backends.doctor()
    assert found.keys() == backends.BACKENDS.keys()
    assert found["eager"] == found["lean"] == found["grouped_mm"] == "available"
    assert found["megablocks"] == "available" or "pip install" in found["megablocks"]


def test_what_a_backend_refuses_falls_back_and_is_said_once(caplog):
    shape = dict(SHAPES["odd sizes"], hidden=35)
    experts = make_experts("grouped_mm", shape, torch.float32, gated=True, bias=False)
    index, weights = make_routing(shape, "even")
    with caplog.at_level(logging.WARNING, logger="moe_adapter.backends"):
        for _ in range(3):
            experts(torch.randn(13, 35), index, weights)
    assert len(caplog.records) == 1
    assert "eager" in caplog.text and "16 bytes" in caplog.text


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(MoEAdapterError, match="grouped_mm"):
        inject_dual_path_moe(zoo.build("qwen2"), backend="fastest")


def test_a_backend_registers_under_a_name():
    calls = []

    def mine(experts, x_TD, index_TK, weights_TK):
        calls.append(tuple(x_TD.shape))
        return torch.zeros_like(x_TD)

    backends.BACKENDS["mine"] = mine
    try:
        model = inject_dual_path_moe(zoo.build("qwen2"), backend="mine", expert_dim=8, shared_expert_dim=8)
        model(input_ids=torch.tensor([[3, 4, 5]]))
    finally:
        del backends.BACKENDS["mine"]
        backends._loaded.pop("mine")
    assert calls == [(3, 32)] * len(dual_path_layers(model))


@pytest.mark.parametrize(("backend", "said"), [("auto", ""), ("grouped_mm", "goes on with eager")])
def test_without_transformers(backend, said):
    """A plain torch user has no transformers: the default needs none, and what does says so and works."""
    code = f"""
import sys; sys.modules["transformers"] = None
import torch; from torch import nn; import moe_adapter as ma
net = nn.ModuleDict(dict(ffn=nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))))
ma.inject_dual_path_moe(net, target="ffn", expert_dim=8, shared_expert_dim=8, backend={backend!r})
print(net["ffn"](torch.randn(3, 8)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([3, 8])" in done.stdout and said in done.stderr and bool(said) == bool(done.stderr)
