"""Named adapters on one base: exact and cheap to switch, with their LoRAs, cards, the hub, and averages of runs."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import zoo
from huggingface_hub import ModelCard
from local_hub import local_hub
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
    from_pretrained,
    push_to_hub,
    set_adapter,
    write_card,
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
    torch.manual_seed(seed)
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), **{**SIZES, **config}), seed=seed)
    if norm is not None:
        model.model.norm.weight.requires_grad_(True)
        nn.init.constant_(model.model.norm.weight, norm)
    if lora is not None:
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
    for kind in KINDS:
        model = delete_adapter(model, kind)
        assert kind not in adapter_names(model)
    assert type(model) is type(zoo.build("qwen2")) and not any("lora" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), logits(zoo.build("qwen2")))
    assert answers  # the deleted one answers no more
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


def test_adapters_follow_the_base_to_another_device_and_mode(saved):
    model = add_adapter(add_adapter(zoo.build("qwen2"), saved[0] / "plain", "a"), saved[0] / "other sizes", "b")
    model.to("meta").train()
    set_adapter(model, "a")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert all(module.training for module in model.modules())


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


CARD = dict(
    training_data="1,204 thyroid cases of two hospitals, 2019 to 2023",
    metrics={"BLEU-1": 41.2, "ROUGE-L": 0.53},
    language=["en", "zh"],
    license="apache-2.0",
)


def test_a_model_card_says_what_the_adapter_is(tmp_path):
    model = trained(0, lora={})
    model.get_base_model().config._name_or_path = "Qwen/Qwen2-0.5B"
    save_adapter(model, tmp_path)
    card = ModelCard.load(write_card(tmp_path, **CARD))
    assert card.data.base_model == "Qwen/Qwen2-0.5B" and card.data.library_name == "moe-adapter"
    assert card.data.language == ["en", "zh"] and card.data.license == "apache-2.0"
    new = sum(p.numel() for layer in dual_path_layers(model).values() for p in layer.new_parameters().values())
    base = sum(p.numel() for p in zoo.build("qwen2").parameters())
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    for count in (new, base, lora, new + base + lora):
        assert f"| {count:,} |" in card.text
    assert CARD["training_data"] in card.text and "| BLEU-1 | 41.2 |" in card.text
    assert "| expert_dim | `16` |" in card.text


def test_a_card_states_no_more_than_is_known_and_outlives_the_next_save(tmp_path):
    save_adapter(trained(0), tmp_path)
    card = write_card(tmp_path).read_text()
    assert card.count("Not stated by the author.") == 2 and "base_model" not in card
    save_adapter(trained(1), tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    assert len(list(tmp_path.iterdir())) == 3


def test_the_card_of_a_local_base_tells_no_path(tmp_path):
    zoo.build("qwen2").save_pretrained(tmp_path / "my-base")
    model = inject_dual_path_moe(type(zoo.build("qwen2")).from_pretrained(tmp_path / "my-base"), **SIZES)
    save_adapter(model, tmp_path / "adapter")
    assert "base_model: my-base" in write_card(tmp_path / "adapter").read_text()
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "adapter").glob("*.[jm]*"))


@pytest.mark.parametrize("kind", ["plain", "with a LoRA"])
def test_push_to_the_hub_and_back(saved, kind, tmp_path):
    folder, answers = saved
    model = load_adapter(zoo.build("qwen2"), folder / kind)
    with local_hub(tmp_path / "hub") as hub:
        url = push_to_hub(model, "clinic/thyroid", token="a-token", **CARD)
        assert "/clinic/thyroid/commit/" in url
        fetched = from_pretrained(zoo.build("qwen2"), "clinic/thyroid", cache_dir=tmp_path / "cache")
        assert active_adapter(fetched) == "default"
        assert torch.equal(logits(fetched), answers[kind])

        card = (hub / "clinic" / "thyroid" / "README.md").read_text()
        perturb(model, seed=8)
        push_to_hub(model, "clinic/thyroid", token="a-token")
        assert (hub / "clinic" / "thyroid" / "README.md").read_text() == card, "kept, as nothing new is said"
        assert len(list((hub / "clinic" / "thyroid").glob("weights-*"))) == 1, "the old weights are gone"
        again = from_pretrained(fetched, "clinic/thyroid", "new", cache_dir=tmp_path / "cache")
        assert torch.equal(logits(again), logits(model))


def test_from_pretrained_takes_a_directory_and_refuses_what_is_none(saved, tmp_path):
    model = from_pretrained(zoo.build("qwen2"), saved[0] / "plain", "local")
    assert active_adapter(model) == "local" and torch.equal(logits(model), saved[1]["plain"])
    with pytest.raises(MoEAdapterError, match="no directory here"):
        from_pretrained(model, tmp_path / "nowhere")
    with local_hub(tmp_path), pytest.raises(MoEAdapterError, match="'clinic/none' is no directory here, and no repo"):
        from_pretrained(model, "clinic/none", cache_dir=tmp_path / "cache")
