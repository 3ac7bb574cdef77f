"""Towers and encoders by an explicit target: what target="mlp" leaves alone can be named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from reference import perturb

from moe_adapter import dual_path_layers, eject_dual_path_moe, inject_dual_path_moe

SIZES = dict(num_experts=4, top_k=2, expert_dim=12, shared_expert_dim=16)
WIDTHS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
IMAGE = dict(WIDTHS, image_size=28, patch_size=14)
TEXT = dict(WIDTHS, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HALVES = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
HALVES |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 7, dtype=torch.long)
MASK[1, 5:] = 0


def t5(**options) -> tf.PreTrainedModel:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50)
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **SPECIAL, **options))


def bart() -> tf.PreTrainedModel:
    return tf.BartForConditionalGeneration(tf.BartConfig(**HALVES, **SPECIAL, forced_eos_token_id=2))


def whisper() -> tf.PreTrainedModel:
    sizes = dict(HALVES, num_mel_bins=8, max_source_positions=10, max_target_positions=20)
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**sizes, **SPECIAL))


def clip() -> tf.PreTrainedModel:
    return tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16))


def siglip() -> tf.PreTrainedModel:
    return tf.SiglipModel(tf.SiglipConfig(text_config=dict(TEXT, projection_size=32), vision_config=IMAGE))


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def seq2seq() -> dict[str, Any]:
    return dict(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :5])


def pair() -> dict[str, Any]:
    return dict(pixel_values=pixels(), input_ids=IDS)


def sounds() -> dict[str, Any]:
    mel = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    return dict(input_features=mel, decoder_input_ids=IDS[:, :5])


class Case(NamedTuple):
    build: Callable[[], tf.PreTrainedModel]
    target: str
    inputs: Callable[[], dict[str, Any]]
    output: str = "logits"


CASES = {
    "T5 encoder": Case(t5, r"encoder\..*\.DenseReluDense", seq2seq),
    "T5 decoder": Case(t5, r"decoder\..*\.DenseReluDense", seq2seq),
    "T5, gated": Case(lambda: t5(feed_forward_proj="gated-gelu"), r"encoder\..*\.DenseReluDense", seq2seq),
    "BART encoder": Case(bart, r"encoder\.layers\.\d+", seq2seq),
    "BART decoder": Case(bart, r"decoder\.layers\.\d+\.fc2", seq2seq),
    "Whisper encoder": Case(whisper, r"encoder\.layers\.\d+", sounds),
    "ViT": Case(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)),
        r"layers?\.\d+",
        lambda: dict(pixel_values=pixels()),
    ),
    "CLIP image": Case(clip, r"vision_model\..*\.mlp", pair, "logits_per_image"),
    "CLIP text": Case(clip, r"text_model\..*\.mlp", pair, "logits_per_text"),
    "SigLIP image": Case(
        siglip,
        r"vision_model\.encoder\..*\.mlp",
        pair,
        "logits_per_image",
    ),
    "BERT": Case(
        lambda: tf.BertModel(tf.BertConfig(**TEXT)),
        r"encoder\.layer\.\d+",
        lambda: dict(input_ids=IDS, attention_mask=MASK),
        "last_hidden_state",
    ),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request) -> Case:
    return request.param


def build(case: Case) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = case.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


def test_step_zero_gradients_and_eject(case):
    """Beside a frozen base: freezing alone moves T5 and SigLIP by 1e-6, as torch then takes other kernels."""
    model, inputs = build(case), case.inputs()
    modules = {key: id(module) for key, module in model.named_modules()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    unfrozen = model(**inputs)[case.output]
    model.requires_grad_(False)
    base = model(**inputs)[case.output]
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(flags[key])
    inject_dual_path_moe(model, case.target, **SIZES)
    assert len(dual_path_layers(model)) == 2
    with torch.no_grad():
        assert torch.equal(model(**inputs)[case.output], base)
    perturb(model)
    found = model(**inputs)[case.output]
    assert (found - base).abs().max() > 1e-3
    found.square().mean().backward()
    new = {id(p) for layer in dual_path_layers(model).values() for p in layer.new_parameters().values()}
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in new), key
        assert parameter.grad is None or parameter.grad.abs().max() > 0, key
    eject_dual_path_moe(model)
    assert torch.equal(model(**inputs)[case.output], unfrozen)
    assert {key: id(module) for key, module in model.named_modules()} == modules
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("name", ["T5 encoder", "BART encoder", "BERT"])
def test_an_encoders_padding_does_not_count(name):
    model = inject_dual_path_moe(build(CASES[name]), CASES[name].target, **SIZES)
    with torch.no_grad():
        model(**CASES[name].inputs())
    for layer in dual_path_layers(model).values():
        assert torch.equal(layer.routing.calls[0].mask_T, MASK.bool().reshape(-1))
