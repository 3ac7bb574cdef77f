"""The two stages, with the real peft: what trains, what stays, and that the order can be repaired."""

from __future__ import annotations

import peft
import pytest
import torch
import zoo

from moe_adapter import (
    MoEAdapterError,
    dual_path_layers,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
    set_stage,
    static_only,
)

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
LORA = (
    r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))|model\.visual\.merger\.mlp\.(0|2)"
    r"|model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


def with_lora(model: torch.nn.Module) -> peft.PeftModel:
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=LORA)
    return peft.get_peft_model(model, config)


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_stage_1_trains_the_moe_blocks_alone():
    model = inject_dual_path_moe(zoo.build("qwen2_vl"), **SIZES)
    counts = set_stage(model, 1)
    new = sum(p.numel() for layer in dual_path_layers(model).values() for p in layer.new_parameters().values())
    assert counts == dict(trainable=new, total=sum(p.numel() for p in model.parameters()))
    assert not any("static_expert" in name for name in trainable(model))


def test_stage_2_trains_moe_and_lora_after_peft_froze_the_moe():
    model = with_lora(inject_dual_path_moe(zoo.build("qwen2_vl"), **SIZES))
    assert not any("experts" in name for name in trainable(model))
    set_stage(model, 2)
    names = trainable(model)
    layers = [f"base_model.model.{name}" for name in dual_path_layers(model.get_base_model())]
    assert {name for name in names if "lora_" not in name} == {
        f"{prefix}.{name}"
        for prefix, layer in zip(layers, dual_path_layers(model).values(), strict=True)
        for name in layer.new_parameters()
    }
    lora = [name for name in names if "lora_" in name]
    assert len(lora) == 2 * (2 * 4 + 2 + 2 * 4)  # A and B for vision blocks, merger, attention
    set_stage(model, 1)
    assert not any("lora_" in name for name in trainable(model))


def test_injection_into_a_peft_model_works_on_its_base():
    model = with_lora(zoo.build("qwen2_vl"))
    assert inject_dual_path_moe(model, **SIZES) is model
    set_stage(model, 2)
    assert any("lora_" in name for name in trainable(model)) and any("router" in name for name in trainable(model))
    model.train()
    assert model(input_ids=IDS, labels=IDS).loss.requires_grad


def train_a_little(model: torch.nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_static_only_is_the_base_after_stage_2_and_restores_everything():
    base = logits(zoo.build("qwen2_vl"))
    model = with_lora(inject_dual_path_moe(zoo.build("qwen2_vl"), **SIZES))
    set_stage(model, 2)
    train_a_little(model)
    trained, names = logits(model), trainable(model)
    assert not torch.equal(trained, base)
    with static_only(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained) and trainable(model) == names


def test_a_lora_is_saved_beside_the_moe_and_loaded_with_it(tmp_path):
    model = with_lora(inject_dual_path_moe(zoo.build("qwen2_vl"), **SIZES))
    set_stage(model, 2)
    train_a_little(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(zoo.build("qwen2_vl"), tmp_path).eval()
    assert isinstance(loaded, peft.PeftModel)
    assert torch.equal(logits(loaded), logits(model))
    assert trainable(loaded) == trainable(model)
    folder = next(tmp_path.glob("lora-*"))
    assert peft.PeftConfig.from_pretrained(folder).r == 8


COMMON = {
    "FFN names": dict(target_modules=["q_proj", "up_proj", "down_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "DoRA": dict(target_modules=["q_proj", "up_proj"], use_dora=True),
}


@pytest.mark.parametrize("order", ["inject first", "LoRA first"])
@pytest.mark.parametrize("lora", COMMON)
def test_a_lora_on_parts_of_the_layers_is_no_part_of_them_and_travels(lora, order, tmp_path):
    config = peft.LoraConfig(r=4, init_lora_weights=False, **COMMON[lora])
    model = zoo.build("qwen2")
    if order == "inject first":
        plain = set(next(iter(dual_path_layers(inject_dual_path_moe(model, **SIZES)).values())).new_parameters())
        model = peft.get_peft_model(model, config)
        layer = next(iter(dual_path_layers(model).values()))
        assert set(layer.new_parameters()) == plain
        assert any("shared_expert" in name and "lora_" in name for name, _ in layer.named_parameters())
    else:
        inject_dual_path_moe(peft.get_peft_model(model, config), **SIZES)
        model = peft.get_peft_model(zoo.build("qwen2"), config)
        inject_dual_path_moe(model, **SIZES)
    set_stage(model, 1)
    assert not any("lora_" in name for name in trainable(model))
    set_stage(model, 2)
    train_a_little(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(zoo.build("qwen2"), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert trainable(loaded) == trainable(model)
    save_adapter(loaded, tmp_path / "again")
    again = load_adapter(zoo.build("qwen2"), tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_lora_model_without_its_peft_wrapper_is_refused(tmp_path):
    model = with_lora(inject_dual_path_moe(zoo.build("qwen2_vl"), **SIZES))
    with pytest.raises(MoEAdapterError, match="pass the PeftModel"):
        save_adapter(model.get_base_model(), tmp_path)


@pytest.mark.parametrize("stage", [0, 3, "1"])
def test_another_stage_is_refused(stage):
    model = inject_dual_path_moe(zoo.build("qwen2"), **SIZES)
    with pytest.raises(MoEAdapterError, match="expected 1"):
        set_stage(model, stage)


def test_a_dense_model_has_no_stages():
    with pytest.raises(MoEAdapterError, match="inject_dual_path_moe"):
        set_stage(zoo.build("qwen2"), 1)
