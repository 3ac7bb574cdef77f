"""What can be done wrong: each says what was got, what was expected and what to do, and leaves the model as it was.

Bad values of a config are in test_config, targets that mean no FFN in test_find, damaged files in test_files, and
wrapped models in test_wrappers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import zoo
from misuse_models import (
    LORA,
    SIZES,
    add,
    dense,
    enter_static_only,
    flip_lora,
    fused_attention,
    half_loaded,
    injected,
    load,
    lora_from_bare_base,
    lora_on,
    named,
    named_on,
    norm_on_meta,
    norm_trained,
    other_kv_width,
    own_lora,
    resized,
    truncate,
    twice_unnamed,
    two_loras,
    with_lora,
    write_file,
)
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
)
from moe_adapter.adapters import (
    active_adapter,
    add_adapter,
    delete_adapter,
    from_pretrained,
    merge_adapters,
    push_to_hub,
    set_adapter,
    write_card,
)

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
    "a stage of a name": (
        injected,
        lambda m, _: set_stage("x", 1),
        "got str 'x' for the model, expected a torch.*load",
    ),
    "copies of routers by peft": (
        lambda: peft.get_peft_model(injected(), peft.LoraConfig(**LORA, modules_to_save=["router"])),
        lambda m, _: set_stage(m, 2),
        r"layers\.0\.mlp\.router.*: peft's modules_to_save holds a copy.*Take what names it .* out of modules_to_save",
    ),
}
FILES: dict[str, tuple[Callable, Callable, str]] = {
    "saving into a file": (injected, write_file, "is a file: an adapter takes a directory"),
    "saving from under a PeftModel": (
        lambda: with_lora(injected()),
        lambda m, f: save_adapter(m.get_base_model(), f),
        "holds LoRA layers: pass the PeftModel itself",
    ),
    "saving a name": (dense, lambda m, f: save_adapter("x", f), "got str 'x' for the model, expected a torch.*load it"),
    "saving to nowhere": (
        injected,
        lambda m, f: save_adapter(m, None),
        "got None for an adapter's dir.*expected a path",
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
    "loading None": (dense, lambda m, f: load_adapter(m, None), "got None for an adapter's directory, expected a path"),
    "loading a LoRA of another width": (
        other_kv_width,
        load(lora_on("q_proj", "k_proj")),
        r"doesn't fit this base: .*k_proj\.lora_B\.weight is \(16, 4\), the model expects \(32, 4\)\. Load the base",
    ),
    "adding a LoRA of another width": (
        lambda: named_on(other_kv_width()),
        add(lora_on("q_proj", "k_proj"), "b"),
        r"k_proj\.lora_B\.weight is \(16, 4\), the model expects \(32, 4\)\. Load the base",
    ),
    "loading a LoRA of another vocabulary": (
        resized,
        load(lora_on("q_proj", "lm_head")),
        r"doesn't fit this base: lm_head.* is \(128, 32\), the model expects \(136, 32\)\. Load .* vocabulary",
    ),
    "loading a LoRA for other modules": (
        fused_attention,
        load(lora_on("q_proj", "k_proj")),
        r"is a LoRA for model\.layers\.0\.self_attn\.k_proj \(2 such\), which the model hasn't got: load the base",
    ),
    "loading a LoRA with a flipped bit": (
        dense,
        load(lambda: with_lora(injected()), flip_lora),
        "lora-.* is truncated or damaged: its content doesn't match its name. Copy it again",
    ),
    "loading a LoRA over one's own": (
        own_lora,
        load(lambda: with_lora(injected())),
        r"a LoRA 'default' of its own, which the adapter's would overwrite: load onto .*by another name, add_adapter",
    ),
    "loading a LoRA onto a bare base": (
        lambda: own_lora().get_base_model(),
        load(lambda: with_lora(injected())),
        "holds LoRA layers already: pass the PeftModel",
    ),
    "loading onto another base": (
        lambda: zoo.build("qwen2", seed=3),
        load(injected),
        r"another base: the weights of model\.layers\.0\.mlp differ.*Load the checkpoint that",
    ),
    "loading onto another architecture": (
        lambda: zoo.build("gpt2"),
        load(injected),
        r"doesn't fit this base: GPT2LMHeadModel has no module model\.layers\.0\.mlp \(2 such\), where a Qwen2.*Load",
    ),
    "loading onto another injection": (
        lambda: injected(expert_dim=8),
        load(injected),
        "injected with another expert_dim than the adapter: eject it, then load",
    ),
    "loading onto other layers": (
        lambda: injected(layers=(1,)),
        load(injected),
        r"layers differ from the adapter's: got model\.layers\.1\.mlp, expected model\.layers\.0\.mlp, .*then load",
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
        "lora-.* is truncated or damaged: its content doesn't match its name. Copy it again",
    ),
    "loading a LoRA without its config": (
        dense,
        load(lambda: with_lora(injected()), lambda f: next(f.glob("lora-*/*.json")).unlink()),
        "is no LoRA in peft's format: expected adapter_config.json and adapter_model.*; copy the adapter again",
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
    "a card with a list of results": (
        dense,
        lambda m, f: (save_adapter(injected(), f), write_card(f, metrics=[1])),
        r"write_card: got the metrics \[1\], expected numbers by name: metrics=\{",
    ),
    "merging a path": (
        dense,
        lambda m, f: merge_adapters(str(f), [1], f),
        "got one path, .*expected a list of at least",
    ),
}
ADAPTERS: dict[str, tuple[Callable, Callable, str]] = {
    "a name that is taken": (
        named,
        lambda m, f: add_adapter(m, f / "b", "default"),
        r"an adapter 'default' already, beside \['b'\]: choose another name, or delete_adapter",
    ),
    "a number for a name": (
        named,
        lambda m, f: add_adapter(m, f / "b", 3),
        "got the adapter name 3, expected text without dots.*: name it anew",
    ),
    "a name with a dot": (named, lambda m, f: add_adapter(m, f / "b", "v1.0"), "'v1.0', expected text without dots"),
    "adding what is no adapter": (named, lambda m, f: add_adapter(m, f, "c"), "holds no adapter"),
    "switching to a stranger": (
        named,
        lambda m, _: set_adapter(m, "c"),
        r"no adapter 'c', expected one of \['b', 'default'\]: adapter_names\(model\) lists them",
    ),
    "switching from a second one without a name": (
        twice_unnamed,
        lambda m, _: set_adapter(m, "b"),
        "injected without a name, and its adapter 'default' has that one: save_adapter and eject",
    ),
    "deleting a stranger": (
        named,
        lambda m, _: delete_adapter(m, "c"),
        r"no adapter 'c', expected one of \['b', 'default'\]: adapter_names",
    ),
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
    """All that a misuse might have changed in a model: values, module objects, flags, modes, hooks, peft's state."""
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
        "peft": {
            name: (module.disable_adapters, str(module.active_adapters))
            for name, module in model.named_modules()
            if hasattr(module, "adapter_layer_names")
        },
        "LoRAs": [str(getattr(model, "peft_config", None)), str(getattr(model, "active_adapter", None))],
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
