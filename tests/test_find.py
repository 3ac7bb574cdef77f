"""What a target means, and what it says when it means nothing."""

from __future__ import annotations

import re

import pytest
import torch
import zoo
from torch import nn

from moe_adapter import MoEAdapterError, dual_path_layers, eject_dual_path_moe, inject_dual_path_moe, plan_injection

SIZES = dict(expert_dim=8, shared_expert_dim=8)
LANGUAGE = [f"model.language_model.layers.{i}.mlp" for i in range(2)]
VISION = [f"model.visual.blocks.{i}.mlp" for i in range(2)]

TARGETS = {
    "mlp": ("mlp", LANGUAGE),
    "list with mlp": (["mlp"], LANGUAGE),
    "suffix": ("blocks.0.mlp", VISION[:1]),
    "full name": (LANGUAGE[1], LANGUAGE[1:]),
    "list": (["layers.0.mlp", "blocks.1.mlp"], [VISION[1], LANGUAGE[0]]),
    "regex": (r"visual\.blocks\.\d+\.mlp", VISION),
    "compiled regex": (re.compile(r"model\.visual\.blocks.*mlp"), VISION),
    "flags in the regex": (r"(?i)VISUAL\.blocks\.\d+\.MLP", VISION),
    "flags in a compiled regex": (re.compile(r"(?ix) visual \. BLOCKS .* mlp"), VISION),
    "flags of a compiled regex": (re.compile(r"Visual\.BLOCKS\.0\.mlp", re.IGNORECASE), VISION[:1]),
    "anchored regex": (r"^model\.visual\.blocks.*\.mlp$", VISION),
    "regex over both": (r"(visual\.blocks|layers)\.\d+\.mlp", VISION + LANGUAGE),
    "whole blocks": (r"language_model\.layers\.\d+", LANGUAGE),
    "callable": (lambda name, module: type(module).__name__ == "VisionMlp", VISION),
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target):
    target, names = TARGETS[target]
    model = zoo.build("qwen2_vl")
    assert sorted(row.name for row in plan_injection(model, target, **SIZES).rows) == sorted(names)


def test_injected_vision_blocks_keep_the_answer_and_learn():
    model = zoo.build("qwen2_vl")
    ids = torch.tensor([[5, 122, *[120] * 4, 123, 7, 8]])
    inputs = dict(
        input_ids=ids,
        pixel_values=torch.randn(16, 3 * 2 * 14 * 14),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == 120).long(),
    )
    base = model(**inputs).logits
    inject_dual_path_moe(model, r"visual\.blocks\.\d+\.mlp", **SIZES)
    assert torch.equal(model(**inputs).logits, base)
    model.train()(**inputs, labels=ids).loss.backward()
    for layer in dual_path_layers(model).values():
        assert layer.routing.calls[0].index_TK.shape == (16, 2)
        assert layer.experts.down_proj.grad.abs().max() > 0


def test_layers_choose_blocks_by_index():
    model = zoo.build("qwen2")
    assert [row.name for row in plan_injection(model, layers=[1], **SIZES).rows] == ["model.layers.1.mlp"]
    with pytest.raises(MoEAdapterError, match=r"2 blocks; \[5\]"):
        plan_injection(model, layers=[0, 5], **SIZES)


def test_a_module_shared_between_blocks_is_swapped_once_in_every_parent():
    model = zoo.build("qwen2")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    ids = torch.tensor([[3, 4, 5]])
    base = model(input_ids=ids).logits
    inject_dual_path_moe(model, **SIZES)
    assert model.model.layers[0].mlp is model.model.layers[1].mlp
    assert len(dual_path_layers(model)) == 1
    assert torch.equal(model(input_ids=ids).logits, base)
    assert len(model.model.layers[0].mlp.routing.calls) == 2
    eject_dual_path_moe(model)
    assert model.model.layers[0].mlp is model.model.layers[1].mlp
    assert torch.equal(model(input_ids=ids).logits, base)


MISUSES = {
    "nothing matches": ("mlpp", "nearest names are .*mlp"),
    "regex matches nothing": (r"layers\.\d+\.ffn", "matches no module"),
    "callable matches nothing": (lambda name, module: False, "matches no module"),
    "not an FFN": ("self_attn", "is no feed-forward block: it holds 4 linear maps"),
    "one linear map": ("lm_head", "is no feed-forward block: it holds 0 linear maps"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_wrong_target_says_so_and_changes_nothing(misuse):
    target, message = MISUSES[misuse]
    model = zoo.build("qwen2")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(MoEAdapterError, match=message):
        inject_dual_path_moe(model, target, **SIZES)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(MoEAdapterError, match="no feed-forward block found"):
        inject_dual_path_moe(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_double_injection_is_refused():
    model = inject_dual_path_moe(zoo.build("qwen2"), **SIZES)
    with pytest.raises(MoEAdapterError, match="eject_dual_path_moe"):
        inject_dual_path_moe(model, **SIZES)


def test_eject_without_injection_is_refused():
    with pytest.raises(MoEAdapterError, match="no dual-path layers"):
        eject_dual_path_moe(zoo.build("qwen2"))


def test_a_compiled_or_parallel_model_is_refused():
    model = zoo.build("qwen2")
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(MoEAdapterError, match="inject before wrapping"):
            inject_dual_path_moe(wrapped, **SIZES)
