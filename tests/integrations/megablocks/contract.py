"""The megablocks backend against `eager` in float64: outputs and gradients, on NaN-filled buffers.

test_megablocks.py runs this file in a process of its own: on a GPU as it is, without one in Triton's interpreter, on
the kernels of the published package, with the stand-ins beside this file for what is compiled.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_adapter import MoEAdapterError, backends, dual_path_layers, inject_dual_path_moe
from moe_adapter.experts import Experts, eager
from moe_adapter.ffn import FeedForward
from moe_adapter.integrations import megablocks as integration
from moe_adapter.integrations.megablocks import megablocks

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, LIMIT = ("cuda", torch.bfloat16, 2e-2) if ON_GPU else ("cpu", torch.float32, 3e-6)
SHAPES = {
    "plain": dict(tokens=19, experts=4, top_k=2, hidden=32, width=16),
    "one token": dict(tokens=1, experts=4, top_k=2, hidden=32, width=16),
    "top-1": dict(tokens=11, experts=4, top_k=1, hidden=32, width=16),
    "top-all": dict(tokens=7, experts=4, top_k=4, hidden=32, width=16),
    "odd sizes": dict(tokens=9, experts=5, top_k=3, hidden=33, width=7),
    "one expert": dict(tokens=5, experts=1, top_k=1, hidden=16, width=8),
    "more than a block": dict(tokens=3, experts=3, top_k=2, hidden=300, width=70),
    "many experts": dict(tokens=2, experts=64, top_k=8, hidden=16, width=8),
}


@pytest.fixture(autouse=True)
def nan_in_every_empty_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN, whatever the allocator hands out."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.is_floating_point():
            out.detach().fill_(torch.nan)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True, scope="session")
def one_configuration_each() -> None:
    """The autotuner times its configurations on a GPU, and there is none in the interpreter."""
    if not ON_GPU:
        kernels = pytest.importorskip("megablocks.backend.kernels")
        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            del kernel.configs[1:]


def make_experts(shape: dict, dtype: torch.dtype = DTYPE, *, gated: bool = True, bias: bool = False, act=None):
    gate = "gate" if gated else None
    activation = act or (nn.SiLU() if gated else nn.GELU())
    sizes = dict(hidden=shape["hidden"], intermediate=shape["width"])
    ffn = FeedForward(**sizes, gate=gate, up="up", down="down", bias=bias, activation=activation)
    experts = Experts(ffn, shape["experts"], shape["width"], backend="megablocks", device=DEVICE, dtype=dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.3)
    return experts


def make_inputs(shape: dict, skew: str = "even", dtype: torch.dtype = DTYPE):
    scores = torch.rand(shape["tokens"], shape["experts"], device=DEVICE)
    if skew == "empty":  # all tokens choose alike, and some experts get nothing
        scores += torch.linspace(9, 0, shape["experts"], device=DEVICE)
    weights, index = scores.topk(shape["top_k"], dim=-1)
    x = torch.randn(shape["tokens"], shape["hidden"], device=DEVICE).to(dtype).requires_grad_()
    return x, index, (weights.softmax(-1) * 1.3).requires_grad_()


def gradients(experts: Experts, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor | None]:
    parameters = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"x": x.grad, "weights": weights.grad} | parameters


def loss(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.linspace(0.5, 1.5, y.numel(), device=y.device).to(y.dtype).view_as(y)).sum()


def assert_close(got: torch.Tensor, wanted: torch.Tensor, what: str, limit: float = LIMIT) -> None:
    error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)
    assert error < limit, f"{what}: relative error {error:.1e}"


def check(experts: Experts, x, index, weights, *, loss=loss, call=megablocks, limit: float = LIMIT) -> None:
    """Output and every gradient against eager, in float64, from the same values."""
    twin = copy.deepcopy(experts).double()
    x64, w64 = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, weights))
    y, expected = call(experts, x, index, weights), eager(twin, x64, index, w64)
    assert y.dtype == x.dtype and y.shape == x.shape
    assert_close(y, expected, "y", limit)
    loss(y).backward()
    loss(expected).backward()
    wanted = gradients(twin, x64, w64)
    for name, grad in gradients(experts, x, weights).items():
        if wanted[name] is None:
            assert grad is None, f"{name} is frozen"
        else:
            assert grad.dtype == (DTYPE if name == "x" else grad.dtype)
            assert_close(grad, wanted[name], name, limit)


@pytest.mark.parametrize("skew", ["even", "empty"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape, gated, bias, skew):
    experts = make_experts(SHAPES[shape], gated=gated, bias=bias)
    check(experts, *make_inputs(SHAPES[shape], skew))


@pytest.mark.parametrize("used", [[2, 3], [0, 1], [0, 3], [1, 2]])
def test_wherever_the_experts_without_tokens_stand(used):
    experts = make_experts(SHAPES["plain"], bias=True)
    x, _, weights = make_inputs(dict(SHAPES["plain"], tokens=5))
    check(experts, x, torch.tensor(used, device=DEVICE).expand(5, 2), weights)


def test_gradients_of_experts_without_tokens_are_zero():
    experts = make_experts(SHAPES["many experts"], bias=True)
    x, index, weights = make_inputs(SHAPES["many experts"])
    megablocks(experts, x, index, weights).sum().backward()
    unused = torch.ones(64, dtype=torch.bool).index_fill(0, index.flatten().cpu(), False)
    assert unused.sum() >= 32
    for parameter in experts.parameters():
        assert (parameter.grad[unused] == 0).all()
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("frozen", ["x", "routing weights", "experts", "down projection", "all but the routing"])
def test_what_is_frozen_gets_no_gradient_and_disturbs_no_other(frozen):
    experts = make_experts(SHAPES["plain"], bias=True)
    x, index, weights = make_inputs(SHAPES["plain"], "empty")
    x.requires_grad_(frozen not in ("x", "all but the routing"))
    weights.requires_grad_(frozen != "routing weights")
    experts.requires_grad_(frozen not in ("experts", "all but the routing"))
    experts.down_proj.requires_grad_(frozen in ("x", "routing weights"))
    check(experts, x, index, weights)


def test_tensors_that_are_not_contiguous():
    shape = SHAPES["plain"]
    experts = make_experts(shape)
    x, index, weights = make_inputs(shape)
    x = x.detach().T.contiguous().T.requires_grad_()
    index = index.T.contiguous().T
    weights = weights.detach().repeat(1, 2)[:, :2].requires_grad_()
    for name in ("gate_up_proj", "down_proj"):
        data = getattr(experts, name).data
        setattr(experts, name, nn.Parameter(data.transpose(1, 2).contiguous().transpose(1, 2)))
    check(experts, x, index, weights)


def test_one_column_of_the_routing():
    """A (T, 1) slice of a wider tensor: flat at once, and still with a stride."""
    experts = make_experts(SHAPES["top-1"])
    x, index, weights = make_inputs(dict(SHAPES["top-1"], top_k=3))
    check(experts, x, index[:, 1:2], weights.detach()[:, 1:2].requires_grad_())


def test_an_expanded_gradient():
    experts = make_experts(SHAPES["plain"])
    check(experts, *make_inputs(SHAPES["plain"]), loss=lambda y: y.sum())


def test_any_activation():
    experts = make_experts(SHAPES["plain"], act=lambda h: torch.sin(h) + h)
    check(experts, *make_inputs(SHAPES["plain"]))


def test_bfloat16_beside_float32_routing_weights():
    experts = make_experts(SHAPES["plain"], torch.bfloat16, bias=True)
    x, index, weights = make_inputs(SHAPES["plain"], dtype=torch.bfloat16)
    y = megablocks(experts, x, index, weights)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weights.grad.dtype == torch.float32
    twin = copy.deepcopy(experts).double()
    assert_close(y, eager(twin, x.detach().double(), index, weights.detach().double()), "y", 2e-2)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """300 slots that add 1 each: a bfloat16 sum stops at 256."""
    shape = dict(tokens=300, experts=1, top_k=1, hidden=8, width=8)
    experts = make_experts(shape, torch.bfloat16, bias=True)
    x, index, weights = make_inputs(shape, dtype=torch.bfloat16)
    megablocks(experts, x, index, torch.ones_like(weights)).sum().backward()
    assert (experts.down_proj_bias.grad == 300).all()


def test_autocast_casts_the_experts_and_not_the_routing_weights(monkeypatch):
    seen = []

    def scatter(y_SD, order_S, expert_S, weights_S, *rest):
        seen.append((y_SD.dtype, weights_S.dtype, torch.is_autocast_enabled(DEVICE)))
        return real(y_SD, order_S, expert_S, weights_S, *rest)

    real = integration.ops.scatter
    monkeypatch.setattr(integration.ops, "scatter", scatter)
    experts = make_experts(SHAPES["plain"], torch.float32)
    x, index, weights = make_inputs(SHAPES["plain"], "empty", torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = megablocks(experts, x, index, weights)
    y.sum().backward()
    assert seen == [(torch.bfloat16, torch.float32, False)]
    assert y.dtype == experts.first.grad.dtype == torch.float32
    assert experts.first.grad.isfinite().all()


def test_recomputation_gives_the_same():
    def call(experts, *inputs):
        return torch.utils.checkpoint.checkpoint(megablocks, experts, *inputs, use_reentrant=False)

    experts = make_experts(SHAPES["plain"])
    check(experts, *make_inputs(SHAPES["plain"], "empty"), call=call)


def test_compiled_code_may_call_it():
    compiled = torch.compile(lambda *inputs: megablocks(*inputs) * 1, backend="eager")
    check(make_experts(SHAPES["plain"]), *make_inputs(SHAPES["plain"]), call=compiled)


def test_a_layer_trains_by_it_as_by_eager():
    """Through injection and the registry, the router's gradient included."""
    torch.manual_seed(3)
    net = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))}).to(DEVICE, DTYPE)
    sizes = dict(num_experts=8, top_k=2, expert_dim=8, shared_expert_dim=8, preserve_base=False)
    inject_dual_path_moe(net, target="ffn", backend="megablocks", **sizes)
    twin = copy.deepcopy(net)
    (layer,), (other,) = (list(dual_path_layers(model).values()) for model in (net, twin))
    other.experts.backend = "eager"
    x = torch.randn(6, 16, device=DEVICE).to(DTYPE)
    assert backends._refusal("megablocks", layer.experts, x) is None
    y, expected = net["ffn"](x), twin["ffn"](x)
    assert_close(y, expected.double(), "y")
    loss(y).backward()
    loss(expected).backward()
    assert layer.router.weight.grad.dtype == torch.float32
    for (name, parameter), wanted in zip(layer.new_parameters().items(), other.new_parameters().values(), strict=True):
        assert_close(parameter.grad, wanted.grad.double(), name)


def test_what_it_refuses(monkeypatch):
    x = torch.zeros(2, 32)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "is on cpu" in backends._refusal("megablocks", make_experts(SHAPES["plain"]), x)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    wide = make_experts(SHAPES["plain"], torch.float32)
    assert "bfloat16, and the experts compute in float32" in integration.refusal(wide, on_gpu)
    assert integration.refusal(make_experts(SHAPES["plain"], torch.bfloat16), on_gpu) is None


def test_more_than_int32_addresses_is_an_error():
    experts = make_experts(SHAPES["plain"])
    x = torch.zeros(1, 1, device=DEVICE, dtype=DTYPE).expand(2**27, 32)
    index = torch.zeros(1, 1, device=DEVICE, dtype=torch.long).expand(2**27, 2)
    with pytest.raises(MoEAdapterError, match="grouped_mm"):
        megablocks(experts, x, index, index)
