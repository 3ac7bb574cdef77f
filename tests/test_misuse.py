"""What can be done wrong: each says what was got, what was expected and what to do, and leaves the model as it was.

Bad values of a config are in test_config, targets that mean no FFN in test_find, damaged files in test_files, and
wrapped models in test_wrappers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from reference import perturb
from torch import nn

from moe_adapter import (
    DualPathConfig,
    MoEAdapterError,
    balance_loss,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    plan_injection,
    save_adapter,
    set_stage,
    static_only,
)
from moe_adapter.adapters import (
    active_adapter,
    add_adapter,
    delete_adapter,
    from_pretrained,
    push_to_hub,
    set_adapter,
    write_card,
)

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
LORA = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def dense() -> nn.Module:
    return zoo.build("qwen2")


def injected(**config) -> nn.Module:
    return perturb(inject_dual_path_moe(dense(), **{**SIZES, **config}))


def with_lora(model: nn.Module, **lora) -> nn.Module:
    model = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **lora}))
    set_stage(model, 2)
    return model


def named(lora: bool = False) -> nn.Module:
    """A model whose active adapter is "b", loaded from the directory of that name, beside "default"."""
    model = with_lora(injected()) if lora else injected()
    save_adapter(injected(top_k=1, router_softmax="all"), "b")
    return add_adapter(model, "b", "b")


def twice_unnamed() -> nn.Module:
    model = named()
    set_adapter(model, None)
    return inject_dual_path_moe(model, **SIZES)


def half_loaded() -> nn.Module:
    """As after a checkpoint of which one shard was missing."""
    model = dense()
    model.model.layers[1].mlp.to("meta")
    return model


def two_loras() -> nn.Module:
    model = with_lora(injected())
    model.add_adapter("second", peft.LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "second"])
    return model


def load(adapter: Callable[[], nn.Module], damage: Callable[[Path], Any] = lambda folder: None) -> Callable:
    """Load onto the model an adapter that was saved from another, after some damage."""

    def act(model: nn.Module, folder: Path) -> None:
        save_adapter(adapter(), folder / "adapter")
        damage(folder / "adapter")
        load_adapter(model, folder / "adapter")

    return act


def truncate(pattern: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = next(folder.glob(pattern))
        os.truncate(file, file.stat().st_size - 100)

    return act


def norm_trained() -> nn.Module:
    model = injected()
    model.model.norm.weight.requires_grad_(True)
    return model


def norm_on_meta() -> nn.Module:
    model = dense()
    model.model.norm.to("meta")
    return model


def write_file(model: nn.Module, folder: Path) -> None:
    (folder / "file").write_text("")
    save_adapter(model, folder / "file")


def lora_from_bare_base(model: nn.Module, folder: Path) -> None:
    set_adapter(model.get_base_model(), "default")


def enter_static_only(model: nn.Module, folder: Path) -> None:
    with static_only(model):
        pass


# What was done: the model it was done to, the deed, and what the message says (a regex).
INJECTING: dict[str, tuple[Callable, Callable, str]] = {
    "a name for a model": (
        dense,
        lambda m, _: inject_dual_path_moe("Qwen/Qwen2-VL-7B"),
        "got str 'Qwen.*load it first",
    ),
    "no target": (dense, lambda m, _: inject_dual_path_moe(m, None), "got the target None, expected a suffix"),
    "an empty list of targets": (dense, lambda m, _: inject_dual_path_moe(m, []), r"got the target \[\], expected"),
    "a number in the list": (dense, lambda m, _: inject_dual_path_moe(m, ["mlp", 3]), "got the target 3, expected"),
    "a broken regex": (dense, lambda m, _: inject_dual_path_moe(m, r"layers\.(\d+.mlp"), "neither a name nor a regex"),
    "a target that is near": (
        dense,
        lambda m, _: inject_dual_path_moe(m, "mpl"),
        "matches no module; the nearest.*mlp",
    ),
    "one map of an attention": (dense, lambda m, _: inject_dual_path_moe(m, "q_proj"), "is no feed-forward block"),
    "an embedding": (dense, lambda m, _: inject_dual_path_moe(m, "embed_tokens"), "no feed-forward block.*D → F → D"),
    "a dict for a config": (
        dense,
        lambda m, _: inject_dual_path_moe(m, "mlp", dict(top_k=1)),
        r"got dict for the config, expected a DualPathConfig.*from_dict",
    ),
    "an unknown override": (
        dense,
        lambda m, _: inject_dual_path_moe(m, experts=4),
        "no field experts; its fields are num_experts",
    ),
    "top_k above num_experts": (
        dense,
        lambda m, _: inject_dual_path_moe(m, "mlp", DualPathConfig(), num_experts=3, top_k=4),
        "top_k: got 4, expected 1 to num_experts = 3",
    ),
    "a width of nothing": (
        dense,
        lambda m, _: inject_dual_path_moe(m, expert_dim=0),
        "expert_dim: got 0, expected a width",
    ),
    "an unknown backend": (
        dense,
        lambda m, _: inject_dual_path_moe(m, backend="fast", **SIZES),
        "backend 'fast' is unknown; expected 'auto' or one of",
    ),
    "layers that aren't there": (
        dense,
        lambda m, _: inject_dual_path_moe(m, layers=(0, 28), **SIZES),
        r"layers=\(0, 28\): the target matches 2 blocks; \[28\] lie outside",
    ),
    "a budget below the least": (
        dense,
        lambda m, _: inject_dual_path_moe(m, budget="1k"),
        "budget: got 1,000 parameters, expected at least .* choose fewer layers",
    ),
    "a budget that is no number": (dense, lambda m, _: inject_dual_path_moe(m, budget="a lot"), "budget: got 'a lot'"),
    "injecting twice": (injected, lambda m, _: inject_dual_path_moe(m, **SIZES), "already: eject_dual_path_moe"),
    "planning over an injection": (injected, lambda m, _: plan_injection(m, **SIZES), "already: eject_dual_path_moe"),
    "injecting a part of an injected model twice": (
        injected,
        lambda m, _: inject_dual_path_moe(m.model, **SIZES),
        "already: eject_dual_path_moe",
    ),
    "a base half loaded": (
        half_loaded,
        lambda m, _: inject_dual_path_moe(m, **SIZES),
        r"layers\.1\.mlp \(1 such\) is on the meta device.*Load the whole checkpoint",
    ),
    "a parallel model": (
        lambda: nn.DataParallel(dense()),
        lambda m, _: inject_dual_path_moe(m, **SIZES),
        "wrapped by DataParallel: inject before wrapping, then wrap the result",
    ),
}
WITHOUT_AN_INJECTION: dict[str, tuple[Callable, Callable, str]] = {
    "ejecting": (dense, lambda m, _: eject_dual_path_moe(m), "no dual-path layers: call inject_dual_path_moe"),
    "static_only": (dense, enter_static_only, "no dual-path layers: call inject_dual_path_moe"),
    "a balance loss": (dense, lambda m, _: balance_loss(m), "no dual-path layers: call inject_dual_path_moe"),
    "a stage": (dense, lambda m, _: set_stage(m, 1), "no dual-path layers: call inject_dual_path_moe"),
    "saving": (dense, lambda m, f: save_adapter(m, f / "new"), "no dual-path layers: call inject_dual_path_moe"),
    "pushing": (dense, lambda m, _: push_to_hub(m, "a/b"), "no dual-path layers: call inject_dual_path_moe"),
}
TRAINING: dict[str, tuple[Callable, Callable, str]] = {
    "a balance loss before any forward": (
        injected,
        lambda m, _: balance_loss(m),
        "has run yet.*reads the last forward",
    ),
    "a third stage": (injected, lambda m, _: set_stage(m, 3), "got stage 3, expected 1"),
    "a stage by name": (injected, lambda m, _: set_stage(m, "II"), "got stage 'II', expected 1"),
}
FILES: dict[str, tuple[Callable, Callable, str]] = {
    "saving into a file": (injected, write_file, "is a file: an adapter takes a directory"),
    "saving from under a PeftModel": (
        lambda: with_lora(injected()),
        lambda m, f: save_adapter(m.get_base_model(), f),
        "holds LoRA layers: pass the PeftModel itself",
    ),
    "saving two LoRAs": (two_loras, lambda m, f: save_adapter(m, f), "2 LoRAs are active.*expected 1: set_adapter"),
    "saving what was never loaded": (
        lambda: injected().to("meta"),
        lambda m, f: save_adapter(m, f),
        "on the meta device: load or materialise",
    ),
    "loading from nowhere": (
        dense,
        lambda m, f: load_adapter(m, f / "none"),
        r"holds no adapter: moe_adapter.json is missing; expected a directory of save_adapter\(\)",
    ),
    "loading onto another base": (
        lambda: zoo.build("qwen2", seed=3),
        load(injected),
        r"another base: the weights of model\.layers\.0\.mlp differ.*Load the checkpoint that",
    ),
    "loading onto another architecture": (lambda: zoo.build("gpt2"), load(injected), "doesn't fit this base"),
    "loading onto another injection": (
        lambda: injected(expert_dim=8),
        load(injected),
        "injected with another expert_dim than the adapter: eject it, then load",
    ),
    "loading onto other layers": (
        lambda: injected(layers=(1,)),
        load(injected),
        "dual-path layers differ from the adapter's",
    ),
    "loading a truncated shard": (dense, load(injected, truncate("weights-*")), "truncated or damaged.*Copy it again"),
    "loading onto the meta device": (
        lambda: dense().to("meta"),
        load(injected),
        "on the meta device: load the base model's weights before the adapter",
    ),
    "loading a base parameter onto the meta device": (
        norm_on_meta,
        load(norm_trained),
        r"brings model\.norm\.weight, which is offloaded here: load the adapter, then offload",
    ),
    "loading a truncated LoRA": (
        dense,
        load(lambda: with_lora(injected()), truncate("lora-*/*.safetensors")),
        "lora-.* is truncated or damaged.*copy the adapter again",
    ),
    "loading a LoRA without its config": (
        dense,
        load(lambda: with_lora(injected()), lambda f: next(f.glob("lora-*/*.json")).unlink()),
        "is no LoRA in peft's format: copy the adapter again",
    ),
    "loading a LoRA over another": (
        lambda: with_lora(injected(), r=8),
        load(lambda: with_lora(injected())),
        "has a LoRA 'default' of another r than the adapter's: delete it first, or load",
    ),
    "loading onto a parallel model": (
        lambda: nn.DataParallel(dense()),
        load(injected),
        "wrapped by DataParallel: inject before wrapping.*the same goes for loading",
    ),
    "a card for no adapter": (injected, lambda m, f: write_card(f), "holds no adapter"),
}
ADAPTERS: dict[str, tuple[Callable, Callable, str]] = {
    "a name that is taken": (
        named,
        lambda m, f: add_adapter(m, f / "b", "default"),
        r"an adapter 'default' already, beside \['b'\]: choose another name, or delete_adapter",
    ),
    "a name with a dot": (named, lambda m, f: add_adapter(m, f / "b", "v1.0"), "'v1.0', expected text without dots"),
    "adding what is no adapter": (named, lambda m, f: add_adapter(m, f, "c"), "holds no adapter"),
    "switching to a stranger": (
        named,
        lambda m, _: set_adapter(m, "c"),
        r"no adapter 'c'; it has \['b', 'default'\]: add_adapter it first",
    ),
    "switching from a second one without a name": (
        twice_unnamed,
        lambda m, _: set_adapter(m, "b"),
        "injected without a name, and its adapter 'default' has that one: save_adapter and eject",
    ),
    "deleting a stranger": (named, lambda m, _: delete_adapter(m, "c"), "no adapter 'c'; it has"),
    "switching under a PeftModel": (lambda: named(lora=True), lora_from_bare_base, "hold LoRAs: pass the PeftModel"),
    "asking a parallel model": (
        lambda: nn.DataParallel(named()),
        lambda m, _: active_adapter(m),
        "wrapped by DataParallel",
    ),
    "ejecting from a parallel model": (
        lambda: nn.DataParallel(injected()),
        lambda m, _: eject_dual_path_moe(m),
        "wrapped by DataParallel.*ejecting",
    ),
    "an adapter that is nowhere": (
        named,
        lambda m, f: from_pretrained(m, f / "none", "c"),
        r"is no directory here, and no repository that could be fetched.*expected the directory of save_adapter\(\)",
    ),
}
MISUSES = {
    f"{table}: {case}": row
    for table, rows in dict(
        injecting=INJECTING, dense=WITHOUT_AN_INJECTION, training=TRAINING, files=FILES, adapters=ADAPTERS
    ).items()
    for case, row in rows.items()
}


def portrait(model: nn.Module) -> dict[str, Any]:
    """All that a misuse might have changed in a model: values, module objects, flags, modes, hooks."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + str((tensor.dtype, tensor.shape, tensor.device)).encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "values": digest.hexdigest(),
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: hooks(module) for name, module in model.named_modules()},
    }


def hooks(module: nn.Module) -> list[type]:
    return [type(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]


@pytest.mark.parametrize("case", MISUSES)
def test_a_misuse_is_explained_and_changes_nothing(case, tmp_path, monkeypatch):
    build, misuse, message = MISUSES[case]
    monkeypatch.chdir(tmp_path)
    model = build()
    before = portrait(model)
    with pytest.raises(MoEAdapterError, match=f"(?s){message}"):
        misuse(model, tmp_path)
    assert portrait(model) == before


def test_the_table_has_at_least_thirty_misuses():
    assert len(MISUSES) >= 30
