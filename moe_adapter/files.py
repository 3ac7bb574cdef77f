"""Adapter files: what the injection added and training changed, as safetensors and JSON, written atomically.

A directory holds `moe_adapter.json` (format version, config, layer names, the base's fingerprint) and the weights
file that it names; a LoRA beside it lies in a folder in peft's own format, which it names too. Names carry a hash of
the content, and the JSON is replaced last: until then the old adapter is whole, whatever happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moe_adapter.config import DualPathConfig
from moe_adapter.errors import MoEAdapterError
from moe_adapter.fingerprint import describe_module, fingerprint
from moe_adapter.objective import dual_path_layers
from moe_adapter.plan import Plan, new_layer, plan_injection
from moe_adapter.stages import lora_parameters, set_stage
from moe_adapter.surgery import STATE, apply_plan, injected_model, unwrapped

INDEX = "moe_adapter.json"
FORMAT_VERSION = 1
FIELDS = {"format_version", "config", "layers", "base", "weights", "lora"}


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter of an injected model into the directory `path`, over an older one if there is one.

    It holds the dual-path layers' new parameters and whatever base parameters are trainable; a PeftModel's LoRA is
    written beside them in peft's format. A kill at any moment leaves the old adapter or the new one whole.

    Raises:
        MoEAdapterError: the model has no dual-path layers, or weights still on the meta device.
    """
    owner, folder = injected_model(model), Path(path)
    tensors = _tensors_to_save(owner)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _write_weights(folder, tensors)
    lora = _write_lora(model, owner, folder)
    index = {
        "format_version": FORMAT_VERSION,
        "config": getattr(owner, STATE).config.to_dict(),
        "layers": list(dual_path_layers(owner)),
        "base": fingerprint(owner),
        "weights": weights,
        "lora": lora,
    }
    _replace(folder / INDEX, json.dumps(index, indent=2).encode())
    _remove_stale(folder, keep={weights, lora})


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load an adapter onto its base model, injecting first if need be; returns the model (a PeftModel with a LoRA).

    Everything is read and checked before the model is touched.

    Raises:
        MoEAdapterError: no adapter there, a newer format, an unknown field, a truncated file, another base (shapes,
            or a hash of sampled static weights), or an injected model of another config; the model stays as it was.
    """
    folder = Path(path)
    index = _read_index(folder)
    config = _config(index, folder)
    owner = unwrapped(model)
    plan = _matching_plan(owner, config, index["layers"])
    _check_base(owner, index["base"])
    tensors = _read_weights(folder / index["weights"])
    _check_tensors(tensors, owner, plan, folder / index["weights"])
    _check_lora(folder, index["lora"])
    if plan is not None:
        apply_plan(owner, plan)
    parameters = dict(owner.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return _load_lora(model, owner, folder / index["lora"]) if index["lora"] else model


def _tensors_to_save(owner: nn.Module) -> dict[str, torch.Tensor]:
    lora = {id(parameter) for parameter in lora_parameters(owner).values()}
    new = {id(p) for layer in dual_path_layers(owner).values() for p in layer.new_parameters().values()}
    tensors = {}
    for name, parameter in owner.named_parameters():
        if id(parameter) in new or (parameter.requires_grad and id(parameter) not in lora):
            if parameter.is_meta:
                raise MoEAdapterError(f"{name} is on the meta device: load or materialise the model before saving.")
            tensors[name.replace(".base_layer.", ".")] = parameter.detach().to("cpu").contiguous()
    return tensors


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        name = f"weights-{digest[:16]}.safetensors"
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def _write_lora(model: nn.Module, owner: nn.Module, folder: Path) -> str | None:
    """Write the LoRA of a PeftModel in peft's format; None without one."""
    if not lora_parameters(owner):
        return None
    wrapper = next(
        (m for m in model.modules() if hasattr(m, "peft_config") and hasattr(m, "save_pretrained") and m is not owner),
        None,
    )
    if wrapper is None:
        raise MoEAdapterError(
            "the model holds LoRA layers: pass the PeftModel itself, so that the LoRA is saved with it."
        )
    name = f"lora-{uuid.uuid4().hex[:16]}"
    wrapper.save_pretrained(folder / name)  # pyright: ignore
    return name


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(folder: Path, keep: set[str | None]) -> None:
    """What older saves, finished or killed, left behind."""
    for entry in folder.iterdir():
        if entry.name in keep:
            continue
        if entry.name.startswith("lora-") and entry.is_dir():
            shutil.rmtree(entry)
        elif entry.match("weights-*.safetensors") or entry.match(".*.tmp"):
            entry.unlink(missing_ok=True)


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise MoEAdapterError(f"{folder} holds no adapter: {INDEX} is missing; expected a directory of save_adapter().")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoEAdapterError(f"{file} is damaged ({error}): copy the adapter again.") from error
    version = index.get("format_version") if isinstance(index, dict) else None
    if not isinstance(version, int):
        raise MoEAdapterError(f"{file}: format_version is {version!r}; expected the output of save_adapter().")
    if version > FORMAT_VERSION:
        raise MoEAdapterError(
            f"{file} has format version {version}, this moe-adapter reads up to {FORMAT_VERSION}: upgrade moe-adapter."
        )
    if set(index) != FIELDS:
        wrong = ", ".join(sorted(set(index) ^ FIELDS))
        raise MoEAdapterError(f"{file}: unknown or missing fields: {wrong}; expected {', '.join(sorted(FIELDS))}.")
    return index


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
            return plan_injection(owner, lambda name, _: name in names, config.replace(layers=None))
        except MoEAdapterError as error:
            raise MoEAdapterError(f"the adapter doesn't fit this base: {error}") from error
    injected: DualPathConfig = getattr(owner, STATE).config
    if list(dual_path_layers(owner)) != names:
        raise MoEAdapterError(f"the model's dual-path layers differ from the adapter's: {', '.join(names[:3])}, …")
    different = [key for key, value in config.to_dict().items() if injected.to_dict()[key] != value and key != "layers"]
    if different:
        raise MoEAdapterError(
            f"the model was injected with another {', '.join(different)} than the adapter: eject it, then load."
        )
    return None


def _check_base(owner: nn.Module, expected: dict[str, dict[str, Any]]) -> None:
    modules, unknown = dict(owner.named_modules()), []
    for name, base in expected.items():
        if name not in modules:
            raise MoEAdapterError(f"the adapter was made for another base: this one has no module {name}.")
        module = getattr(modules[name], "static_expert", modules[name])
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
            stacklevel=3,
        )


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise MoEAdapterError(f"{file} is missing: copy the adapter again.")
    try:
        with open(file, "rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
        if digest[:16] not in file.name:
            raise MoEAdapterError(f"{file} is truncated or damaged: its content doesn't match its name. Copy it again.")
        return load_file(file)
    except SafetensorError as error:
        raise MoEAdapterError(f"{file} is truncated or damaged ({error}): copy the adapter again.") from error


def _check_tensors(tensors: dict[str, torch.Tensor], owner: nn.Module, plan: Plan | None, file: Path) -> None:
    """All new parameters must be there; beside them only parameters that the base has; every shape must fit."""
    base = {name: parameter.shape for name, parameter in owner.named_parameters()}
    new: dict[str, torch.Size] = {}
    for site in plan.sites if plan else ():
        inside = [name for name in base if name.startswith(site.name + ".")]
        base |= {name.replace(site.name, f"{site.name}.static_expert", 1): base.pop(name) for name in inside}
        layer = new_layer(site, plan.config, torch.device("meta"))  # pyright: ignore
        new |= {f"{site.name}.{name}": parameter.shape for name, parameter in layer.new_parameters().items()}
    for prefix, layer in dual_path_layers(owner).items():
        new |= {f"{prefix}.{name}": parameter.shape for name, parameter in layer.new_parameters().items()}
    if missing := sorted(set(new) - set(tensors)):
        raise MoEAdapterError(
            f"{file} lacks {missing[0]} ({len(missing)} such keys): it is no whole adapter of this model."
        )
    for name, tensor in tensors.items():
        expected = new.get(name, base.get(name))
        if expected is None:
            raise MoEAdapterError(f"{file} holds {name}, which the model hasn't got.")
        if tensor.shape != expected:
            raise MoEAdapterError(f"{file}: {name} is {tuple(tensor.shape)}, the model expects {tuple(expected)}.")


def _check_lora(folder: Path, name: str | None) -> None:
    if name is not None and not (folder / name / "adapter_config.json").is_file():
        raise MoEAdapterError(f"{folder / name} is no LoRA in peft's format: copy the adapter again.")


def _load_lora(model: nn.Module, owner: nn.Module, folder: Path) -> nn.Module:
    """Put the LoRA of `folder` onto the model by peft; gives the PeftModel, in stage II."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MoEAdapterError('the adapter holds a LoRA: pip install "moe-adapter[peft]".') from error
    if model is owner:
        model = PeftModel.from_pretrained(owner, str(folder), is_trainable=True)  # pyright: ignore
    else:
        model.load_adapter(str(folder), "default", is_trainable=True)  # pyright: ignore
    set_stage(model, 2)
    return model
