"""The LoRA of stage II beside the MoE: in peft's own format, written and loaded by peft."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.stages import lora_parameters
from moe_adapter.surgery import is_peft_model

WEIGHTS = "adapter_model.safetensors"
DEFAULT = "default"  # peft's name for an adapter that was given none
SHAPE = ("peft_type", "r", "target_modules", "rank_pattern", "use_dora")  # what two LoRAs of one name share


def lora_writer(model: nn.Module, owner: nn.Module) -> Callable[[Path], str | None]:
    """What writes a PeftModel's active LoRA into a folder and gives its place there; None where it is off or absent.

    Raises:
        MoEAdapterError: the model has a LoRA but is no PeftModel, or several are active.
    """
    if not lora_parameters(owner) or not lora_is_on(owner):
        return lambda folder: None
    wrapper = next((part for part in model.modules() if is_peft_model(part)), None)
    if wrapper is None:
        raise MoEAdapterError(
            "the model holds LoRA layers: pass the PeftModel itself, so that the LoRA is saved with it."
        )
    active: list[str] = wrapper.active_adapters  # pyright: ignore
    if len(active) != 1:
        raise MoEAdapterError(f"{len(active)} LoRAs are active ({active}), expected 1: set_adapter the one to save.")

    def write(folder: Path) -> str:
        place = f"lora-{uuid.uuid4().hex[:16]}"
        wrapper.save_pretrained(folder / place, selected_adapters=active)  # pyright: ignore
        return place if active == [DEFAULT] else f"{place}/{active[0]}"

    return write


def lora_is_on(model: nn.Module) -> bool:
    """Whether peft's layers in the model answer, rather than their base layers alone."""
    return any(not part.disable_adapters for part in model.modules() if hasattr(part, "adapter_layer_names"))


def check_lora(model: nn.Module, folder: Path, place: str | None, name: str) -> None:
    """That the LoRA is whole, and like the one that peft may know by that name already."""
    if place is None:
        return
    peft = _peft()
    if not (folder / place / "adapter_config.json").is_file():
        raise MoEAdapterError(f"{folder / place} is no LoRA in peft's format: copy the adapter again.")
    try:
        with safe_open(folder / place / WEIGHTS, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise MoEAdapterError(f"{folder / place} is truncated or damaged ({error}): copy the adapter again.") from error
    known, found = getattr(model, "peft_config", {}).get(name), peft.PeftConfig.from_pretrained(str(folder / place))
    if known is not None:
        different = [key for key in SHAPE if getattr(known, key, None) != getattr(found, key, None)]
        if different:
            raise MoEAdapterError(
                f"the model has a LoRA {name!r} of another {', '.join(different)} than the adapter's: delete it first, "
                "or load the adapter by another name, see moe_adapter.adapters."
            )


def load_lora(model: nn.Module, owner: nn.Module, folder: Path, name: str) -> nn.Module:
    """Put the LoRA of `folder` onto the model by peft, under `name`; gives the PeftModel."""
    if model is owner:
        return _peft().PeftModel.from_pretrained(owner, str(folder), name, is_trainable=True)  # pyright: ignore
    model.load_adapter(str(folder), name, is_trainable=True)  # pyright: ignore
    switch_lora(model, name)
    return model


def switch_lora(model: nn.Module, name: str | None) -> None:
    """Let a PeftModel's LoRA `name` answer, or none."""
    if name is None:
        model.base_model.disable_adapter_layers()  # pyright: ignore
    else:
        model.base_model.enable_adapter_layers()  # pyright: ignore
        model.set_adapter(name)  # pyright: ignore


def merge_loras(folders: list[Path], shares: list[float]) -> Callable[[Path], str]:
    """What writes the LoRA whose update of the base is ΔW = Σ_i share_i·ΔW_i, its rank the sum of theirs.

    ΔW_i = s_i·B_i·A_i, so stacking the A_i and, scaled, the B_i gives the sum exactly.

    Raises:
        MoEAdapterError: LoRAs on different modules, or of a kind that is more than B·A.
    """
    configs: list[Any] = [_peft().LoraConfig.from_pretrained(str(folder)) for folder in folders]
    states = [load_file(folder / WEIGHTS) for folder in folders]
    for folder, config, state in zip(folders, configs, states, strict=True):
        plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in state)
        if not plain or config.rank_pattern or config.alpha_pattern:
            raise MoEAdapterError(
                f"{folder} holds more than plain A and B matrices of one rank, which alone can be averaged: merge the "
                "adapters without their LoRAs, or train them with a plain one."
            )
        if state.keys() != states[0].keys():
            raise MoEAdapterError(f"{folders[0]} and {folder} are LoRAs on different modules: they can't be averaged.")
    scales = [config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r) for config in configs]
    merged = {}
    for name in states[0]:
        is_b = name.endswith(".lora_B.weight")
        factors = [share * scale if is_b else 1.0 for share, scale in zip(shares, scales, strict=True)]
        parts = [state[name] * factor for state, factor in zip(states, factors, strict=True)]
        merged[name] = torch.cat(parts, dim=1 if is_b else 0).contiguous()
    rank = sum(config.r for config in configs)

    def write(folder: Path) -> str:
        place = f"lora-{uuid.uuid4().hex[:16]}"
        dataclasses.replace(configs[0], r=rank, lora_alpha=rank, use_rslora=False).save_pretrained(str(folder / place))
        save_file(merged, folder / place / WEIGHTS, metadata={"format": "pt"})
        return place

    return write


def _peft():
    try:
        import peft
    except ImportError as error:
        raise MoEAdapterError('the adapter holds a LoRA: pip install "moe-adapter[peft]".') from error
    return peft
