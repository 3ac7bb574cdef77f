"""Toy-size configs of transformers' architectures: each one's own default config, every size in it cut by rule.

Rules go by the name of a field; lists that follow the layers are cut to the first layer of each kind. `HINTS` holds
what no rule can know, above all values that a default config leaves to the checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import transformers as tf

VOCAB, HIDDEN, HEADS, HEAD_DIM, ROPE_DIM, FFN, LAYERS, EXPERTS, POSITIONS = 160, 64, 4, 16, 8, 96, 2, 4, 256
FIRST_SPECIAL = 110  # special tokens take ids from here on, ordinary text lies below

SIZES = dict(vocab=VOCAB, layers=LAYERS, heads=HEADS, ffn=FFN, positions=POSITIONS, topk=2, experts=EXPERTS)
SIZES |= dict(rank=16, rope_dim=ROPE_DIM, qk_head_dim=ROPE_DIM + HEAD_DIM, moe_ffn=FFN, ssm=2 * HIDDEN)
SIZES |= dict(one=1, period=2, codes=64, channels=32, tokens=4, none=0)

# First match wins; "keep" shields a name from the rules below it.
RULES: tuple[tuple[str, str], ...] = (
    (r".*(token|start|end|patch|newline|eod|cls|mask|sep|unk)_(id|ids|index|offset)", "special"),
    (r"type_vocab_size", "keep"),
    (r".*layer_period", "period"),
    (r".*layer_offset|(n|num)_groups?|topk_group|num_expert_group|first_k_dense_replace|mamba_n_?groups", "one"),
    (r"num_dense_layers|moe_layer_start_index|n_(input|recurrent|output)_layers|n(um)?_shared_experts", "one"),
    (r"num_kv_shared_layers|num_nextn_predict_layers", "none"),
    (r".*vocab_size(_.*)?|.*group_vocab", "vocab"),
    (r"codebook_size|num_embeddings", "codes"),
    (r"base_channels|.*conv_channels?", "channels"),
    (r"num_query_tokens|.*num_latents|latent_query_num", "tokens"),
    (r"(.*_)?(num_key_value|n?_?num_kv|kv_n|key_value)_heads|num_query_groups|n_head_kv", "kv_heads"),
    (r"qk_head_dim", "qk_head_dim"),
    (r"qk_rope_head_dim|rotary_dim", "rope_dim"),
    (r".*(head_dim|d_kv|kv_channels|head_size|dim_head|d_head|headdim)", "head_dim"),
    (r"(.*_)?(num_hidden|n|num|encoder|decoder|lstm)_layers?|layers|(.*_)?depth|num_blocks", "layers"),
    (r"num_layers_per_stack|aligner_num_add_layers", "layers"),
    (r"(?!.*(dim|size|per_ngram)).*heads?(_per_layer)?", "heads"),
    (r".*lora_rank|.*lowrank|.*dt_rank|time_step_rank|adapter_rank|d_rel", "rank"),
    (r"(moe_)?(num_experts_per_tok(en)?|topk|top_?k|k|top_k_experts)", "topk"),
    (r".*num_(local_|routed_)?experts|n_routed_experts|zero_expert_num", "experts"),
    (r"moe_intermediate_size", "moe_ffn"),
    (r".*(intermediate|ffn|feed_forward|ffn_hidden)_(size|dim)(_mlp)?|mlp_dim|d_ff|dim_ff|dff|n_inner|d_inner", "ffn"),
    (r"(share_)?expert_dim|expert_ffn_hidden_size", "ffn"),
    (r"mamba_d_ssm", "ssm"),
    (r".*(hidden|embed|model|embd|emb|embedding|projection|projector|in|out|input|output|mid)_(size|dim)", "width"),
    (r"(.*_)?(d_model|n_embd|hidden_size_.*|dim_model|lru_width|codebook_dim)", "width"),
    (r".*position_embeddings|n_positions|max_sequence_length|n_ctx|(max_)?seq_len|context_length", "positions"),
    (r"max_(source|target)_positions|model_max_length|position_embedding_size", "positions"),
    (r".*(dropout|drop|layerdrop|dropout_prob|pdrop|drop_rate|drop_path_rate)", "none"),
)
COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in RULES)

# Sizes that a default config may leave open, by kind.
OPEN = dict(experts=EXPERTS, topk=2, kv_heads=HEADS, head_dim=HEAD_DIM, moe_ffn=FFN, one=1)

# By `model_type` of a config or a part of one: values that follow from no rule, most of them left to the checkpoint.
HINTS: dict[str, dict[str, Any]] = {
    "apertus1p5": dict(image_token_offset=20, audio_token_offset=84),
    "blt_global_transformer": dict(hidden_size=2 * HIDDEN, head_dim=2 * HEAD_DIM),
    "blip-2": dict(image_token_index=VOCAB - 1),
    "chameleon": dict(vocabulary_map={"<image>": 150, "IMGIMGA": 151}),
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"]),
    "dory": dict(num_hidden_layers=3, layer_types=["full_attention"] * 3),
    "emu3": dict(vocabulary_map={"<image>": 150, "<|extra_200|>": 151, "<|visual token 000000|>": 152}),
    "gemma3n_vision": dict(architecture="test_efficientnet"),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granite4_vision": dict(deepstack_layer_map=[[-1, 0]], spatial_target_layers=[1], downsample_rate="1/2"),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "instructblip": dict(image_token_index=VOCAB - 1),
    "instructblipvideo": dict(video_token_index=VOCAB - 1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "molmo2_adapter": dict(vision_feature_layer=[1, 0]),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(
        is_decoder=True, attn_layers=["local", "lsh"], axial_pos_embds_dim=[16, 48], axial_pos_shape=[2, 4]
    ),
    "timm_wrapper": dict(architecture="test_vit", model_args={"embed_dim": HIDDEN}, hidden_size=HIDDEN),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"]),
}

# Sections of multimodal rotary embeddings where the model's code holds the default, not its config.
SECTIONS: dict[str, tuple[int, ...]] = {
    "ernie4_5_vl_moe_text": (22, 22, 20),
    "glm4v_moe_text": (8, 12, 12),
    "glm4v_text": (8, 12, 12),
    "glm_ocr_text": (8, 12, 12),
    "hunyuan_vl_text": (16, 16, 16, 16),
    "paddleocr_vl_text": (16, 24, 24),
    "qwen2_5_omni_text": (16, 24, 24),
    "qwen2_5_vl_text": (16, 24, 24),
    "qwen2_vl_text": (16, 24, 24),
}


def toy_config(model_type: str) -> Any:
    """The default config of `model_type` at toy size."""
    return shrink(tf.CONFIG_MAPPING[model_type]())


def shrink(config: Any, specials: dict[int, int] | None = None) -> Any:
    """A config of the same class, with every size cut to toy size, its sub-configs too.

    Fields that keep their class's default are not passed on, so that what a config derives from its sizes is derived
    anew. `specials` maps special tokens to toy ids, one map for a whole tree of configs.
    """
    specials = {} if specials is None else specials
    values = {field.name: vars(config).get(field.name) for field in dataclasses.fields(config) if field.init}
    toy = {name: _toy(name, value, values, specials) for name, value in values.items()}
    toy |= HINTS.get(config.model_type, {})
    toy |= _rope(config.model_type, values, toy)
    default = vars(type(config)())
    return type(config)(**{name: value for name, value in toy.items() if not _same(value, default.get(name))})


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and not isinstance(one, tf.PreTrainedConfig) and one == other


def _kind(name: str) -> str:
    return next((kind for pattern, kind in COMPILED if pattern.fullmatch(name)), "keep")


def _toy(name: str, value: Any, values: dict[str, Any], specials: dict[int, int]) -> Any:
    if isinstance(value, tf.PreTrainedConfig):
        return shrink(value, specials)
    if isinstance(value, list | tuple):
        return _toy_list(name, value, values, specials)
    if value is None:
        return OPEN.get(_kind(name))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return _toy_number(name, value, values, specials)


def _toy_number(name: str, value: Any, values: dict[str, Any], specials: dict[int, int]) -> Any:
    kind = _kind(name)
    if kind == "special" and value >= 0:
        return specials.setdefault(value, FIRST_SPECIAL + len(specials))
    if kind == "keep" or value <= 0:
        return value
    if kind == "kv_heads":
        return HEADS if value == _first(values, "num_attention_heads", "n_head", "n_heads") else min(value, 2)
    if kind == "head_dim" and value == values.get("qk_rope_head_dim"):
        return ROPE_DIM
    if kind == "head_dim":
        expand = values.get("mamba_expand") if "mamba" in name else values.get("expand")
        return int(HEAD_DIM * expand) if expand else HEAD_DIM
    if kind == "width":
        base = _first(values, "hidden_size", "d_model", "n_embd") or value
        return HIDDEN * (value // base) if value % base == 0 else HIDDEN
    return type(value)(min(value, SIZES[kind]))


def _first(values: dict[str, Any], *names: str) -> Any:
    return next((values[name] for name in names if values.get(name)), None)


def _toy_list(name: str, value: Any, values: dict[str, Any], specials: dict[int, int]) -> Any:
    layers = _first(values, "num_hidden_layers", "num_layers", "n_layer", "depth")
    if value and len(value) == layers and layers > LAYERS:
        value = _first_of_each_kind(value)
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return [_toy_number(name, item, values, specials) for item in value]
    return value


def _first_of_each_kind(layers: list[Any]) -> list[Any]:
    """The first layer of each kind, in order, filled up with the layers that follow the first."""
    distinct = [index for index, item in enumerate(layers) if item not in layers[:index]]
    rest = [index for index in range(len(layers)) if index not in distinct]
    return [layers[index] for index in sorted([*distinct, *rest][:LAYERS])]


def _rope(model_type: str, values: dict[str, Any], toy: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with the sections of multimodal rotary embeddings cut to the toy head's."""
    rope = values.get("rope_parameters")
    sections = SECTIONS.get(model_type) or (rope.get("mrope_section") if isinstance(rope, dict) else None)
    if not sections:
        return {}
    width = toy.get("qk_rope_head_dim") or toy.get("head_dim") or HEAD_DIM
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    cut = [max(1, section * half // sum(sections)) for section in sections]
    rest = half - sum(cut)
    return {"rope_parameters": {**rope, "mrope_section": [size + (index < rest) for index, size in enumerate(cut)]}}
