"""The dense FFN as one operator, and which modules it may stand in for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe
from moe_adapter.activations import ACTIVATIONS
from moe_adapter.dense import CHUNK, Maps, dense_ffn
from moe_adapter.ffn import describe
from moe_adapter.recognise import computes_ffn

D, WIDTH = 10, 14


def make_maps(*, gated: bool = True, bias: bool = False, dtype=torch.float64, trains: bool = True) -> Maps:
    shapes = ((WIDTH, D), (WIDTH, D), (D, WIDTH), (WIDTH,), (WIDTH,), (D,))
    wanted = (gated, True, True, gated and bias, bias, bias)
    tensors = (torch.randn(shape, dtype=dtype).mul_(0.5).requires_grad_(trains) for shape in shapes)
    return Maps(*(tensor if want else None for tensor, want in zip(tensors, wanted, strict=True)))


def plain(x, factor, maps: Maps, activation: str):
    act, up = ACTIVATIONS[activation][0], F.linear(x, maps.up_FD, maps.up_bias_F)
    a = act(up) if maps.gate_FD is None else act(F.linear(x, maps.gate_FD, maps.gate_bias_F)) * up
    return factor * F.linear(a, maps.down_DF, maps.down_bias_D)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
def test_second_order_accurate_gradients(gated, bias, trains, per_token, activation):
    """Against finite differences, in float64."""
    maps = make_maps(gated=gated, bias=bias, trains=trains)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    factor = torch.rand(5 if per_token else 1, *([1] if per_token else []), dtype=torch.float64).requires_grad_()
    given = [tensor for tensor in (x, factor, *maps) if tensor is not None]
    where = [i for i, tensor in enumerate(maps) if tensor is not None]

    def call(x, factor, *tensors):
        full = dict(zip(where, tensors, strict=True))
        return dense_ffn(x, factor, Maps(*(full.get(i) for i in range(6))), activation)

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("tokens", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("trains", [False, True])
def test_any_number_of_tokens(tokens, trains, nan_filled_memory):
    maps = make_maps(dtype=torch.float32, trains=trains)
    x, factor = torch.randn(tokens, D, requires_grad=True), torch.tensor([0.7], requires_grad=True)
    wanted = [tensor for tensor in (x, factor, *maps) if tensor is not None and tensor.requires_grad]
    twins = {id(tensor): tensor.detach().double().requires_grad_() for tensor in wanted}
    y = dense_ffn(x, factor, maps, "silu")
    double = Maps(*(None if t is None else twins.get(id(t), t.double()) for t in maps))
    expected = plain(twins[id(x)], twins[id(factor)], double, "silu")
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(dense_ffn(x, factor, maps, "silu"), y, rtol=0, atol=0)
    for got, expect in zip(
        torch.autograd.grad((y * y).sum(), wanted),
        torch.autograd.grad((expected * expected).sum(), list(twins.values())),
        strict=True,
    ):
        assert (got.double() - expect).norm() <= 1e-5 * max(1.0, float(expect.norm()))


def test_keeps_the_pre_activations_and_nothing_else():
    """A frozen FFN's memory for backward: its input and output aside, two of its three widths' activations."""
    maps = make_maps(dtype=torch.float32, trains=False)
    x = torch.randn(64, D, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor):
        if all(tensor.data_ptr() != weight.data_ptr() for weight in maps if weight is not None):
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dense_ffn(x, torch.ones(1, requires_grad=True), maps, "silu")
    assert sum(kept.values()) == 64 * (D + 2 * WIDTH) + 1


def test_a_second_derivative_is_refused():
    maps = make_maps()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    y = dense_ffn(x, torch.ones(1, dtype=torch.float64), maps, "silu")
    with pytest.raises(MoEAdapterError, match="eager"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def gated_ffn(forward) -> nn.Module:
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
            self.down_proj, self.act_fn = nn.Linear(12, 8), nn.SiLU()

    Gated.forward = forward
    return Gated()


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), True),
        (lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))), True),
        (
            lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)),
            True,
        ),  # by deed, not by name
        (lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2, False),
        (lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=3) * self.up_proj(x)), False),
        (lambda self, x: self.down_proj(self.gate_proj(x) * self.up_proj(x)), False),
        (lambda self, x, y=None: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), False),
        (lambda self, x: self.up_proj(x) if x.sum() > 0 else x, False),
    ],
)
def test_only_the_formula_itself_is_recognised(forward, expected):
    module = gated_ffn(forward)
    assert computes_ffn(module, describe(module)) is expected


@pytest.mark.parametrize(("p", "expected"), [(0.0, True), (0.1, False)])
def test_a_sequential_is_recognised_unless_it_drops(p, expected):
    module = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(p), nn.Linear(12, 8))
    assert computes_ffn(module, describe(module)) is expected


@pytest.mark.parametrize("family", ["qwen2_vl", "gpt_neox", "gemma2"])
def test_transformers_own_are_recognised(family):
    model = inject_dual_path_moe(zoo.build(family), expert_dim=8, shared_expert_dim=8)
    for layer in dual_path_layers(model).values():
        assert layer._static_maps() is not None


CHANGES = {
    "a forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a hook on a map": lambda m: m.up_proj.register_forward_pre_hook(lambda *_: None),
    "its own forward": lambda m: setattr(m.down_proj, "forward", m.down_proj.forward),
    "another kind of map": lambda m: setattr(m, "gate_proj", type("Mine", (nn.Linear,), {})(32, 48, bias=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_does_more_is_called(change):
    model = inject_dual_path_moe(zoo.build("qwen2"), expert_dim=8, shared_expert_dim=8)
    layer = next(iter(dual_path_layers(model).values()))
    assert layer._static_maps() is not None
    CHANGES[change](layer.static_expert)
    assert layer._static_maps() is None


def test_a_hook_on_the_static_expert_is_still_heard():
    model = inject_dual_path_moe(zoo.build("qwen2"), expert_dim=8, shared_expert_dim=8)
    seen = []
    next(iter(dual_path_layers(model).values())).static_expert.register_forward_hook(lambda *_: seen.append(1))
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert seen == [1]
