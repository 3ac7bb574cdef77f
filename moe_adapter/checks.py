"""Whether an adapter fits a model: all that can be said before the model is touched."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_adapter.config import DualPathConfig
from moe_adapter.directory import INDEX
from moe_adapter.errors import MoEAdapterError
from moe_adapter.fingerprint import describe_module
from moe_adapter.injection import STATE
from moe_adapter.lora import WRAPPED, plain_name
from moe_adapter.objective import dual_path_layers
from moe_adapter.offload import execution_device
from moe_adapter.plan import Plan, new_layer, plan_injection


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a model will be with its dual-path layers: its modules and what is new of its parameters, by plain name."""

    modules: dict[str, nn.Module]
    new: frozenset[str]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{prefix}.{name}".removeprefix("."): parameter
            for prefix, module in self.modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }


def prospect(owner: nn.Module, plan: Plan | None) -> Prospect:
    """The model as it is, or as `plan` will make it: its layers stand on the meta device until then."""
    modules = {plain_name(name): module for name, module in owner.named_modules()}  # of wrapped ones the innermost
    layers = {plain_name(name): layer for name, layer in dual_path_layers(owner).items()}
    for site in plan.sites if plan else ():
        place = plain_name(site.name)
        modules = {name: module for name, module in modules.items() if not f"{name}.".startswith(f"{place}.")}
        layers[place] = new_layer(owner, site, plan.config, torch.device("meta"))  # pyright: ignore
        modules |= {plain_name(name): module for name, module in layers[place].named_modules(prefix=place)}
    new = frozenset(f"{place}.{name}" for place, layer in layers.items() for name in layer.new_parameters())
    return Prospect(modules=modules, new=new)


def matching_plan(owner: nn.Module, index: dict[str, Any], folder: Path) -> Plan | None:
    """The plan that makes the adapter's layers; None where the model has them already."""
    config, names = _config(index, folder), index["layers"]
    if STATE not in vars(owner):
        present = {plain_name(name) for name, _ in owner.named_modules()}
        if absent := [name for name in names if name not in present]:
            raise MoEAdapterError(
                f"the adapter doesn't fit this base: {type(owner).__name__} has no module {absent[0]} ({len(absent)} "
                f"such), where a {index['model']['class']} has an FFN. Load the base that the adapter was trained on."
            )
        try:
            return plan_injection(owner, lambda name, _: plain_name(name) in names, config.replace(layers=None))
        except MoEAdapterError as error:
            raise MoEAdapterError(f"the adapter doesn't fit this base: {error}") from error
    injected: DualPathConfig = getattr(owner, STATE).config
    found = [plain_name(name) for name in dual_path_layers(owner)]
    if found != names:
        raise MoEAdapterError(
            f"the model's dual-path layers differ from the adapter's: got {_first(found)}, expected {_first(names)}: "
            "eject_dual_path_moe(model), then load."
        )
    different = [key for key, value in config.to_dict().items() if injected.to_dict()[key] != value and key != "layers"]
    if different:
        raise MoEAdapterError(
            f"the model was injected with another {', '.join(different)} than the adapter: eject it, then load."
        )
    return None


def check_base(owner: nn.Module, expected: dict[str, dict[str, Any]]) -> None:
    """That the FFNs under the adapter's layers are those that it was trained on; a warning where that can't be told."""
    modules = {plain_name(name): module for name, module in owner.named_modules() if not name.endswith(WRAPPED)}
    unknown = []
    for name, base in expected.items():
        module = getattr(modules[name], "static_expert", modules[name])
        if execution_device(module).type == "meta":
            raise MoEAdapterError(f"{name} is on the meta device: load the base model's weights before the adapter.")
        found = describe_module(module)
        if base["hash"] is None or found["hash"] is None:
            unknown.append(name)
        elif found["shapes"] != base["shapes"]:
            raise MoEAdapterError(
                f"the adapter was made for another base: {name} has {found['shapes']}, expected {base['shapes']}. "
                "Load the checkpoint that the adapter was trained on."
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


def check_tensors(tensors: dict[str, torch.Tensor], model: Prospect, file: Path) -> None:
    """All new parameters must be there; beside them only parameters that the base has; every shape must fit."""
    if missing := sorted(model.new - set(tensors)):
        raise MoEAdapterError(
            f"{file} lacks {missing[0]} ({len(missing)} such keys): it is no whole adapter of this model, expected "
            "every parameter of its layers. Copy the adapter again."
        )
    parameters = model.parameters()
    for name, tensor in tensors.items():
        if name not in parameters:
            raise MoEAdapterError(
                f"{file} holds {name}, which the model hasn't got: load the base that the adapter was trained on."
            )
        expected = parameters[name]
        if name not in model.new and expected.is_meta:
            raise MoEAdapterError(f"{file} brings {name}, which is offloaded here: load the adapter, then offload.")
        if tensor.shape != expected.shape:
            raise MoEAdapterError(
                f"{file}: {name} is {tuple(tensor.shape)}, the model expects {tuple(expected.shape)}: load the base "
                "and the config that the adapter was trained with."
            )


def _config(index: dict[str, Any], folder: Path) -> DualPathConfig:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the adapter was made
            return DualPathConfig.from_dict(index["config"])
    except MoEAdapterError as error:
        raise MoEAdapterError(f"{folder / INDEX}: {error}") from error


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
