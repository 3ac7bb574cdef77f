"""transformers' own mixture-of-experts models on our backends: equal outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from moe_adapter import MoEAdapterError
from moe_adapter.integrations.experts import register_experts_functions

IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts=4,
    num_experts_per_tok=2,
    pad_token_id=0,
)


def build(kind: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(kind, **SIZES)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("name", ["lean", "megablocks"])
def test_outputs_and_gradients_equal_those_of_eager(kind, name):
    """Where a backend can't run, as `megablocks` without a GPU, it goes on with eager."""
    register_experts_functions()
    model, twin = build(kind), build(kind)
    model.set_experts_implementation(name)
    twin.set_experts_implementation("eager")
    assert model.config._experts_implementation == name
    outputs = [each(input_ids=IDS, labels=IDS) for each in (model, twin)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for (key, got), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=key)


def test_experts_that_compute_otherwise_are_refused():
    """gpt-oss keeps its weights transposed, gate and up interleaved, and gates in its own way."""
    register_experts_functions()
    model = build("gpt_oss")
    model.set_experts_implementation("lean")
    with pytest.raises(MoEAdapterError, match=r"transposed weights.*grouped_mm"):
        model(input_ids=IDS)
