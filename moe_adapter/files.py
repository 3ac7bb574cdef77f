"""Adapters on and off disk: what the injection added and training changed, checked against the model it goes onto."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_adapter.config import DualPathConfig
from moe_adapter.directory import INDEX, read_index, read_weights, write_adapter
from moe_adapter.errors import MoEAdapterError
from moe_adapter.fingerprint import describe_module, fingerprint
from moe_adapter.lora import DEFAULT, check_lora, load_lora, lora_writer
from moe_adapter.objective import dual_path_layers
from moe_adapter.offload import execution_device
from moe_adapter.plan import Plan, new_layer, plan_injection
from moe_adapter.stages import lora_parameters, set_stage
from moe_adapter.surgery import (
    STATE,
    WRAPPED,
    Injection,
    apply_plan,
    base_parameters,
    injected_model,
    plain_name,
    unwrapped,
)


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter of an injected model into the directory `path`, over an older one if there is one.

    It holds the dual-path layers' new parameters and whatever base parameters are trainable; a PeftModel's LoRA is
    written beside them in peft's format. A kill at any moment leaves the old adapter or the new one whole.

    Raises:
        MoEAdapterError: the model has no dual-path layers, or weights still on the meta device.
    """
    owner = injected_model(model)
    index = {
        "config": getattr(owner, STATE).config.to_dict(),
        "layers": [plain_name(name) for name in dual_path_layers(owner)],
        "base": fingerprint(owner),
        "model": _describe_model(owner),
    }
    write_adapter(Path(path), index, _tensors_to_save(owner), lora_writer(model, owner))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load an adapter onto its base model, injecting first if need be; returns the model (a PeftModel with a LoRA).

    Everything is read and checked before the model is touched.

    Raises:
        MoEAdapterError: no adapter there, a newer format, an unknown field, a truncated file, another base (shapes,
            or a hash of sampled static weights), or an injected model of another config; the model stays as it was.
    """
    return load_named(model, Path(path), DEFAULT)


def load_named(model: nn.Module, folder: Path, name: str) -> nn.Module:
    """`load_adapter`, by whose `name` peft is to know the LoRA."""
    index = read_index(folder)
    owner = unwrapped(model)
    plan = _matching_plan(owner, _config(index, folder), index["layers"])
    _check_base(owner, index["base"])
    tensors = read_weights(folder / index["weights"])
    _check_tensors(tensors, owner, plan, folder / index["weights"])
    check_lora(model, folder, index["lora"], name)
    if plan is not None:
        apply_plan(owner, plan)
    _fill(owner, tensors)
    if index["lora"] is None:
        return model
    getattr(owner, STATE).lora = name
    model = load_lora(model, owner, folder / index["lora"], name)
    set_stage(model, 2)
    return model


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
    lora = {id(parameter) for parameter in lora_parameters(owner).values()}
    new = {id(p) for layer in dual_path_layers(owner).values() for p in layer.new_parameters().values()}
    brought = getattr(owner, STATE).base_values
    tensors = {}
    for name, parameter in base_parameters(owner).items():
        if id(parameter) in new or name in brought or (parameter.requires_grad and id(parameter) not in lora):
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
        for name, tensor in tensors.items():
            if id(parameters[name]) not in new:
                injection.base_values.setdefault(name, parameters[name].detach().clone())
            parameters[name].copy_(tensor)


def _config(index: dict[str, Any], folder: Path) -> DualPathConfig:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the adapter was made
            return DualPathConfig.from_dict(index["config"])
    except MoEAdapterError as error:
        raise MoEAdapterError(f"{folder / INDEX}: {error}") from error


def _matching_plan(owner: nn.Module, config: DualPathConfig, names: list[str]) -> Plan | None:
    """The plan that makes the adapter's layers; None where the model has them already."""
    if STATE not in vars(owner):
        try:
            return plan_injection(owner, lambda name, _: plain_name(name) in names, config.replace(layers=None))
        except MoEAdapterError as error:
            raise MoEAdapterError(f"the adapter doesn't fit this base: {error}") from error
    injected: DualPathConfig = getattr(owner, STATE).config
    if [plain_name(name) for name in dual_path_layers(owner)] != names:
        raise MoEAdapterError(f"the model's dual-path layers differ from the adapter's: {', '.join(names[:3])}, …")
    different = [key for key, value in config.to_dict().items() if injected.to_dict()[key] != value and key != "layers"]
    if different:
        raise MoEAdapterError(
            f"the model was injected with another {', '.join(different)} than the adapter: eject it, then load."
        )
    return None


def _check_base(owner: nn.Module, expected: dict[str, dict[str, Any]]) -> None:
    modules = {plain_name(name): module for name, module in owner.named_modules() if not name.endswith(WRAPPED)}
    unknown = []
    for name, base in expected.items():
        if name not in modules:
            raise MoEAdapterError(f"the adapter was made for another base: this one has no module {name}.")
        module = getattr(modules[name], "static_expert", modules[name])
        if execution_device(module).type == "meta":
            raise MoEAdapterError(f"{name} is on the meta device: load the base model's weights before the adapter.")
        found = describe_module(module)
        if base["hash"] is None or found["hash"] is None:
            unknown.append(name)
        elif found["shapes"] != base["shapes"]:
            raise MoEAdapterError(
                f"the adapter was made for another base: {name} has {found['shapes']}, expected {base['shapes']}."
            )
        elif found["hash"] != base["hash"]:
            raise MoEAdapterError(
                f"the adapter was made for another base: the weights of {name} differ from those it was trained on. "
                "Load the checkpoint that the adapter was trained on."
            )
    if unknown:
        warnings.warn(
            f"{unknown[0]} ({len(unknown)} such): weights that are quantised or not loaded can't be compared with "
            "the base that the adapter was trained on.",
            stacklevel=4,
        )


def _check_tensors(tensors: dict[str, torch.Tensor], owner: nn.Module, plan: Plan | None, file: Path) -> None:
    """All new parameters must be there; beside them only parameters that the base has; every shape must fit."""
    parameters = base_parameters(owner)
    base = {name: parameter.shape for name, parameter in parameters.items()}
    layers = dual_path_layers(owner)
    for site in plan.sites if plan else ():
        place = plain_name(site.name)
        inside = [name for name in base if name.startswith(place + ".")]
        base |= {name.replace(place, f"{place}.static_expert", 1): base.pop(name) for name in inside}
        layers[site.name] = new_layer(owner, site, plan.config, torch.device("meta"))  # pyright: ignore
    new = {
        f"{plain_name(prefix)}.{name}": parameter.shape
        for prefix, layer in layers.items()
        for name, parameter in layer.new_parameters().items()
    }
    if missing := sorted(set(new) - set(tensors)):
        raise MoEAdapterError(
            f"{file} lacks {missing[0]} ({len(missing)} such keys): it is no whole adapter of this model."
        )
    for name, tensor in tensors.items():
        expected = new.get(name, base.get(name))
        if expected is None:
            raise MoEAdapterError(f"{file} holds {name}, which the model hasn't got.")
        if name not in new and name in parameters and parameters[name].is_meta:
            raise MoEAdapterError(f"{file} brings {name}, which is offloaded here: load the adapter, then offload.")
        if tensor.shape != expected:
            raise MoEAdapterError(f"{file}: {name} is {tuple(tensor.shape)}, the model expects {tuple(expected)}.")
