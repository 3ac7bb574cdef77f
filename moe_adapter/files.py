"""Adapters on and off disk: what the injection added and training changed, checked against the model it goes onto."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
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
from moe_adapter.precision import KeepsFloat32
from moe_adapter.sharding import (
    has_spread,
    in_place,
    is_main_process,
    is_spread,
    own_class,
    put,
    settle,
    together,
    whole,
    whole_shape,
)
from moe_adapter.stages import set_stage
from moe_adapter.surgery import NAMED, apply_plan, unwrapped


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter of an injected model into the directory `path`, over an older one if there is one.

    It holds the dual-path layers' new parameters and whatever base parameters are trainable; a PeftModel's LoRA is
    written beside them in peft's format. A kill at any moment leaves the old adapter or the new one whole. Files there
    that are no adapter's are left alone. In a distributed run rank 0 writes; where parameters are spread over ranks
    (FSDP2, ZeRO-3, expert parallelism) every rank has to call, and has the same file whatever the spread.

    Raises:
        MoEAdapterError: the model has no dual-path layers, several injections, copies of its layers by peft, weights
            still on the meta device, or several active LoRAs; or it is in `static_only`.
    """
    folder = as_folder(path)
    owner = injected_model(model)
    check_not_at_base(owner)
    settle(model)
    spread = has_spread(owner) or any(part.is_cast for part in _keepers(owner))
    if not spread and not is_main_process():
        return
    index = {
        "config": getattr(owner, STATE).config.to_dict(),
        "layers": [plain_name(name) for name in dual_path_layers(owner)],
        "base": fingerprint(owner),
        "model": _describe_model(owner),
    }
    tensors, write_lora = _tensors_to_save(owner), lora_writer(model, owner)
    with in_place(owner, lora_parameters(owner).values()), together(spread):
        if is_main_process():
            write_adapter(folder, index, tensors, write_lora)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load an adapter onto its base model, injecting first if need be; returns the model (a PeftModel with a LoRA).

    It takes the place of what an injected model has learnt, the LoRA that answers included; an adapter without a LoRA
    answers without one. Everything is read and checked before the model is touched. In a distributed run every rank
    calls; of the wrapped models one takes an adapter, that which was injected and then sharded by FSDP2.

    Raises:
        MoEAdapterError: no adapter there, a newer format, an unknown field, damaged files, another base (shapes, or a
            hash of sampled static weights), a LoRA that doesn't fit or would overwrite one of the model's own, or an
            injected model of another config; the model stays as it was.
    """
    owner = _destination(model)
    return load_named(model, as_folder(path), _lora_name(owner))


def load_named(model: nn.Module, folder: Path, name: str) -> nn.Module:
    """`load_adapter`, by whose `name` peft is to know the LoRA."""
    owner = _destination(model)
    check_not_at_base(owner)
    settle(model)
    with together(has_spread(owner)):
        index = read_index(folder)
        place = folder / index["lora"] if index["lora"] else None
        plan = matching_plan(owner, index, folder)
        tensors = read_weights(folder / index["weights"])
    check_base(owner, index["base"])
    future = prospect(owner, plan)
    check_tensors(tensors, future, folder / index["weights"])
    if place:
        check_lora(model, place, name, future.modules, _taken_loras(owner) if plan else ())
        _check_place_for(model, name)
    if plan:
        apply_plan(owner, plan)
    _fill(owner, tensors)
    if place is None:
        switch_lora(model, ())
        return model
    model = load_lora(model, owner, place, name)
    set_stage(model, 2)
    return model


def _destination(model: nn.Module) -> nn.Module:
    """What an adapter goes onto: the base of an unwrapped model, or an injected one where its parameters lie."""
    injected = any(STATE in vars(part) for part in model.modules()) if isinstance(model, nn.Module) else False
    if injected and any(is_spread(p) and not hasattr(p, "full_tensor") for p in model.parameters()):
        raise MoEAdapterError(
            "the model's parameters are spread by DeepSpeed's ZeRO-3, which keeps float32 masters that a file would "
            "not reach: load the adapter, then give the model to DeepSpeed; its own checkpoints its engine loads."
        )
    if injected and any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return injected_model(model)
    return unwrapped(model)


def _check_place_for(model: Any, lora: str) -> None:
    """That peft needn't add a LoRA to units that FSDP2 has sharded without it."""
    if lora not in getattr(model, "peft_config", {}) and any(is_spread(p) for p in model.parameters()):
        raise MoEAdapterError(
            f"the adapter holds a LoRA, and the model, whose parameters are spread over ranks, has none called "
            f"{lora!r}: load the adapter, then shard the model."
        )


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
    new = _numel(p for layer in dual_path_layers(owner).values() for p in layer.new_parameters().values())
    return {
        "class": own_class(owner).__name__,
        "name": Path(name).name if name and Path(name).exists() else name,
        "parameters": _numel(owner.parameters()) - new - _numel(lora_parameters(owner).values()),
    }


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(whole_shape(parameter).numel() for parameter in parameters)


def _tensors_to_save(owner: nn.Module) -> dict[str, torch.Tensor]:
    new = {id(p) for layer in dual_path_layers(owner).values() for p in layer.new_parameters().values()}
    also = {*getattr(owner, STATE).base_values, *trainable_base(owner)}
    settled = {id(p): (part, name) for part in _keepers(owner) for name, p in part.named_parameters(recurse=False)}
    tensors = {}
    for name, parameter in base_parameters(owner).items():
        if id(parameter) in new or name in also:
            if parameter.is_meta:
                raise MoEAdapterError(f"{name} is on the meta device: load or materialise the model before saving.")
            part, own_name = settled.get(id(parameter), (None, ""))
            value = whole(parameter) if part is None else part.settled(own_name)
            if is_main_process():
                tensors[name] = value.to("cpu").contiguous()
    return tensors


def _keepers(owner: nn.Module) -> list[KeepsFloat32]:
    return [part for part in owner.modules() if isinstance(part, KeepsFloat32)]


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
            put(parameters[name], tensor)
