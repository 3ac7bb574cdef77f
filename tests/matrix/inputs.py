"""The inputs of a toy model's forward pass: text, and whatever else the model asks for when it is given text alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.matrix.shrink import FIRST_SPECIAL, SIZES

BATCH, TOKENS = 2, 8
Inputs = dict[str, Any]

# Models whose inputs have another shape than their arguments' names say.
FRAMES = ("idefics", "instructblipvideo")  # pixel_values (B, images, C, H, W)
CODEBOOKS = ("musicgen_decoder", "musicgen_melody_decoder")  # input_ids (B × codebooks, T)


def text(model: nn.Module) -> Inputs:
    """Ordinary tokens, the same for the decoder of an encoder-decoder model."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, FIRST_SPECIAL, (BATCH, TOKENS), generator=draw)
    if model.config.model_type in CODEBOOKS:
        ids = ids.repeat(model.config.num_codebooks, 1)
    parameters = inspect.signature(model.forward).parameters
    inputs: Inputs = {"input_ids": ids}
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    if "mm_token_type_ids" in parameters:
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids
    return inputs


def asked_for(error: Exception, model: nn.Module, inputs: Inputs) -> Inputs | None:
    """The inputs with one argument more, which the error of a forward pass names; None if it names none known."""
    message = str(error).lower()
    for name, make in EXTRAS.items():
        if name in message and name not in inputs:
            masks = _masks(model) if name == "pixel_values" else {}
            return {**inputs, **masks, name: make(model, inputs)}
    marked = getattr(model.config, "image_token_id", None)
    wants_marks = "image" in message and "token" in message and hasattr(model.config, "num_query_tokens")
    if wants_marks and not (inputs["input_ids"] == marked).any():
        return {**inputs, "input_ids": _with_image_tokens(model, inputs["input_ids"])}
    return None


def _pixels(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    config = getattr(model.config, "vision_config", None) or getattr(model.config, "encoder", model.config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = (1,) if model.config.model_type in FRAMES else ()
    channels = getattr(config, "num_channels", 3)
    return torch.randn(BATCH, *frames, channels, height, width, generator=torch.Generator().manual_seed(0))


def _masks(model: nn.Module) -> Inputs:
    """Which token is an image's, and which token sees which image: none is asked for by name."""
    masks = {
        "image_embeds_position_mask": torch.arange(TOKENS).expand(BATCH, -1) < SIZES["tokens"],
        "image_attention_mask": torch.ones(BATCH, TOKENS, 1),
    }
    return {name: mask for name, mask in masks.items() if name in inspect.signature(model.forward).parameters}


def _patches(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Row, column (from 1) and pixels of eight patches."""
    width = model.config.vision_config.patch_embed_hidden_size
    rows, columns = torch.arange(8) // 4 + 1, torch.arange(8) % 4 + 1
    pixels = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    return torch.cat([rows[:, None], columns[:, None], pixels], dim=1).repeat(BATCH, 1, 1)


def _with_image_tokens(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    image = torch.full((BATCH, model.config.num_query_tokens), model.config.image_token_id)
    return torch.cat([image, ids[:, image.shape[1] :]], dim=1)


EXTRAS: dict[str, Callable[[nn.Module, Inputs], torch.Tensor]] = {
    "pixel_values": _pixels,
    "qformer_input_ids": lambda model, inputs: inputs["input_ids"],
    "flattened_patches": _patches,
    "bbox": lambda model, inputs: torch.zeros(BATCH, TOKENS, 4),
}
