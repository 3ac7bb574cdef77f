"""An adapter's directory: safetensors and JSON, written atomically and read with suspicion.

It holds `moe_adapter.json` (format version, config, layer names, what the base is) and the weights file that it names;
a LoRA beside it lies in a folder in peft's own format, which it names too. The names of both carry a hash of their
content, and the JSON is replaced last: until then the old adapter is whole, whatever happens. Other files, such as a
model card, are left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_adapter.errors import MoEAdapterError

INDEX = "moe_adapter.json"
LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
FORMAT_VERSION = 1
FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "config": (dict,),
    "layers": (list,),
    "base": (dict,),
    "model": (dict,),
    "weights": (str,),
    "lora": (str, type(None)),
}
HASH = "[0-9a-f]" * 16
OURS = (f"weights-{HASH}.safetensors", f"lora-{HASH}")  # globs of what a save writes beside the index
TEMPORARY = f".{HASH}{HASH}.tmp"


def as_folder(path: Any) -> Path:
    """The path of an adapter's directory. Raises MoEAdapterError for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise MoEAdapterError(f"got {path!r} for an adapter's directory, expected a path: text, or a pathlib.Path.")
    return Path(path)


def write_adapter(
    folder: Path,
    index: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    write_lora: Callable[[Path], object] | None,
) -> None:
    """Write an adapter's files, the index last. `write_lora` writes a LoRA into a folder, in peft's format."""
    if folder.exists() and not folder.is_dir():
        raise MoEAdapterError(f"{folder} is a file: an adapter takes a directory; give another path.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = _write_weights(folder, tensors)
    lora = _write_lora(folder, write_lora) if write_lora else None
    whole = {"format_version": FORMAT_VERSION, **index, "weights": weights, "lora": lora}
    replace_file(folder / INDEX, json.dumps(whole, indent=2).encode())
    _remove_stale(folder, keep={weights, lora})


def read_index(folder: Path) -> dict[str, Any]:
    """The `moe_adapter.json` of a directory. Raises MoEAdapterError: none there, damaged, or a newer format."""
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
    _check_fields(index, file)
    return index


def _check_fields(index: dict[str, Any], file: Path) -> None:
    if wrong := sorted(set(index) ^ set(FIELDS)):
        raise MoEAdapterError(
            f"{file}: unknown or missing fields: {', '.join(wrong)}; expected {', '.join(sorted(FIELDS))}: copy the "
            "adapter again."
        )
    for field, kinds in FIELDS.items():
        if not isinstance(index[field], kinds):
            raise MoEAdapterError(
                f"{file} is damaged: {field} is {index[field]!r}, expected a {kinds[0].__name__}. Copy the adapter "
                "again."
            )
    base = index["base"]
    described = all(isinstance(entry, dict) and {"shapes", "hash"} <= set(entry) for entry in base.values())
    if not described or list(base) != index["layers"] or not {"name", "class", "parameters"} <= set(index["model"]):
        raise MoEAdapterError(
            f"{file} is damaged: base and model don't describe the base of {len(index['layers'])} layers. Copy the "
            "adapter again."
        )


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file. Raises MoEAdapterError: it is missing, or not what its name says."""
    if not file.is_file():
        raise MoEAdapterError(f"{file} is missing: copy the adapter again.")
    try:
        if _digest(file) not in file.name:
            raise MoEAdapterError(f"{file} is truncated or damaged: its content doesn't match its name. Copy it again.")
        return load_file(file)
    except SafetensorError as error:
        raise MoEAdapterError(f"{file} is truncated or damaged ({error}): copy the adapter again.") from error


def check_lora_files(place: Path) -> None:
    """That a LoRA's folder is whole. Raises MoEAdapterError: files are missing, or not what the folder's name says."""
    if not _is_lora(place):
        raise MoEAdapterError(
            f"{place} is no LoRA in peft's format: expected {LORA_CONFIG} and {LORA_WEIGHTS}; copy the adapter again."
        )
    if _lora_digest(place) not in place.name:
        raise MoEAdapterError(f"{place} is truncated or damaged: its content doesn't match its name. Copy it again.")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that at any moment the old one or the new one is there, whole."""
    temporary = _temporary(path.parent)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    temporary = _temporary(folder)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        name = f"weights-{_digest(temporary)}.safetensors"
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def _write_lora(folder: Path, write: Callable[[Path], object]) -> str:
    """peft writes a LoRA of another name than "default" into a folder of that name."""
    temporary = _temporary(folder)
    try:
        write(temporary)
        place = next(temporary.rglob(LORA_CONFIG)).parent
        name = f"lora-{_lora_digest(place)}"
        if not _is_lora(folder / name) or _lora_digest(folder / name) not in name:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(place, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def _remove_stale(folder: Path, keep: set[str | None]) -> None:
    """What older saves, finished or killed, left behind: by their names with a hash, which no one else gives."""
    for entry in folder.iterdir():
        if entry.name in keep or not any(fnmatchcase(entry.name, ours) for ours in (*OURS, TEMPORARY)):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _temporary(folder: Path) -> Path:
    return folder / f".{uuid.uuid4().hex}.tmp"


def _is_lora(place: Path) -> bool:
    return (place / LORA_CONFIG).is_file() and (place / LORA_WEIGHTS).is_file()


def _lora_digest(place: Path) -> str:
    return _digest(place / LORA_CONFIG, place / LORA_WEIGHTS)


def _digest(*files: Path) -> str:
    """16 hexadecimal digits of the files' content."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]
