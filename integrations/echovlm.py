"""The authors' released EchoVLM weights, in today's Qwen2-VL with dual-path layers.

The release is a Qwen2-VL checkpoint of transformers 4.4x with four parts more in each block:

    mlp.{gate,up,down}_proj                              the static expert
    moe.gate, moe.experts.{e}.{gate,up,down}_proj        router and routed experts
    moe.shared_expert.{gate,up,down}_proj, moe.shared_expert_gate
    coefficient                                          D → 2 with bias: c = softmax(coefficient(x))

and computes h + c₀·moe(x) + c₁·FFN(x), where moe(x) is sigmoid(shared_expert_gate(x))·S(x) plus the top-k experts
under a softmax over all of them. `DualPathConfig(mixing="token", router_softmax="all", preserve_base=False)` is that
layer. Every key of the checkpoint goes to one place in the model, and every place is filled by one key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from moe_adapter import DualPathConfig, MoEAdapterError, inject_dual_path_moe

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Fields that the release adds to Qwen2-VL's config, with the values that its code falls back on.
MOE_FIELDS = dict(num_experts_per_tok=2, norm_topk_prob=False, num_experts=None, moe_intermediate_size=None)
MOE_FIELDS |= dict(shared_expert_intermediate_size=None, output_router_logits=None, router_aux_loss_coef=None)


def load_released_echovlm(
    path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Qwen2VLForConditionalGeneration:
    """Read the released checkpoint in the directory `path`; returns the injected model in eval mode.

    Args:
        path: the download: config.json and model.safetensors, or its shards with their index.
        dtype: of the model; None takes the checkpoint's own. Routers are float32 in any case.
        device: where the model is to be; weights are read straight onto it.

    Raises:
        MoEAdapterError: a file is missing or damaged, or a key is missing, left over or of another shape.
    """
    folder = Path(path)
    values = _read_json(folder / "config.json")
    shards = _shards(folder)
    shapes = {key: shape for shard in shards for key, shape in _shapes(shard).items()}
    method = _method(values, shapes, folder)
    model = _empty_model(values, method, dtype)
    _check_keys(_places(dict(model.named_parameters())), shapes, folder)
    tensors = {name: torch.empty_like(p, device=device) for name, p in model.named_parameters()}
    places = _places(tensors)
    for shard in shards:
        with _open(shard) as file:
            for key in file.offset_keys():
                places[key].copy_(file.get_tensor(key))
    model.load_state_dict(tensors, assign=True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def _places(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: place for name, tensor in tensors.items() for key, place in _parts(name, tensor)}


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The released keys of the model's parameter `name`, each with the part of `tensor` that it fills."""
    head, dot, inner = name.partition(".mlp.")
    if not dot or not head.startswith("model.language_model."):
        yield _released_name(name), tensor
        return
    block = _released_name(head)
    if inner.startswith("experts."):
        for expert, part in enumerate(tensor):
            if inner == "experts.gate_up_proj":
                gate, up = part.chunk(2)
                yield f"{block}.moe.experts.{expert}.gate_proj.weight", gate
                yield f"{block}.moe.experts.{expert}.up_proj.weight", up
            else:
                yield f"{block}.moe.experts.{expert}.down_proj.weight", part
    elif inner.startswith("static_expert."):
        yield f"{block}.mlp.{inner.removeprefix('static_expert.')}", tensor
    elif inner.startswith("coefficient."):
        yield f"{block}.{inner}", tensor
    else:
        yield f"{block}.moe.{inner.replace('router.', 'gate.')}", tensor


def _released_name(name: str) -> str:
    """Qwen2-VL's names as they were in transformers 4.4x."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def _check_keys(places: dict[str, torch.Tensor], shapes: dict[str, list[int]], folder: Path) -> None:
    faults = [f"{key} is missing" for key in places.keys() - shapes.keys()]
    faults += [f"{key} has no place in the model" for key in shapes.keys() - places.keys()]
    faults += [
        f"{key} is {tuple(shapes[key])}, expected {tuple(place.shape)}"
        for key, place in places.items()
        if key in shapes and list(place.shape) != shapes[key]
    ]
    if faults:
        raise MoEAdapterError(
            f"{folder} doesn't fit its config.json as a released EchoVLM checkpoint, in {len(faults)} of "
            f"{len(places)} keys: {'; '.join(sorted(faults)[:5])}. Download it again, all files of one revision."
        )


def _method(values: dict[str, Any], shapes: dict[str, list[int]], folder: Path) -> DualPathConfig:
    """The layer's sizes, from the first block's weights: config.json of the release needn't hold them."""
    prefix = "model.layers.0.moe."
    sizes = [f"{prefix}{part}.weight" for part in ("gate", "experts.0.gate_proj", "shared_expert.gate_proj")]
    if absent := [key for key in sizes if key not in shapes]:
        raise MoEAdapterError(
            f"{folder} is no released EchoVLM checkpoint: it lacks {', '.join(absent)}. A model exported or saved by "
            "moe-adapter is loaded by transformers' auto classes or load_adapter."
        )
    num_experts, expert_dim, shared_expert_dim = (shapes[key][0] for key in sizes)
    fields = {**MOE_FIELDS, **values}
    return DualPathConfig(
        num_experts=num_experts,
        top_k=fields["num_experts_per_tok"],
        expert_dim=expert_dim,
        shared_expert_dim=shared_expert_dim,
        mixing="token",
        router_softmax="selected" if fields["norm_topk_prob"] else "all",  # renormalised, the two are one
        preserve_base=False,
    )


def _empty_model(
    values: dict[str, Any], method: DualPathConfig, dtype: torch.dtype | None
) -> Qwen2VLForConditionalGeneration:
    """The injected model with its parameters on the meta device and its buffers computed."""
    config = Qwen2VLConfig.from_dict({key: value for key, value in values.items() if key not in MOE_FIELDS})
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype or config.dtype or torch.float32)
    inject_dual_path_moe(model, config=method)
    return model


def _shards(folder: Path) -> list[Path]:
    """The checkpoint's files, each of them there and holding what the index says."""
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    where: dict[str, str] = _read_json(folder / INDEX).get("weight_map", {})
    shards = [folder / name for name in sorted(set(where.values()))]
    for shard in shards:
        promised = {key for key, name in where.items() if name == shard.name}
        if wrong := sorted(promised ^ _shapes(shard).keys()):
            raise MoEAdapterError(
                f"{shard} and {INDEX} disagree on {len(wrong)} keys, such as {wrong[0]}: they are of different "
                "downloads. Download both again."
            )
    return shards


def _shapes(shard: Path) -> dict[str, list[int]]:
    with _open(shard) as file:
        return {key: file.get_slice(key).get_shape() for key in file.offset_keys()}


@contextmanager
def _open(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise MoEAdapterError(f"{shard} can't be read ({error}): download it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoEAdapterError(f"{file} can't be read ({error}): expected the folder of the download.") from error
