"""The small bases that the recipe makes, of the two families that the paper compares: Qwen2-VL and LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from examples.echovlm.config import Family, RecipeConfig
from examples.echovlm.pictures import CELL


def build_model(config: RecipeConfig, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    """A freshly initialised model of the preset's family; its sizes are the preset's, token ids the tokenizer's."""
    assert config.base is not None, "checked before the run"
    return FAMILIES[config.base.family](config, tokenizer)


def _qwen2_vl(config: RecipeConfig, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    base, token = config.base, tokenizer.convert_tokens_to_ids
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**base.text, **_vocabulary(tokenizer)},
            vision_config={**base.vision, "hidden_size": base.text["hidden_size"]},
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=True,
            attn_implementation=config.attention,
        )
    )


def _llava_onevision(config: RecipeConfig, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    """The sizes of a Qwen2-VL in LLaVA-OneVision's names: SigLIP, of whose patches each is a visual token, and Qwen2.

    A frame of several is one tile, as in the released checkpoints; one by itself is seen twice.
    """
    base, token = config.base, tokenizer.convert_tokens_to_ids
    text = {**base.text, **_vocabulary(tokenizer), "model_type": "qwen2"}
    rope = text.pop("rope_parameters", {})
    sizes = base.vision
    width = sizes["embed_dim"]
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": width * sizes.get("mlp_ratio", 4),
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["num_heads"],
        "image_size": config.image_side,
        "patch_size": CELL,
        "vision_use_head": False,
    }
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config={**text, "rope_parameters": {k: v for k, v in rope.items() if k != "mrope_section"}},
            vision_config=vision,
            image_token_index=token("<|image_pad|>"),
            video_token_index=token("<|video_pad|>"),
            image_grid_pinpoints=[[config.image_side, config.image_side]],
            tie_word_embeddings=True,
            attn_implementation=config.attention,
        )
    )


def _vocabulary(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


FAMILIES: dict[Family, Callable[[RecipeConfig, Qwen2Tokenizer], PreTrainedModel]] = {
    "qwen2_vl": _qwen2_vl,
    "llava_onevision": _llava_onevision,
}
