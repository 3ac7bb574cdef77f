"""`moe-adapter info`: what an adapter holds, or a routing record, read off its files; no base model is needed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._output import as_json, as_text
from moe_adapter.errors import MoEAdapterError

EXAMPLES = (
    "moe-adapter info runs/tiny/stage2",
    "moe-adapter info runs/tiny/routing.parquet",
    "moe-adapter info adapters/thyroid --json",
)


def add(subparsers: Any) -> None:
    help = "what an adapter or a routing record holds"
    parser = command(subparsers, "info", run, help=help, examples=EXAMPLES)
    parser.add_argument("path", type=Path, metavar="ADAPTER", help="an adapter's directory, or a record's Parquet file")


def run(options: argparse.Namespace) -> None:
    found = describe_record(options.path) if options.path.is_file() else describe_adapter(options.path)
    if options.json:
        print(as_json(found))
        return
    facts = {name: value for name, value in found.items() if name != "layers"}
    for name, value in facts.items():
        print(f"{name:<16}{_shown(value)}")
    print()
    print(as_text({name: [row[name] for row in found["layers"]] for name in found["layers"][0]}))


def describe_record(path: Path) -> dict[str, Any]:
    """The facts in a record's footer."""
    from moe_adapter.analysis.reader import RoutingRecord

    facts = dataclasses.asdict(RoutingRecord.open(path).facts)
    rows = [{"layer": number, **layer} for number, layer in enumerate(facts.pop("layers"))]
    return {"record": str(path), **facts, "bytes": path.stat().st_size, "layers": rows}


def describe_adapter(folder: Path) -> dict[str, Any]:
    """An adapter's index, and what its weights' header and its scalars say, layer by layer.

    Raises:
        MoEAdapterError: no adapter there, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    from moe_adapter.directory import read_index

    if not folder.is_dir():
        raise MoEAdapterError(f"there is no {folder}; expected an adapter's directory or a record's Parquet file.")
    index = read_index(folder)
    weights = folder / index["weights"]
    try:
        with safe_open(weights, "pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            scalars = {name: tensors.get_tensor(name).item() for name in shapes if name.endswith("_logit")}
    except (OSError, SafetensorError) as error:
        raise MoEAdapterError(f"{weights} is missing or damaged ({error}): copy the adapter again.") from error
    try:
        layers = [_layer(name, shapes, scalars, index["config"]) for name in index["layers"]]
    except (KeyError, TypeError) as error:
        raise MoEAdapterError(f"{folder}: its index lacks {error}: copy the adapter again.") from error
    of_layers = sum(row["parameters"] for row in layers)
    lora = _lora(folder / index["lora"]) if index["lora"] else None
    return {
        "adapter": str(folder),
        "format_version": index["format_version"],
        "base": index["model"],
        "config": index["config"],
        "parameters": of_layers,
        "base_parameters": sum(map(prod, shapes.values())) - of_layers,
        "lora": lora,
        "bytes": weights.stat().st_size + (lora or {}).get("bytes", 0),
        "layers": layers,
    }


def _layer(name: str, shapes: Mapping[str, tuple[int, ...]], scalars: Mapping[str, float], config: Mapping) -> dict:
    """A layer's sizes, by the shapes of its parameters, and its α and λ."""
    own = {key.removeprefix(f"{name}."): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
    gated = "experts.gate_up_proj" in own
    experts = own.get("experts.gate_up_proj") or own.get("experts.up_proj") or (0, 0, 0)
    shared = own.get("shared_expert.up_proj.weight", (0, 0))
    alpha, lam = (scalars.get(f"{name}.{part}_logit") for part in ("alpha", "lam"))
    return {
        "layer": name,
        "experts": experts[0],
        "top_k": config["top_k"] if experts[0] else 0,
        "expert_dim": experts[1] // (2 if gated else 1),
        "shared_expert_dim": shared[0],
        "parameters": sum(map(prod, own.values())),
        "alpha": None if alpha is None else _sigmoid(alpha),
        "lam": None if lam is None else _sigmoid(lam),
    }


def _lora(folder: Path) -> dict[str, Any]:
    import json

    from moe_adapter.card import count_parameters
    from moe_adapter.directory import LORA_CONFIG, LORA_WEIGHTS, check_lora_files

    check_lora_files(folder)
    config = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8"))
    return {
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "parameters": count_parameters(folder / LORA_WEIGHTS),
        "bytes": (folder / LORA_WEIGHTS).stat().st_size,
    }


def _sigmoid(logit: float) -> float:
    from math import exp

    return 1 / (1 + exp(-logit))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_shown(each)}" for name, each in value.items() if each is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
