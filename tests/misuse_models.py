"""Models for the table of misuses, in the states in which they are misused, and deeds that take several steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import zoo
from reference import perturb
from torch import nn

from moe_adapter import inject_dual_path_moe, load_adapter, save_adapter, set_stage, static_only
from moe_adapter.adapters import add_adapter, set_adapter

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


def resized() -> nn.Module:
    model = dense()
    model.resize_token_embeddings(136, mean_resizing=False)
    return model


def other_kv_width() -> nn.Module:
    """The same FFNs, and an attention with keys of another width."""
    model = dense()
    for block in model.model.layers:
        block.self_attn.k_proj = nn.Linear(32, 32)
    return model


def fused_attention() -> nn.Module:
    """The same FFNs, and an attention whose maps have other names."""
    model = dense()
    for block in model.model.layers:
        block.self_attn.key = block.self_attn.k_proj
        del block.self_attn.k_proj
    return model


def named_on(model: nn.Module) -> nn.Module:
    """The model with an adapter "a" that has a LoRA."""
    save_adapter(with_lora(injected()), "a")
    return add_adapter(model, "a", "a")


def lora_on(*targets: str) -> Callable[[], nn.Module]:
    return lambda: with_lora(injected(), target_modules=list(targets))


def flip_lora(folder: Path) -> None:
    file = next(folder.glob("lora-*/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def own_lora() -> nn.Module:
    return peft.get_peft_model(dense(), peft.LoraConfig(**LORA))


def add(adapter: Callable[[], nn.Module], name: str) -> Callable:
    def act(model: nn.Module, folder: Path) -> None:
        save_adapter(adapter(), folder / "adapter")
        add_adapter(model, folder / "adapter", name)

    return act


def lora_from_bare_base(model: nn.Module, folder: Path) -> None:
    set_adapter(model.get_base_model(), "default")


def enter_static_only(model: nn.Module, folder: Path) -> None:
    with static_only(model):
        pass
