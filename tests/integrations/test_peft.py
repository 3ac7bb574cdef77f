"""The LoRA of stage II: on which maps it lies, and that it trains beside the MoE."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as tf
import zoo
from peft import get_peft_model
from torch import nn

from moe_adapter import MoEAdapterError, inject_dual_path_moe, set_stage
from moe_adapter.integrations.peft import lora_targets, stage2_lora

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
PAPER = (
    r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))|model\.visual\.merger\.mlp\.(0|2)"
    r"|model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
)


def test_qwen2_vl_7b_gets_the_papers_lora():
    """Table 8: 242 maps, and 3.40 B trainable parameters in stage II."""
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    text |= dict(num_key_value_heads=4, vocab_size=152064)
    config = tf.Qwen2VLConfig(text_config=text, vision_config=dict(hidden_size=3584))
    with torch.device("meta"):
        model = inject_dual_path_moe(tf.Qwen2VLForConditionalGeneration(config))
        targets = lora_targets(model)
        names = {name for name, _ in model.named_modules() if re.fullmatch(targets, name)}
        assert names == {name for name, _ in model.named_modules() if re.fullmatch(PAPER, name)}
        assert len(names) == 242
        trainable = set_stage(get_peft_model(model, stage2_lora(model)), 2)["trainable"]
    assert trainable == 3_391_496_248 + 10_440_704


def opt() -> nn.Module:
    """A family whose FFN is two maps of the block itself."""
    sizes = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    return tf.OPTForCausalLM(tf.OPTConfig(vocab_size=128, **sizes))


@pytest.mark.parametrize("name", ["qwen2", "llava", "gpt2", "opt", "bloom", "phi"])
def test_every_map_but_ffns_and_head(name):
    model = opt() if name == "opt" else zoo.build(name)
    inject_dual_path_moe(model, layers=(0,), **SIZES)  # the other block's FFN gets none either
    ffns = ("mlp", "fc1", "fc2")
    model = get_peft_model(model, stage2_lora(model))
    placed = model.base_model.targeted_module_names
    assert placed and not any("lm_head" in found for found in placed)
    language = [found for found in placed if "vision" not in found and "projector" not in found]
    assert not any(set(found.split(".")) & set(ffns) for found in language)
    blocks = {re.search(r"(?:layers|h)\.(\d+)", found)[1] for found in language}
    assert blocks == {"0", "1"}


def test_lora_and_moe_train_together():
    model = inject_dual_path_moe(zoo.build("qwen2_vl"), **SIZES)
    model = get_peft_model(model, stage2_lora(model, r=4))
    set_stage(model, 2)
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_B" in name for name in got) and any("experts.down_proj" in name for name in got)
    assert not any("static_expert" in name for name in got)


def test_refusals():
    with pytest.raises(MoEAdapterError, match="inject_dual_path_moe"):
        lora_targets(zoo.build("qwen2"))
    net = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))})
    inject_dual_path_moe(net, target="ffn", expert_dim=8, shared_expert_dim=8)
    with pytest.raises(MoEAdapterError, match="no linear map"):
        lora_targets(net)
