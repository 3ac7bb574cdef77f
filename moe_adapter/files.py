"""Adapters on and off disk: what the injection added and training changed, checked against the model it goes onto."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_adapter.checks import check_base, check_tensors, matching_plan, prospect
from moe_adapter.directory import as_folder, read_index, read_weights, write_adapter
from moe_adapter.errors import MoEAdapterError
from moe_adapter.fingerprint import fingerprint
from moe_adapter.injection import STATE, Injection, base_parameters, check_not_at_base, injected_model, trainable_base
from moe_adapter.lora import active_loras, lora_parameters, plain_name, switch_lora
from moe_adapter.lora_files import DEFAULT, check_lora, load_lora, lora_writer
from moe_adapter.objective import dual_path_layers
from moe_adapter.stages import set_stage
from moe_adapter.surgery import NAMED, apply_plan, unwrapped


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter of an injected model into the directory `path`, over an older one if there is one.

    It holds the dual-path layers' new parameters and whatever base parameters are trainable; a PeftModel's LoRA is
    written beside them in peft's format. A kill at any moment leaves the old adapter or the new one whole. Files there
    that are no adapter's are left alone.

    Raises:
        MoEAdapterError: the model has no dual-path layers, several injections, copies of its layers by peft, weights
            still on the meta device, or several active LoRAs; or it is in `static_only`.
    """
    folder = as_folder(path)
    owner = injected_model(model)
    check_not_at_base(owner)
    index = {
        "config": getattr(owner, STATE).config.to_dict(),
        "layers": [plain_name(name) for name in dual_path_layers(owner)],
        "base": fingerprint(owner),
        "model": _describe_model(owner),
    }
    write_adapter(folder, index, _tensors_to_save(owner), lora_writer(model, owner))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load an adapter onto its base model, injecting first if need be; returns the model (a PeftModel with a LoRA).

    It takes the place of what an injected model has learnt, the LoRA that answers included; an adapter without a LoRA
    answers without one. Everything is read and checked before the model is touched.

    Raises:
        MoEAdapterError: no adapter there, a newer format, an unknown field, damaged files, another base (shapes, or a
            hash of sampled static weights), a LoRA that doesn't fit or would overwrite one of the model's own, or an
            injected model of another config; the model stays as it was.
    """
    owner = unwrapped(model)
    return load_named(model, as_folder(path), _lora_name(owner))


def load_named(model: nn.Module, folder: Path, name: str) -> nn.Module:
    """`load_adapter`, by whose `name` peft is to know the LoRA."""
    owner = unwrapped(model)
    check_not_at_base(owner)
    index = read_index(folder)
    place = folder / index["lora"] if index["lora"] else None
    plan = matching_plan(owner, index, folder)
    check_base(owner, index["base"])
    tensors = read_weights(folder / index["weights"])
    future = prospect(owner, plan)
    check_tensors(tensors, future, folder / index["weights"])
    if place:
        check_lora(model, place, name, future.modules, _taken_loras(owner) if plan else ())
    if plan:
        apply_plan(owner, plan)
    _fill(owner, tensors)
    if place is None:
        switch_lora(model, ())
        return model
    model = load_lora(model, owner, place, name)
    set_stage(model, 2)
    return model


def _lora_name(owner: nn.Module) -> str:
    """By which name peft is to know the LoRA: that of the one it replaces, or of the active adapter."""
    active = vars(owner).get(STATE)
    if active is None:
        return DEFAULT
    names = [name for name, injection in vars(owner).get(NAMED, {}).items() if injection is active]
    return next(iter([*active_loras(owner), *names, DEFAULT]))


def _taken_loras(owner: nn.Module) -> Collection[str]:
    """The names of LoRAs that a new adapter's must not overwrite: that which answers, and the other adapters'."""
    return {*active_loras(owner), *(name for other in vars(owner).get(NAMED, {}).values() for name in other.loras)}


def _describe_model(owner: nn.Module) -> dict[str, Any]:
    """What a model card says of the base: class, name (of a local directory only the last part), size."""
    name = getattr(getattr(owner, "config", None), "_name_or_path", None) or None
    new = sum(p.numel() for layer in dual_path_layers(owner).values() for p in layer.new_parameters().values())
    lora = sum(p.numel() for p in lora_parameters(owner).values())
    return {
        "class": type(owner).__name__,
        "name": Path(name).name if name and Path(name).exists() else name,
        "parameters": sum(p.numel() for p in owner.parameters()) - new - lora,
    }


def _tensors_to_save(owner: nn.Module) -> dict[str, torch.Tensor]:
    new = {id(p) for layer in dual_path_layers(owner).values() for p in layer.new_parameters().values()}
    also = {*getattr(owner, STATE).base_values, *trainable_base(owner)}
    tensors = {}
    for name, parameter in base_parameters(owner).items():
        if id(parameter) in new or name in also:
            if parameter.is_meta:
                raise MoEAdapterError(f"{name} is on the meta device: load or materialise the model before saving.")
            tensors[name] = parameter.detach().to("cpu").contiguous()
    return tensors


def _fill(owner: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give an injected model an adapter's values; the base's own of those that the adapter brings are kept."""
    injection: Injection = getattr(owner, STATE)
    parameters = base_parameters(owner)
    new = {id(p) for layer in injection.layers for p in layer.new_parameters().values()}
    with torch.no_grad():
        for name in set(injection.base_values) - set(tensors):
            parameters[name].copy_(injection.base_values.pop(name))
        for name, tensor in tensors.items():
            if id(parameters[name]) not in new:
                injection.base_values.setdefault(name, parameters[name].detach().clone())
            parameters[name].copy_(tensor)
