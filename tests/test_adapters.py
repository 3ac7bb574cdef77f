"""Named adapters on one base: exact and cheap to switch, with their LoRAs, dtypes, devices and trained norms."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import zoo
from reference import perturb
from torch import nn

from moe_adapter import (
    MoEAdapterError,
    balance_loss,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
    set_stage,
    static_only,
)
from moe_adapter.adapters import (
    active_adapter,
    adapter_names,
    add_adapter,
    delete_adapter,
    set_adapter,
)

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
LORA = dict(r=4, lora_alpha=8, target_modules=r".*self_attn\.(q|v)_proj", init_lora_weights=False)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(seed: int, lora: dict | None = None, norm: float | None = None, **config) -> nn.Module:
    """A model with an adapter that differs from others by its seed, its config, a LoRA, or a trained base norm."""
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), **{**SIZES, **config}), seed=seed)
    if norm is not None:
        model.model.norm.weight.requires_grad_(True)
        nn.init.constant_(model.model.norm.weight, norm)
    if lora is not None:
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **lora}))
        set_stage(model, 2)
    return model


KINDS = {
    "plain": {},
    "other sizes": dict(num_experts=3, top_k=1, router_softmax="all", layers=(1,)),
    "token mixing": dict(mixing="token", shared_expert_dim=0),
    "with a LoRA": dict(lora={}),
    "with a larger LoRA": dict(lora=dict(r=8, target_modules=r".*self_attn\.(k|v)_proj")),
    "with a trained norm": dict(norm=1.5),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of adapters by kind, and what a base with that adapter alone answers."""
    folder, answers = tmp_path_factory.mktemp("adapters"), {}
    for seed, (kind, options) in enumerate(KINDS.items()):
        save_adapter(trained(seed, **options), folder / kind)
        answers[kind] = logits(load_adapter(zoo.build("qwen2"), folder / kind))
    return folder, answers


@pytest.fixture
def crowd(saved):
    """One base with all of them."""
    folder, answers = saved
    model = zoo.build("qwen2")
    for kind in KINDS:
        model = add_adapter(model, folder / kind, kind)
        assert active_adapter(model) == kind
    return model, answers


def test_switching_answers_as_each_adapter_loaded_alone_and_none_as_the_base(crowd):
    model, answers = crowd
    assert adapter_names(model) == list(KINDS)
    for kind in [*KINDS, *reversed(KINDS), None, "with a LoRA", None, "with a trained norm", "plain"]:
        set_adapter(model, kind)
        assert active_adapter(model) == kind
        expected = logits(zoo.build("qwen2")) if kind is None else answers[kind]
        assert torch.equal(logits(model), expected), kind


def test_an_adapter_trains_as_if_it_alone_had_been_loaded(crowd, saved):
    model, _ = crowd
    for kind in KINDS:
        set_adapter(model, kind)
        alone = load_adapter(zoo.build("qwen2"), saved[0] / kind)
        names = {name.replace("base_model.model.", "").replace(f".{kind}.", ".default.") for name in trainable(model)}
        assert {n.replace(".base_layer", "") for n in names} == {
            n.replace("base_model.model.", "").replace(".base_layer", "") for n in trainable(alone)
        }
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert torch.isfinite(balance_loss(model))
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.zero_grad()


def test_switching_moves_no_weight_and_leaves_no_hook(crowd):
    model, _ = crowd
    owner = model.get_base_model()
    set_adapter(model, "plain")
    layers = dual_path_layers(owner)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in owner.modules())
    set_adapter(model, None)
    assert not dual_path_layers(owner)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in owner.modules())
    set_adapter(model, "plain")
    again = dual_path_layers(owner)
    assert {name: id(layer) for name, layer in again.items()} == {name: id(layer) for name, layer in layers.items()}
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in owner.modules()) == hooks


def test_what_one_adapter_learns_stays_its_own(crowd):
    model, answers = crowd
    set_adapter(model, "plain")
    perturb(model, seed=99)
    learnt = logits(model)
    set_adapter(model, "other sizes")
    assert torch.equal(logits(model), answers["other sizes"])
    set_adapter(model, "plain")
    assert torch.equal(logits(model), learnt) and not torch.equal(learnt, answers["plain"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_active_adapter_is_saved_as_if_it_were_alone(crowd, saved, kind, tmp_path):
    model, answers = crowd
    set_adapter(model, kind)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(zoo.build("qwen2"), tmp_path)), answers[kind])
    old, new = (json.loads((folder / "moe_adapter.json").read_text()) for folder in (saved[0] / kind, tmp_path))
    assert old["weights"] == new["weights"] and old["layers"] == new["layers"]
    assert (old["lora"] is None) == (new["lora"] is None)


def test_deleting_adapters_ends_at_the_plain_base(crowd):
    model, answers = crowd
    base = logits(zoo.build("qwen2"))
    for kind in KINDS:
        set_adapter(model, kind)
        assert torch.equal(logits(model), answers[kind]) and not torch.equal(answers[kind], base)
        model = delete_adapter(model, kind)
        assert kind not in adapter_names(model) and active_adapter(model) is None
        assert torch.equal(logits(model), base), kind
        assert not any("lora_" in name for name in trainable(model)), kind
    assert type(model) is type(zoo.build("qwen2")) and not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(MoEAdapterError, match="no adapter 'plain'"):
        set_adapter(model, "plain")


def test_static_only_and_eject_give_the_base_with_any_adapter_active(crowd):
    model, _ = crowd
    base = logits(zoo.build("qwen2"))
    for kind in KINDS:
        set_adapter(model, kind)
        answer = logits(model)
        with static_only(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), answer)
    set_adapter(model, "with a trained norm")
    assert torch.equal(logits(eject_dual_path_moe(model)), base)
    assert adapter_names(model) == []


def test_an_adapter_put_in_without_a_name_is_called_default(saved):
    folder, answers = saved
    model = trained(50, lora={})
    unnamed = logits(model)
    model = add_adapter(model, folder / "plain", "hospital")
    assert adapter_names(model) == ["default", "hospital"]
    assert torch.equal(logits(model), answers["plain"])
    set_adapter(model, "default")
    assert torch.equal(logits(model), unnamed)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adapters_follow_the_base_to_another_device_and_mode(saved, device):
    model = add_adapter(add_adapter(zoo.build("qwen2"), saved[0] / "plain", "a"), saved[0] / "other sizes", "b")
    model.to(device).train()
    set_adapter(model, "a")
    assert {p.device.type for p in model.parameters()} == {device}
    assert all(module.training for module in model.modules())


def test_adapters_follow_the_base_to_another_dtype(saved):
    model = add_adapter(add_adapter(zoo.build("qwen2"), saved[0] / "plain", "a"), saved[0] / "other sizes", "b")
    model.bfloat16()
    set_adapter(model, "a")
    alone = load_adapter(zoo.build("qwen2"), saved[0] / "plain").bfloat16()
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in alone.named_parameters()}
    assert torch.equal(logits(model), logits(alone))


@pytest.mark.parametrize("deleting", [False, True], ids=["switching", "deleting"])
def test_a_lora_of_the_model_s_own_is_off_beside_an_adapter_and_back_without(saved, deleting):
    folder, answers = saved
    model = peft.get_peft_model(zoo.build("qwen2"), peft.LoraConfig(**LORA), adapter_name="mine")
    own, flags = logits(model), trainable(model)
    for kind in ("with a LoRA", "plain"):
        model = add_adapter(model, folder / kind, kind)
        assert torch.equal(logits(model), answers[kind])
        model = delete_adapter(model, kind) if deleting else model
        set_adapter(model, None)
        assert torch.equal(logits(model), own) and trainable(model) == flags and model.active_adapters == ["mine"]
    if not deleting:
        set_adapter(model, "with a LoRA")
        assert torch.equal(logits(eject_dual_path_moe(model)), own)


def test_an_adapter_without_a_lora_answers_without_one_when_loaded_over_one_with(saved):
    folder, answers = saved
    model = load_adapter(load_adapter(zoo.build("qwen2"), folder / "with a LoRA"), folder / "plain")
    assert torch.equal(logits(model), answers["plain"]) and not any("lora_" in name for name in trainable(model))
    assert torch.equal(logits(load_adapter(model, folder / "with a LoRA")), answers["with a LoRA"])


def test_loading_over_the_active_adapter_leaves_the_loras_of_others_alone(saved, tmp_path):
    folder, answers = saved
    save_adapter(trained(70, lora={}), tmp_path)
    other = logits(load_adapter(zoo.build("qwen2"), tmp_path))
    model = load_adapter(zoo.build("qwen2"), folder / "with a LoRA")
    model = add_adapter(model, folder / "with a LoRA", "b")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), other) and active_adapter(model) == "b" and model.active_adapters == ["b"]
    set_adapter(model, "default")
    assert torch.equal(logits(model), answers["with a LoRA"])
    set_adapter(model, "b")
    assert torch.equal(logits(model), other)


def test_deleting_the_active_adapter_leaves_no_other_lora_trainable(saved):
    model = zoo.build("qwen2")
    for name in ("a", "b"):
        model = add_adapter(model, saved[0] / "with a LoRA", name)
    delete_adapter(model, "b")
    assert not any("lora_" in name for name in trainable(model))
    model = add_adapter(model, saved[0] / "with a LoRA", "b")
    set_stage(model, 1)
    delete_adapter(model, "a")
    assert not any("lora_" in name for name in trainable(model)), "the active one's stays frozen, as it was"
    assert torch.equal(logits(model), saved[1]["with a LoRA"])
    model = add_adapter(model, saved[0] / "with a LoRA", "a")
    set_adapter(model, "a")
    assert torch.equal(logits(model), saved[1]["with a LoRA"])


def test_nothing_is_loaded_saved_or_switched_within_static_only(crowd, saved, tmp_path):
    model, answers = crowd
    set_adapter(model, "with a trained norm")
    with static_only(model):
        for attempt in (
            lambda: save_adapter(model, tmp_path),
            lambda: set_adapter(model, "plain"),
            lambda: load_adapter(model, saved[0] / "plain"),
            lambda: add_adapter(model, saved[0] / "plain", "new"),
            lambda: eject_dual_path_moe(model),
        ):
            with pytest.raises(MoEAdapterError, match="in static_only, without its adapter's values: leave the block"):
                attempt()
    assert active_adapter(model) == "with a trained norm" and not list(tmp_path.iterdir())
    assert torch.equal(logits(model), answers["with a trained norm"])


def test_a_copy_of_a_model_has_adapters_of_its_own(crowd):
    model, answers = crowd
    set_adapter(model, "plain")
    twin = copy.deepcopy(model)
    perturb(twin, seed=3)
    set_adapter(twin, "other sizes")
    assert torch.equal(logits(twin), answers["other sizes"])
    assert torch.equal(logits(model), answers["plain"]) and active_adapter(model) == "plain"


def test_a_failed_load_leaves_model_and_active_adapter_as_they_were(crowd, saved, tmp_path):
    model, answers = crowd
    set_adapter(model, "with a LoRA")
    flags, modules = trainable(model), {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(MoEAdapterError, match="holds no adapter"):
        add_adapter(model, tmp_path, "empty")
    assert trainable(model) == flags and {name: id(module) for name, module in model.named_modules()} == modules
    assert active_adapter(model) == "with a LoRA" and torch.equal(logits(model), answers["with a LoRA"])
    assert adapter_names(model) == list(KINDS)


def test_what_fails_in_the_middle_of_a_load_is_undone(crowd, saved, monkeypatch):
    model, answers = crowd
    set_adapter(model, "with a LoRA")
    flags, modules = trainable(model), {name: id(module) for name, module in model.named_modules()}
    monkeypatch.setattr("moe_adapter.files.load_lora", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_adapter(model, saved[0] / "with a larger LoRA", "new")
    assert trainable(model) == flags and {name: id(module) for name, module in model.named_modules()} == modules
    assert adapter_names(model) == list(KINDS) and torch.equal(logits(model), answers["with a LoRA"])
