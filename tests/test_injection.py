"""What an injection puts back, and when: the base's values, LoRAs and flags, in every dtype and order."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import zoo
from reference import perturb
from torch import nn

from moe_adapter import (
    MoEAdapterError,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
    set_stage,
    static_only,
)

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
LORA = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def injected(model: nn.Module | None = None) -> nn.Module:
    return perturb(inject_dual_path_moe(model or zoo.build("qwen2"), **SIZES))


def with_lora(model: nn.Module, name: str = "default", **lora) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **lora}), adapter_name=name)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.fixture
def norm_folder(tmp_path):
    """An adapter that brings a trained norm."""
    model = injected()
    model.model.norm.weight.requires_grad_(True)
    nn.init.constant_(model.model.norm.weight, 1.5)
    save_adapter(model, tmp_path / "norm")
    return tmp_path / "norm"


def test_ejecting_switches_off_a_lora_that_came_after_the_injection(tmp_path):
    base = logits(zoo.build("qwen2"))
    model = with_lora(injected())
    set_stage(model, 2)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(eject_dual_path_moe(model)), base)
    loaded = load_adapter(zoo.build("qwen2"), tmp_path)
    assert torch.equal(logits(eject_dual_path_moe(loaded)), base)
    assert not any(flag for name, flag in flags(loaded).items() if "lora_" in name)
    again = load_adapter(loaded, tmp_path)
    assert torch.equal(logits(again), logits(load_adapter(zoo.build("qwen2"), tmp_path)))


def test_ejecting_a_bare_base_switches_its_lora_off_too():
    model = with_lora(injected())
    eject_dual_path_moe(model.get_base_model())
    assert torch.equal(logits(model), logits(zoo.build("qwen2")))


def test_ejecting_switches_a_lora_of_before_back_on(tmp_path):
    save_adapter(injected(), tmp_path)
    model = with_lora(zoo.build("qwen2"), "mine")
    before, own = flags(model), logits(model)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(load_adapter(zoo.build("qwen2"), tmp_path)))
    eject_dual_path_moe(model)
    assert torch.equal(logits(model), own) and flags(model) == before and model.active_adapters == ["mine"]


@pytest.mark.parametrize("order", ["loaded first", "cast first"])
def test_base_values_follow_the_dtype(norm_folder, order):
    base = logits(zoo.build("qwen2").bfloat16())
    model = zoo.build("qwen2")
    model = load_adapter(model, norm_folder).bfloat16() if order == "loaded first" else model.bfloat16()
    model = load_adapter(model, norm_folder)
    trained = logits(model)
    with static_only(model):
        assert model.model.norm.weight.dtype == torch.bfloat16 and torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)
    eject_dual_path_moe(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and torch.equal(logits(model), base)


def test_base_values_follow_to_another_device(norm_folder):
    model = load_adapter(zoo.build("qwen2"), norm_folder).to("meta")
    with static_only(model):
        assert model.model.norm.weight.is_meta
    eject_dual_path_moe(model)
    assert not dual_path_layers(model) and all(p.is_meta for p in model.parameters())


@pytest.mark.gpu
def test_base_values_follow_to_a_gpu(norm_folder):
    model = load_adapter(zoo.build("qwen2"), norm_folder).to("cuda")
    with static_only(model):
        assert model.model.norm.weight.is_cuda and model.model.norm.weight.eq(1).all()
    eject_dual_path_moe(model)
    assert all(p.is_cuda for p in model.parameters()) and model.model.norm.weight.eq(1).all()


def test_nested_static_only_is_the_base_at_every_depth(norm_folder):
    base = logits(zoo.build("qwen2"))
    model = load_adapter(zoo.build("qwen2"), norm_folder)
    trained = logits(model)
    with static_only(model):
        with static_only(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)


def test_a_base_parameter_trained_here_is_told_of_as_no_copy_is_kept():
    model = injected()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with static_only(model):
            pass
    model.model.norm.weight.requires_grad_(True)
    told = r"model\.norm\.weight \(1 such\) is a base parameter made trainable here.*stays.*load_adapter onto a fresh"
    with pytest.warns(UserWarning, match=told), static_only(model):
        pass
    with pytest.warns(UserWarning, match=told):
        eject_dual_path_moe(model)


@pytest.mark.parametrize("part", ["mlp", "router", "experts", "shared_expert"])
def test_copies_of_dual_path_parts_are_refused_and_undone_by_peft(part, tmp_path):
    model = injected()
    answer = logits(model)
    wrapped = with_lora(model, target_modules=["q_proj"], modules_to_save=[part])
    before = flags(wrapped)
    for attempt in (lambda: set_stage(wrapped, 2), lambda: save_adapter(wrapped, tmp_path / "new")):
        with pytest.raises(MoEAdapterError, match=r"mlp.*modules_to_save holds a copy.*Take .* out of modules_to_save"):
            attempt()
    assert flags(wrapped) == before and not (tmp_path / "new").exists()
    model = wrapped.unload()
    set_stage(model, 1)
    assert torch.equal(logits(model), answer)


def test_copies_of_other_parts_are_peft_s_own_and_travel(tmp_path):
    model = with_lora(injected(), modules_to_save=["lm_head"])
    set_stage(model, 2)
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(zoo.build("qwen2"), tmp_path)), logits(model))


def test_injections_in_two_parts_of_a_model_are_refused_together(tmp_path):
    model = zoo.build("qwen2_vl")
    inject_dual_path_moe(model.model.visual, r"blocks\.\d+\.mlp", **SIZES)
    inject_dual_path_moe(model.model.language_model, **SIZES)
    parts = r"2 parts of the model were injected on their own \(model\.visual, model\.language_model\), expected one"
    for attempt in (
        lambda: save_adapter(model, tmp_path / "new"),
        lambda: eject_dual_path_moe(model),
        lambda: set_stage(model, 1),
    ):
        with pytest.raises(MoEAdapterError, match=f"{parts} injection: eject each part, then inject the whole"):
            attempt()
    eject_dual_path_moe(model.model.visual)
    eject_dual_path_moe(model)
    assert not dual_path_layers(model)


def test_new_weights_start_at_the_initializer_range_of_the_config_that_governs_them():
    model = zoo.build("qwen2_vl")
    model.config.text_config.initializer_range = 0.5
    assert getattr(model.config, "initializer_range", None) is None
    layer = next(iter(dual_path_layers(inject_dual_path_moe(model, **SIZES)).values()))
    assert 0.4 < layer.experts.gate_up_proj.std() < 0.6


def test_base_values_that_are_offloaded_cannot_be_given_back(norm_folder):
    accelerate = pytest.importorskip("accelerate")
    model = load_adapter(zoo.build("qwen2"), norm_folder)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    answer = logits(model)
    for attempt in (lambda: eject_dual_path_moe(model), lambda: static_only(model).__enter__()):
        with pytest.raises(
            MoEAdapterError, match=r"norm\.weight came with the adapter and is offloaded.*Load the base"
        ):
            attempt()
    assert torch.equal(logits(model), answer) and len(dual_path_layers(model)) == 2
