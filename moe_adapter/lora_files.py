"""The LoRA of stage II beside the MoE: in peft's own format, checked, written, loaded and merged."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from moe_adapter.directory import LORA_WEIGHTS, check_lora_files
from moe_adapter.errors import MoEAdapterError
from moe_adapter.lora import active_loras, is_peft_model, lora_parameters, plain_name, switch_lora

DEFAULT = "default"  # peft's name for an adapter that was given none
SHAPE = ("peft_type", "r", "target_modules", "rank_pattern", "use_dora")  # what two LoRAs of one name share
PREFIX = "base_model.model."  # of the names in peft's files


def lora_writer(model: nn.Module, owner: nn.Module) -> Callable[[Path], object] | None:
    """What writes a PeftModel's active LoRA into a folder; None where it is off or absent.

    Raises:
        MoEAdapterError: the model has a LoRA but is no PeftModel, or several are active.
    """
    names = active_loras(owner)
    if not names:
        return None
    wrapper: Any = next((part for part in model.modules() if is_peft_model(part)), None)
    if wrapper is None:
        raise MoEAdapterError(
            "the model holds LoRA layers: pass the PeftModel itself, so that the LoRA is saved with it."
        )
    if len(names) != 1:
        raise MoEAdapterError(
            f"{len(names)} LoRAs are active ({', '.join(names)}), expected 1: set_adapter the one to save."
        )
    return lambda folder: wrapper.save_pretrained(folder, selected_adapters=list(names))


def check_lora(model: nn.Module, place: Path, name: str, modules: dict[str, nn.Module], taken: Collection[str]) -> None:
    """That the LoRA in `place` is whole, fits `modules`, and may be called `name` beside those that peft knows.

    Raises:
        MoEAdapterError: it doesn't, or peft is missing, or the model is a PeftModel's base without its wrapper.
    """
    check_lora_files(place)
    config = _peft().PeftConfig.from_pretrained(str(place))
    if lora_parameters(model) and not is_peft_model(model):
        raise MoEAdapterError("the model holds LoRA layers already: pass the PeftModel itself.")
    if name in taken:
        raise MoEAdapterError(
            f"the model has a LoRA {name!r} of its own, which the adapter's would overwrite: load onto the model "
            "without it, or by another name, add_adapter(model, path, name) of moe_adapter.adapters."
        )
    known = getattr(model, "peft_config", {}).get(name) if is_peft_model(model) else None
    different = [key for key in SHAPE if known and getattr(known, key, None) != getattr(config, key, None)]
    if different:
        raise MoEAdapterError(
            f"the model has a LoRA {name!r} of another {', '.join(different)} than the adapter's: delete it first, "
            "or load the adapter by another name, see moe_adapter.adapters."
        )
    _check_shapes(place, config, modules)


def _check_shapes(place: Path, config: Any, modules: dict[str, nn.Module]) -> None:
    """That peft would make the very tensors of the file, tried on stand-ins of the modules that they are for."""
    found = _shapes(place)
    targets = _targets(found)
    if absent := [module for module in targets if module not in modules]:
        raise MoEAdapterError(
            f"{place} is a LoRA for {absent[0]} ({len(absent)} such), which the model hasn't got: load the base "
            "that the adapter was trained on."
        )
    wanted = _peft_shapes(place, config, {module: modules[module] for module in targets}) if targets else {}
    for key in found:
        if ".lora_" not in key:  # a copy of a part of the base, whose it has to resemble
            module, _, parameter = plain_name(key).rpartition(".")
            wanted[key] = tuple(getattr(getattr(modules.get(module), parameter, None), "shape", found[key]))
    for key in sorted(wanted.keys() | found.keys()):
        if found.get(key) != wanted.get(key):
            raise MoEAdapterError(
                f"{place} doesn't fit this base: {key} is {found.get(key, 'absent')}, the model expects "
                f"{wanted.get(key, 'none')}. Load the base that the adapter was trained on, with its vocabulary."
            )


def _peft_shapes(place: Path, config: Any, modules: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    peft, twin = _peft(), nn.Module()
    for name, module in modules.items():
        *parents, last = name.split(".")
        parent: nn.Module = twin
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, _stand_in(module))
    tried = dataclasses.replace(_exactly(config, modules), modules_to_save=None, init_lora_weights=True)
    tried.trainable_token_indices = None
    try:
        peft.inject_adapter_in_model(tried, twin, low_cpu_mem_usage=True)
        state = peft.get_peft_model_state_dict(twin, save_embedding_layers=False)
    except Exception as error:
        raise MoEAdapterError(
            f"{place}: peft {peft.__version__} can't put this LoRA onto the model ({error}). Load the base that the "
            "adapter was trained on, with the peft that wrote it."
        ) from error
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _stand_in(module: nn.Module) -> nn.Module:
    """A module of the same kind and sizes on the meta device."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):  # quantised ones too
        return nn.Linear(module.in_features, module.out_features, device="meta")  # pyright: ignore
    twin = copy.copy(module)
    twin._modules = {name: child and _stand_in(child) for name, child in module._modules.items()}  # pyright: ignore
    twin._parameters = {  # pyright: ignore
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for name, p in module._parameters.items()
    }
    return twin


def _exactly(config: Any, modules: Collection[str]) -> Any:
    """The config for just these modules: an injection adds parts that its author's targets may match as well."""
    if config.peft_type != "LORA" or getattr(config, "target_parameters", None) or not modules:
        return config
    exact = "|".join(map(re.escape, modules))
    return dataclasses.replace(
        config, target_modules=exact, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def _shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a LoRA's tensors by name within the model, read off the file's header."""
    with safe_open(place / LORA_WEIGHTS, "pt") as file:
        return {key.removeprefix(PREFIX): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _targets(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The modules that a LoRA is for, outermost ones, by the names of its tensors."""
    names = sorted({plain_name(key.partition(".lora_")[0]) for key in shapes if ".lora_" in key})
    return [name for name in names if not any(name.startswith(other + ".") for other in names)]


def load_lora(model: nn.Module, owner: nn.Module, place: Path, name: str) -> nn.Module:
    """Put the LoRA of `place` onto the model by peft, under `name`, and let it alone answer; gives the PeftModel."""
    peft = _peft()
    config: Any = peft.PeftConfig.from_pretrained(str(place))
    exact = _exactly(config, _targets(_shapes(place)))
    wrapper: Any = model
    if model is owner:
        wrapper = peft.PeftModel.from_pretrained(owner, str(place), name, is_trainable=True, config=exact)  # pyright: ignore
    else:
        if name not in wrapper.peft_config:
            wrapper.add_adapter(name, exact)
        wrapper.load_adapter(str(place), name, is_trainable=True)
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(wrapper.peft_config[name], key, getattr(config, key, None))  # as its author named them
    switch_lora(wrapper, [name])
    return wrapper


def merge_loras(folders: list[Path], shares: list[float]) -> Callable[[Path], object]:
    """What writes the LoRA whose update of the base is ΔW = Σ_i share_i·ΔW_i, its rank the sum of theirs.

    ΔW_i = s_i·B_i·A_i, so stacking the A_i and, scaled, the B_i gives the sum exactly.

    Raises:
        MoEAdapterError: damaged LoRAs, LoRAs on different modules, or of a kind that is more than B·A.
    """
    for folder in folders:
        check_lora_files(folder)
    configs: list[Any] = [_peft().LoraConfig.from_pretrained(str(folder)) for folder in folders]
    states = [load_file(folder / LORA_WEIGHTS) for folder in folders]
    for folder, config, state in zip(folders, configs, states, strict=True):
        plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in state)
        if not plain or config.rank_pattern or config.alpha_pattern:
            raise MoEAdapterError(
                f"{folder} holds more than plain A and B matrices of one rank, which alone can be averaged: merge the "
                "adapters without their LoRAs, or train them with a plain one."
            )
        if state.keys() != states[0].keys():
            raise MoEAdapterError(
                f"{folders[0]} and {folder} are LoRAs on different modules: they can't be averaged; expected runs with "
                "one target_modules."
            )
    scales = [config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r) for config in configs]
    merged = {}
    for name in states[0]:
        is_b = name.endswith(".lora_B.weight")
        factors = [share * scale if is_b else 1.0 for share, scale in zip(shares, scales, strict=True)]
        parts = [state[name] * factor for state, factor in zip(states, factors, strict=True)]
        merged[name] = torch.cat(parts, dim=1 if is_b else 0).contiguous()
    rank = sum(config.r for config in configs)

    def write(folder: Path) -> None:
        dataclasses.replace(configs[0], r=rank, lora_alpha=rank, use_rslora=False).save_pretrained(str(folder))
        save_file(merged, folder / LORA_WEIGHTS, metadata={"format": "pt"})

    return write


def _peft():
    try:
        import peft
    except ImportError as error:
        raise MoEAdapterError('the adapter holds a LoRA: pip install "moe-adapter[peft]".') from error
    return peft
