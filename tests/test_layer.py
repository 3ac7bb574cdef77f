"""Equations (3) and (4): a dual-path layer against the float64 reference, outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from reference import ReferenceLayer, perturb
from torch import nn

from moe_adapter import dual_path_layers, inject_dual_path_moe

VARIANTS = {
    "default": {},
    "top-1": dict(top_k=1, router_softmax="all"),
    "top-all": dict(top_k=4),
    "softmax over all": dict(router_softmax="all"),
    "literal equation": dict(preserve_base=False),
    "alpha 0.9": dict(alpha_init=0.9),
    "no shared expert": dict(shared_expert_dim=0),
    "no routed experts": dict(num_experts=0),
    "token mixing": dict(mixing="token", router_softmax="all"),
    "odd sizes": dict(num_experts=3, expert_dim=7, shared_expert_dim=5),
    "many experts": dict(num_experts=32, top_k=5, expert_dim=4),
}


def make_layer(name: str, **config) -> nn.Module:
    sizes = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
    model = perturb(inject_dual_path_moe(zoo.build(name), **{**sizes, **config}))
    return next(iter(dual_path_layers(model).values()))


@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (23,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "phi3", "bloom"])
def test_outputs_and_gradients_equal_the_reference(name, variant, dtype, shape):
    layer = make_layer(name, **VARIANTS[variant]).to(dtype)
    twin = ReferenceLayer(layer)
    x = torch.randn(*shape, 32, dtype=torch.float64)
    rest = () if layer.ffn.residual is None else (torch.randn_like(x),)
    inputs, doubles = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
    y = layer(inputs, *(r.to(dtype) for r in rest))
    expected = twin(doubles, *(r.to(dtype).double() for r in rest))
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(y.double(), expected, **tolerance)
    (y * y).sum().backward()
    (expected * expected).sum().backward()
    scale = max(1.0, float(doubles.grad.abs().max()))
    torch.testing.assert_close(inputs.grad.double(), doubles.grad, rtol=1e-3, atol=tolerance["atol"] * scale)
    for key, parameter in layer.new_parameters().items():
        reference = twin[key].grad
        error = (parameter.grad.double() - reference).norm() / reference.norm().clamp(min=1e-12)
        single = 1e-3 if parameter.numel() == 1 else 1e-4  # a scalar's gradient is a sum whose terms cancel
        assert error < (single if dtype == torch.float32 else 1e-9), key


def test_the_static_expert_is_the_hosts_own_module():
    model = zoo.build("qwen2")
    mlps = [block.mlp for block in model.model.layers]
    inject_dual_path_moe(model, expert_dim=8, shared_expert_dim=8)
    assert [layer.static_expert for layer in dual_path_layers(model).values()] == mlps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scalars_and_router_stay_float32_and_the_rest_follows(dtype):
    layer = make_layer("qwen2").to(dtype)
    wide = {"alpha_logit", "lam_logit", "router.weight"}
    for name, parameter in layer.new_parameters().items():
        assert parameter.dtype == (torch.float32 if name in wide else dtype), name
    assert layer.alpha_logit.shape == layer.lam_logit.shape == (1,)
    before = layer.router.weight.clone()
    assert torch.equal(layer.half().bfloat16().router.weight, before)


def test_a_small_step_of_alpha_reaches_a_bfloat16_forward():
    """In bfloat16 a step of 2e-5 from 0.9 would be lost; the layer folds α in float32."""
    layer = make_layer("qwen2", alpha_init=0.9).bfloat16()
    with torch.no_grad():
        layer.alpha_logit.fill_(2.1972)
        before = layer.alpha.item()
        layer.alpha_logit.add_(2e-5)
    assert layer.alpha.item() != before
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    shares = layer._factors(x)
    assert all(share.dtype == torch.float32 for share in shares)


def test_top_k_is_that_of_float32_logits_in_bfloat16():
    """Logits that differ by less than bfloat16 resolves still order the experts."""
    layer = make_layer("qwen2").bfloat16()
    with torch.no_grad():
        layer.router.weight.copy_(1.0 + 1e-4 * torch.arange(4.0)[:, None].expand(4, 32))
    _, _, index_TK = layer.router(torch.ones(3, 32, dtype=torch.bfloat16))
    assert index_TK.tolist() == [[3, 2]] * 3


def test_autocast_keeps_the_router_in_float32():
    layer = make_layer("qwen2")
    x = torch.randn(6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE, weights_TK, _ = layer.router(x)
        y = layer(x)
    assert logits_TE.dtype == weights_TK.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("training", [True, False])
def test_new_parts_follow_device_dtype_and_mode_of_the_host(training):
    model = zoo.build("qwen2").to(torch.bfloat16).train(training)
    inject_dual_path_moe(model, expert_dim=8, shared_expert_dim=8)
    for layer in dual_path_layers(model).values():
        assert all(part.training == training for part in layer.modules())
        assert layer.experts.down_proj.dtype == layer.shared_expert.up_proj.weight.dtype == torch.bfloat16


class TupleFFN(nn.Module):
    """A user's FFN that takes two arguments and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)

    def forward(self, x, scale=1.0):
        y = self.fc2(self.act(self.fc1(x)))
        return y * scale, y.mean()


def test_a_users_own_module_with_a_tuple_output_and_two_arguments():
    net = nn.ModuleDict({"ffn": TupleFFN()})
    x = torch.randn(2, 3, 8)
    expected = net["ffn"](x, scale=2.0)
    inject_dual_path_moe(net, target="ffn", expert_dim=4, shared_expert_dim=4)
    found = net["ffn"](x, scale=2.0)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_experts_are_zero_at_step_zero_only_in_their_output_projections():
    layer = copy.deepcopy(dual_path_layers(inject_dual_path_moe(zoo.build("phi"), expert_dim=8, shared_expert_dim=8)))
    for part in layer.values():
        zeros = {name for name, p in part.new_parameters().items() if not p.any()}
        assert zeros == {
            *("experts.down_proj", "experts.up_proj_bias", "experts.down_proj_bias"),
            *("shared_expert.up_proj.bias", "shared_expert.down_proj.weight", "shared_expert.down_proj.bias"),
            *("alpha_logit", "lam_logit"),
        }
