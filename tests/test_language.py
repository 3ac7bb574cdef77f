"""target="mlp" on a user's own model: the language model in it, never the tower beside it."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
import zoo
from torch import nn

from moe_adapter import MoEAdapterError, inject_dual_path_moe, plan_injection

SIZES = dict(expert_dim=8, shared_expert_dim=8)
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
IMAGE = dict(TINY, image_size=28, patch_size=14)


class Own(nn.Module):
    """Parts beside one another, as in a model that somebody put together."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(torch_layer() for _ in range(2))


def torch_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 48)


def vit() -> nn.Module:
    return nn.TransformerEncoder(torch_layer(), 2, enable_nested_tensor=False)


def clip() -> nn.Module:
    text = dict(TINY, vocab_size=50, eos_token_id=2)
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=32))


OWN = {
    "a transformers tower": (
        lambda: Own(encoder=tf.Dinov2Model(tf.Dinov2Config(**IMAGE)), lm=zoo.build("qwen2")),
        "lm.model",
    ),
    "a torch tower": (lambda: Own(vit=vit(), lm=zoo.build("gpt2")), "lm.transformer"),
    "a text tower too": (lambda: Own(encoder=clip(), lm=zoo.build("qwen2")), "lm.model"),
    "a wrapped VLM": (lambda: Own(net=zoo.build("qwen2_vl")), "net.model.language_model"),
    "a decoder of one's own": (lambda: Own(vit=vit(), lm=Decoder()), "lm"),
    "one stack": (lambda: Own(body=vit()), "body"),
}


@pytest.mark.parametrize("name", OWN)
def test_the_language_model_alone_is_meant(name):
    build, scope = OWN[name]
    rows = plan_injection(build(), **SIZES).rows
    assert len(rows) == 2
    assert all(row.name.startswith(scope + ".") for row in rows)


UNCLEAR = {
    "two language models": (
        lambda: Own(policy=zoo.build("qwen2"), reference=zoo.build("gpt2")),
        "policy, reference could",
    ),
    "two stacks": (lambda: Own(vit=vit(), decoder=vit()), r"vit\.layers, decoder\.layers could"),
    "an encoder-decoder": (lambda: nn.Transformer(32, 4, 1, 1, 48), r"encoder\.layers, decoder\.layers could"),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", UNCLEAR)
def test_where_it_stays_unclear_the_parts_are_named(name):
    build, message = UNCLEAR[name]
    model = build()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(MoEAdapterError, match=message + " each be it: name the modules instead"):
        inject_dual_path_moe(model, **SIZES)
    assert {key: id(module) for key, module in model.named_modules()} == before
    name = next(part for part in ("decoder", "reference") if hasattr(model, part))
    assert plan_injection(model, rf"{name}\..*\d+", **SIZES).rows


@torch.no_grad()
def test_ones_own_vision_language_model_keeps_its_answer():
    build, _ = OWN["a torch tower"]
    model = build().eval()
    ids = torch.tensor([[3, 4, 5]])
    base = model.lm(input_ids=ids).logits
    inject_dual_path_moe(model, **SIZES)
    assert torch.equal(model.lm(input_ids=ids).logits, base)
