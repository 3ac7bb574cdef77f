"""One adapter from several runs on one base: the weighted average of their parameters."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from moe_adapter.directory import as_folder, read_index, read_weights, write_adapter
from moe_adapter.errors import MoEAdapterError
from moe_adapter.lora_files import merge_loras

# Config fields that say nothing of what the parameters mean; the layers themselves are compared.
MAY_DIFFER = {"backend", "balance_coef", "expert_init", "init_std", "lam_init", "layers"}


def merge_adapters(paths: Sequence[str | os.PathLike], weights: Sequence[float], out: str | os.PathLike) -> None:
    """Write to `out` the adapter whose parameters are the average of those in `paths`, weighted by `weights`.

    Σ_i w_i·θ_i / Σ_i w_i. It makes sense for runs that went out from one start, such as one stage I, and saw different
    data; experts that learnt apart from the first step have no common order. LoRAs beside them are merged so that
    their updates of the base are averaged, ΔW = Σ_i w_i·ΔW_i / Σ_i w_i, at the sum of their ranks.

    Raises:
        MoEAdapterError: no two adapters, weights that fit no average, or adapters of another base or shape.
    """
    if isinstance(paths, str | os.PathLike):
        raise MoEAdapterError(f"merge_adapters: got one path, {str(paths)!r}, expected a list of at least 2.")
    folders, target = [as_folder(path) for path in paths], as_folder(out)
    shares = _shares(weights, len(folders))
    indices = [read_index(folder) for folder in folders]
    for folder, index in zip(folders[1:], indices[1:], strict=True):
        _check_same(indices[0], index, folders[0], folder)
    write_lora = _lora_writer(folders, indices, shares)
    average: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for folder, index, share in zip(folders, indices, shares, strict=True):
        tensors = read_weights(folder / index["weights"])
        dtypes = dtypes or {name: tensor.dtype for name, tensor in tensors.items()}
        _check_shapes(average or tensors, tensors, folders[0], folder)
        for name, tensor in tensors.items():
            part = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * share
            average[name] = average[name] + part if name in average else part
    tensors = {name: tensor.to(dtypes[name]) for name, tensor in average.items()}
    described = {key: indices[0][key] for key in ("config", "layers", "base", "model")}
    write_adapter(target, described, tensors, write_lora)


def _shares(weights: Sequence[float], count: int) -> list[float]:
    if count < 2:
        raise MoEAdapterError(f"merge_adapters: got {count} adapter, expected at least 2: name the runs to average.")
    if not isinstance(weights, Sequence) or not all(isinstance(weight, Real) for weight in weights):
        raise MoEAdapterError(f"merge_adapters: got weights {weights!r}, expected one number ≥ 0 for each adapter.")
    if len(weights) != count:
        raise MoEAdapterError(f"merge_adapters: got {len(weights)} weights for {count} adapters, expected one each.")
    total = sum(weights)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or total == 0:
        raise MoEAdapterError(f"merge_adapters: got weights {list(weights)}, expected numbers ≥ 0, not all of them 0.")
    return [weight / total for weight in weights]


def _check_same(first: dict[str, Any], other: dict[str, Any], folder: Path, other_folder: Path) -> None:
    """That two adapters are of one config, one base and one set of layers."""
    different = [key for key in first["config"] if first["config"][key] != other["config"].get(key)]
    different = [f"config.{key}" for key in different if key not in MAY_DIFFER]
    different += [key for key in ("layers", "base") if first[key] != other[key]]
    if different:
        raise MoEAdapterError(
            f"{folder} and {other_folder} can't be averaged: they differ in {', '.join(different)}; expected runs of "
            "one config on one base."
        )


def _check_shapes(
    first: dict[str, torch.Tensor], other: dict[str, torch.Tensor], folder: Path, other_folder: Path
) -> None:
    wrong = sorted(set(first) ^ set(other)) or [name for name in first if first[name].shape != other[name].shape]
    if wrong:
        found = [tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else "absent" for tensors in (first, other)]
        raise MoEAdapterError(
            f"{folder} and {other_folder} can't be averaged: {wrong[0]} is {found[0]} in the one and {found[1]} in the "
            "other; expected equal shapes."
        )


def _lora_writer(
    folders: list[Path], indices: list[dict[str, Any]], shares: list[float]
) -> Callable[[Path], object] | None:
    places = [index["lora"] for index in indices]
    if not any(places):
        return None
    if not all(places):
        without = folders[places.index(None)]
        raise MoEAdapterError(
            f"{without} holds no LoRA and others do, expected all or none: merge adapters of one stage."
        )
    return merge_loras([folder / place for folder, place in zip(folders, places, strict=True)], shares)
