"""Tiny models of every supported family, built from transformers' real config classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

VOCAB = 128
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
QWEN_VISION = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=14)
MROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
CLIP = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
    projection_dim=32,
)
TOKENS = dict(image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)


def _text(config: str, model: str, **extra) -> Callable:
    def build():
        values = {**TEXT, **extra}
        return getattr(tf, model)(getattr(tf, config)(**{k: v for k, v in values.items() if v is not None}))

    return build


def _gpt_style(config: str, model: str, **sizes) -> Callable:
    """Families whose configs have names of their own for the sizes."""
    ids = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return lambda: getattr(tf, model)(getattr(tf, config)(**ids, **sizes))


def _vlm(config: str, model: str, vision: dict, text: dict, **extra) -> Callable:
    return lambda: getattr(tf, model)(getattr(tf, config)(vision_config=vision, text_config={**TEXT, **text}, **extra))


def qwen2_vl(**text) -> tf.PreTrainedModel:
    """A Qwen2-VL with two vision blocks and two decoder layers; `text` overrides the decoder's sizes."""
    sizes = {**TEXT, "rope_parameters": MROPE, **text}
    vision = {**QWEN_VISION, "hidden_size": sizes["hidden_size"]}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(vision_config=vision, text_config=sizes, **TOKENS))


ZOO: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": _vlm(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        dict(depth=2, hidden_size=32, intermediate_size=40, num_heads=4, out_hidden_size=32, patch_size=14),
        dict(rope_parameters=MROPE),
        **TOKENS,
    ),
    "qwen3_vl": _vlm(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        dict(
            depth=2,
            hidden_size=32,
            intermediate_size=40,
            num_heads=4,
            out_hidden_size=32,
            patch_size=14,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        dict(head_dim=8, rope_parameters=dict(MROPE, mrope_interleaved=True)),
        **TOKENS,
    ),
    "llava": _vlm(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        dict(CLIP, model_type="clip_vision_model"),
        dict(model_type="llama"),
        image_token_index=120,
    ),
    "llava_onevision": _vlm(
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        dict(CLIP, model_type="siglip_vision_model"),
        dict(model_type="qwen2"),
        image_token_index=120,
        video_token_index=121,
    ),
    "internvl": _vlm(
        "InternVLConfig",
        "InternVLForConditionalGeneration",
        dict(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[28, 28],
            patch_size=[14, 14],
        ),
        dict(model_type="qwen2"),
        image_token_id=120,
    ),
    "paligemma": _vlm(
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        dict(CLIP, model_type="siglip_vision_model"),
        dict(model_type="gemma", head_dim=8),
        image_token_index=120,
        projection_dim=32,
        hidden_size=32,
    ),
    "idefics3": _vlm(
        "Idefics3Config",
        "Idefics3ForConditionalGeneration",
        dict(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        dict(model_type="llama"),
        scale_factor=2,
        image_token_id=120,
        pad_token_id=0,
    ),
    "smolvlm": _vlm(
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        dict(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        dict(model_type="llama"),
        scale_factor=2,
        image_token_id=120,
        pad_token_id=0,
    ),
    "llama": _text("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": _text("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": _text("Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    "mistral": _text("MistralConfig", "MistralForCausalLM"),
    "gemma2": _text("Gemma2Config", "Gemma2ForCausalLM", head_dim=8),
    "gemma3": _text("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8),
    "phi": _text("PhiConfig", "PhiForCausalLM"),
    "phi3": _text("Phi3Config", "Phi3ForCausalLM"),
    "glm4": _text("Glm4Config", "Glm4ForCausalLM", head_dim=8),
    "gpt2": _gpt_style("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "gpt_neox": _text("GPTNeoXConfig", "GPTNeoXForCausalLM", num_key_value_heads=None),
    "falcon": _text("FalconConfig", "FalconForCausalLM", intermediate_size=None, num_key_value_heads=None),
    "bloom": _gpt_style("BloomConfig", "BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4),
    "mpt": _gpt_style("MptConfig", "MptForCausalLM", d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    "olmo2": _text("Olmo2Config", "Olmo2ForCausalLM"),
    "starcoder2": _text("Starcoder2Config", "Starcoder2ForCausalLM"),
}


def build(name: str, *, seed: int = 0, **text) -> tf.PreTrainedModel:
    """The tiny model `name`, in eval mode, with reproducible weights of a size that makes logits differ."""
    torch.manual_seed(seed)
    model = ZOO[name](**text) if text else ZOO[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()
