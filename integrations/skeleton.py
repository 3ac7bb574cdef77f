"""A transformers model without weights, from its config alone, and batches that it could be trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from moe_adapter.errors import MoEAdapterError
from moe_adapter.integrations.pretrained import auto_class


def load_skeleton(source: str, *, attention: str = "sdpa") -> Any:
    """The model that `source` is the config of, on the meta device, in bf16: a vision-language model, else a causal LM.

    Args:
        source: a checkpoint's directory, a config.json, or a name on the hub.
        attention: transformers' `attn_implementation`.

    Raises:
        MoEAdapterError: there is no such config, or transformers has no such model or attention.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a config can be wrong in any way, and each model checks its own
        raise MoEAdapterError(
            f"{source}: {_first_line(error)} Expected a directory that holds config.json, that file itself, or the "
            "name of a model on the hub, which takes a network or a model that was fetched before."
        ) from error
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    except Exception as error:
        raise MoEAdapterError(f"{source}, with {attention} attention: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or repr(error)


def add_stage2_lora(model: nn.Module, r: int) -> nn.Module:
    """The model with the paper's LoRA of stage II around it."""
    from peft import get_peft_model

    from moe_adapter.integrations.peft import stage2_lora

    return get_peft_model(model, stage2_lora(model, r=r))  # pyright: ignore


def training_batch(
    model: nn.Module, tokens: int, *, rows: int = 1, images: int = 0, side: int = 392
) -> dict[str, Tensor]:
    """`rows` sequences of `tokens` tokens, each of them a label; the first holds `images` images of side × side pixels.

    Integers are real, pixels on the meta device. Images are for models that take them as Qwen2-VL does, as patches with
    a grid; a model that has other images counts their tokens like any.

    Raises:
        MoEAdapterError: the model takes no such images, or they don't fit.
    """
    ids = torch.full((rows, tokens), 1)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if not images:
        return batch
    config: Any = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    if not hasattr(vision, "spatial_merge_size") or not hasattr(vision, "temporal_patch_size"):
        raise MoEAdapterError(f"{type(model).__name__} takes no images in patches with a grid: leave --images out.")
    merge, patch = vision.spatial_merge_size, vision.patch_size
    grid = side // (patch * merge) * merge
    if not grid:
        raise MoEAdapterError(f"images of {side}×{side}: expected a side of {patch * merge} pixels or more.")
    length = (grid // merge) ** 2 + 2  # between the tokens that open and close it
    if images * length >= tokens:
        raise MoEAdapterError(
            f"{images} images of {side}×{side} take {images * length} tokens, expected fewer than {tokens}."
        )
    for start in range(0, images * length, length):
        ids[0, start] = config.vision_start_token_id
        ids[0, start + 1 : start + length - 1] = config.image_token_id
        ids[0, start + length - 1] = config.vision_end_token_id
    values = vision.in_channels * vision.temporal_patch_size * patch**2
    return batch | {
        "pixel_values": torch.empty(images * grid**2, values, device="meta"),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * images),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
