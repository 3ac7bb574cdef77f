"""Models without transformers: torch's own encoder, timm's ViT, and a module that somebody wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
from reference import ReferenceLayer, perturb
from torch import nn

from moe_adapter import (
    balance_loss,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
)

SIZES = dict(num_experts=4, top_k=2, expert_dim=12, shared_expert_dim=16)


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.ff = nn.LayerNorm(16), nn.Linear(16, 16), Feed()

    def forward(self, x):
        x = x + self.mix(x.mean(1, keepdim=True))
        return x + self.ff(self.norm(x))


def encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 40, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2)


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    target: Callable[[str, nn.Module], bool]
    shape: tuple[int, ...]  # of an input
    exact: bool  # whether injection leaves the very kernels that ran before


CASES = {
    "torch": Case(encoder, lambda name, module: isinstance(module, nn.TransformerEncoderLayer), (2, 6, 16), False),
    "torch, pre-norm": Case(
        lambda: encoder(norm_first=True, activation="gelu"),
        lambda name, module: name.endswith("linear2"),
        (2, 6, 16),
        False,
    ),
    "timm": Case(
        lambda: timm.create_model("test_vit", num_classes=5),
        lambda name, module: type(module).__name__ == "Mlp",
        (2, 3, 160, 160),
        True,
    ),
    "one's own": Case(
        lambda: nn.Sequential(Block(), Block()), lambda name, module: isinstance(module, Feed), (2, 6, 16), True
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def build(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = case.build().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, torch.randn(case.shape, dtype=dtype)


@every_case
@torch.no_grad()
def test_step_zero_and_eject(case):
    model, x = build(case)
    base, modules = model(x), {key: id(module) for key, module in model.named_modules()}
    inject_dual_path_moe(model, case.target, **SIZES)
    assert len(dual_path_layers(model)) >= 2
    if case.exact:
        assert torch.equal(model(x), base)
    torch.testing.assert_close(model(x), base)  # torch's encoder has left its fused kernel
    eject_dual_path_moe(model)
    assert torch.equal(model(x), base)
    assert {key: id(module) for key, module in model.named_modules()} == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_case
def test_only_new_parameters_train_by_the_right_gradients(case):
    model, x = build(case, torch.float64)
    perturb(inject_dual_path_moe(model.train(), case.target, **SIZES))
    new = {id(p) for layer in dual_path_layers(model).values() for p in layer.new_parameters().values()}

    def loss() -> torch.Tensor:
        return model(x).square().mean() + balance_loss(model)

    loss().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (id(parameter) in new), key
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, key
            _check_by_difference(loss, parameter)


@torch.no_grad()
def _check_by_difference(loss: Callable[[], torch.Tensor], parameter: nn.Parameter, step: float = 1e-6) -> None:
    """The gradient along a random direction, against the loss on either side."""
    direction = torch.randn_like(parameter) * step
    parameter.add_(direction)
    above = loss()
    parameter.sub_(2 * direction)
    difference = above - loss()
    parameter.add_(direction)
    torch.testing.assert_close(difference, 2 * (parameter.grad * direction).sum(), rtol=1e-4, atol=1e-13)


@torch.no_grad()
def test_ones_own_module_computes_equation_3():
    model, x = build(CASES["one's own"], torch.float64)
    perturb(inject_dual_path_moe(model, CASES["one's own"].target, **SIZES))
    found = model(x)
    for block in model:
        block.ff = ReferenceLayer(block.ff)
    torch.testing.assert_close(found, model(x))


@every_case
@torch.no_grad()
def test_adapter_round_trip(case, tmp_path):
    model, x = build(case)
    perturb(inject_dual_path_moe(model, case.target, **SIZES))
    save_adapter(model, tmp_path)
    fresh, _ = build(case)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


@pytest.mark.parametrize("layers", [None, [0], [1]])
@pytest.mark.parametrize("options", [{}, dict(activation="gelu")], ids=str)
@torch.no_grad()
def test_torchs_encoder_in_evaluation_with_padding(options, layers):
    """By default it makes nested tensors of padded input and runs a fused kernel, past any layer put into it."""
    torch.manual_seed(0)
    model, x = encoder(**options).eval(), torch.randn(2, 6, 16)
    base = model(x, src_key_padding_mask=PADDING)
    inject_dual_path_moe(model, layers=layers, **SIZES)
    found = model(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(found[~PADDING], base[~PADDING])
    perturb(model)
    assert (model(x, src_key_padding_mask=PADDING) - found)[~PADDING].abs().max() > 1e-3
    eject_dual_path_moe(model)
    assert torch.equal(model(x, src_key_padding_mask=PADDING), base)


def test_a_split_layer_shows_its_own_maps_weight_and_a_whole_one_none():
    model = inject_dual_path_moe(encoder(), **SIZES)
    layer = model.layers[0].linear2
    assert layer.weight.data_ptr() == layer.static_expert.weight.data_ptr()
    assert layer.bias is layer.static_expert.bias
    assert torch.overrides.has_torch_function((layer.weight,))
    whole = inject_dual_path_moe(nn.Sequential(Block()), r"0\.ff", **SIZES)[0].ff
    assert not hasattr(whole, "weight") and not hasattr(whole, "bias")


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_padding_of_torchs_encoder_does_not_count(batch_first):
    layer = nn.TransformerEncoderLayer(16, 4, 40, batch_first=batch_first)
    model = inject_dual_path_moe(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), **SIZES)
    x = torch.randn(2, 6, 16)
    model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=PADDING)
    keep = ~PADDING if batch_first else ~PADDING.T
    for layer in dual_path_layers(model).values():
        assert torch.equal(layer.routing.calls[0].mask_T, keep.reshape(-1))
