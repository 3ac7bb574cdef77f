"""The model card of an adapter: a README.md beside its files, made from them and from what its author says."""

from __future__ import annotations

import os
from math import prod
from numbers import Real
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_adapter.directory import LORA_WEIGHTS, as_folder, read_index, replace_file
from moe_adapter.errors import MoEAdapterError
from moe_adapter.hub import hub

CARD = "README.md"
NOT_STATED = "Not stated by the author."


def write_card(
    path: str | os.PathLike,
    *,
    training_data: str | None = None,
    metrics: dict[str, float] | None = None,
    dataset: str | None = None,
    language: list[str] | None = None,
    license: str | None = None,
) -> Path:
    """Write the model card of the adapter in the directory `path`, over an older one; returns its place.

    Args:
        training_data: what the adapter was trained on, in words.
        metrics: results by name, such as {"BLEU-1": 41.2}; they go into the card's metadata too.
        dataset: what the results were measured on, in words.
        language, license: codes for the card's metadata, as the Hugging Face Hub knows them.

    Raises:
        MoEAdapterError: no adapter there, results that are no numbers by name, or no huggingface_hub.
    """
    folder = as_folder(path)
    index, results = read_index(folder), _checked(metrics)
    header = _metadata(index, results, dataset, language=language, license=license)
    text = f"---\n{header}\n---\n\n{_body(folder, index, training_data, results, dataset)}"
    replace_file(folder / CARD, text.encode())
    return folder / CARD


def _metadata(index: dict[str, Any], metrics: dict[str, float], dataset: str | None, **codes: Any) -> str:
    """The card's YAML header; the hub shows its results as the model's."""
    results = [
        hub().EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=dataset or NOT_STATED,
            metric_type=name.lower(),
            metric_name=name,
            metric_value=float(value),
        )
        for name, value in metrics.items()
    ]
    data = hub().ModelCardData(
        base_model=index["model"]["name"],
        library_name="moe-adapter",
        tags=["moe-adapter", "mixture-of-experts"],
        eval_results=results or None,
        model_name=f"Mixture-of-experts adapter for {_base(index)}" if results else None,
        **codes,
    )
    return data.to_yaml()


def _body(
    folder: Path, index: dict[str, Any], training_data: str | None, metrics: dict[str, float], dataset: str | None
) -> str:
    base = _base(index)
    new, lora = count_parameters(folder / index["weights"]), 0
    if index["lora"]:
        lora = count_parameters(folder / index["lora"] / LORA_WEIGHTS)
    sizes = {
        "base, frozen": index["model"]["parameters"],
        "dual-path layers": new,
        **({"LoRA": lora} if lora else {}),
        "all": index["model"]["parameters"] + new + lora,
    }
    results = _table("metric", "value", metrics) if metrics else NOT_STATED
    if metrics and dataset:
        results = f"On {dataset}:\n\n{results}"
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
    lines = [f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()]
    return "\n".join([f"| {key} | {value} |", "|---|---:|", *lines])


def _cell(content: Any) -> str:
    return " ".join(str(content).split()).replace("|", r"\|")


def _base(index: dict[str, Any]) -> str:
    return index["model"]["name"] or index["model"]["class"]


def _checked(metrics: Any) -> dict[str, float]:
    results = {} if metrics is None else metrics
    if not isinstance(results, dict) or not all(isinstance(value, Real) for value in results.values()):
        raise MoEAdapterError(
            f'write_card: got the metrics {metrics!r}, expected numbers by name: metrics={{"BLEU-1": 41.2}}.'
        )
    return results
