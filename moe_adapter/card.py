"""The model card of an adapter: a README.md beside its files, made from them and from what its author says."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_adapter.directory import read_index, replace_file
from moe_adapter.errors import MoEAdapterError
from moe_adapter.lora import WEIGHTS

CARD = "README.md"
NOT_STATED = "Not stated by the author."


def write_card(
    path: str | os.PathLike,
    *,
    training_data: str | None = None,
    metrics: dict[str, float] | None = None,
    language: list[str] | None = None,
    license: str | None = None,
) -> Path:
    """Write the model card of the adapter in the directory `path`, over an older one; returns its place.

    Args:
        training_data: what the adapter was trained on, in words.
        metrics: results by name, such as {"BLEU-1": 41.2}.
        language, license: codes for the card's metadata, as the Hugging Face Hub knows them.

    Raises:
        MoEAdapterError: no adapter there, or no huggingface_hub.
    """
    folder = Path(path)
    index = read_index(folder)
    text = f"---\n{_metadata(index, language, license)}\n---\n\n{_body(folder, index, training_data, metrics)}"
    replace_file(folder / CARD, text.encode())
    return folder / CARD


def _metadata(index: dict[str, Any], language: list[str] | None, license: str | None) -> str:
    tags = ["moe-adapter", "mixture-of-experts"]
    base = index["model"]["name"]
    return (
        hub()
        .ModelCardData(base_model=base, library_name="moe-adapter", tags=tags, language=language, license=license)
        .to_yaml()
    )


def _body(folder: Path, index: dict[str, Any], training_data: str | None, metrics: dict[str, float] | None) -> str:
    base = index["model"]["name"] or index["model"]["class"]
    new, lora = count_parameters(folder / index["weights"]), 0
    if index["lora"]:
        lora = count_parameters(folder / index["lora"] / WEIGHTS)
    sizes = {
        "base, frozen": index["model"]["parameters"],
        "dual-path layers": new,
        **({"LoRA": lora} if lora else {}),
        "all": index["model"]["parameters"] + new + lora,
    }
    results = _table("metric", "value", metrics) if metrics else NOT_STATED
    return f"""# Mixture-of-experts adapter for {base}

{len(index["layers"])} feed-forward blocks of `{index["model"]["class"]}` became dual-path mixtures of experts: the
block itself, frozen, beside new experts.

```python
from moe_adapter import load_adapter

model = load_adapter(model, "path/to/this/directory")  # onto {base}
```

## Parameters

{_table("part", "parameters", {part: f"{count:,}" for part, count in sizes.items()})}

## Configuration

{_table("field", "value", {key: f"`{value}`" for key, value in index["config"].items() if value is not None})}

## Training data

{training_data or NOT_STATED}

## Evaluation

{results}
"""


def count_parameters(file: Path) -> int:
    """The number of values in a safetensors file, read off its header."""
    with safe_open(file, "pt") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _table(key: str, value: str, rows: dict[str, Any]) -> str:
    return "\n".join([f"| {key} | {value} |", "|---|---:|", *(f"| {k} | {v} |" for k, v in rows.items())])


def hub():
    """The library huggingface_hub. Raises MoEAdapterError where it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MoEAdapterError(
            'model cards and the hub need huggingface_hub: pip install "moe-adapter[hub]".'
        ) from error
    return huggingface_hub
