"""An adapter's directory: safetensors and JSON, written atomically and read with suspicion.

It holds `moe_adapter.json` (format version, config, layer names, what the base is) and the weights file that it names;
a LoRA beside it lies in a folder in peft's own format, which it names too. The weights' name carries a hash of their
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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_adapter.errors import MoEAdapterError

INDEX = "moe_adapter.json"
FORMAT_VERSION = 1
FIELDS = {"format_version", "config", "layers", "base", "model", "weights", "lora"}


def write_adapter(
    folder: Path,
    index: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    write_lora: Callable[[Path], str | None],
) -> None:
    """Write an adapter's files, the index last. `write_lora` puts a LoRA into the folder and gives its place there."""
    if folder.exists() and not folder.is_dir():
        raise MoEAdapterError(f"{folder} is a file: an adapter takes a directory; give another path.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = _write_weights(folder, tensors)
    lora = write_lora(folder)
    whole = {"format_version": FORMAT_VERSION, **index, "weights": weights, "lora": lora}
    replace_file(folder / INDEX, json.dumps(whole, indent=2).encode())
    _remove_stale(folder, keep={weights, lora.partition("/")[0] if lora else None})


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
    if set(index) != FIELDS:
        wrong = ", ".join(sorted(set(index) ^ FIELDS))
        raise MoEAdapterError(f"{file}: unknown or missing fields: {wrong}; expected {', '.join(sorted(FIELDS))}.")
    return index


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file. Raises MoEAdapterError: it is missing, or not what its name says."""
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


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that at any moment the old one or the new one is there, whole."""
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
