"""One call on every listed family: the right blocks, the base's answers at step 0, and a way back."""

from __future__ import annotations

import pytest
import torch
import zoo

from moe_adapter import (
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    plan_injection,
    save_adapter,
    static_only,
)

SIZES = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
VISION = ("visual", "vision", "projector", "connector", "merger")
every_family = pytest.mark.parametrize("name", zoo.ZOO)


def logits(model: torch.nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def wake(model: torch.nn.Module) -> None:
    """Give the zero output projections values, so that the MoE path is heard."""
    with torch.no_grad():
        for layer in dual_path_layers(model).values():
            layer.experts.down_proj.normal_(0, 0.2)
            layer.shared_expert.down_proj.weight.normal_(0, 0.2)


@every_family
def test_reaches_each_block_of_the_language_model_and_nothing_else(name):
    model = zoo.build(name)
    plan = plan_injection(model, **SIZES)
    assert len(plan.rows) == 2
    assert not any(part in row.name for row in plan.rows for part in VISION)
    before = sum(parameter.numel() for parameter in model.parameters())
    inject_dual_path_moe(model, **SIZES)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.total == before + plan.added
    assert list(dual_path_layers(model)) == [row.name for row in plan.rows]


@every_family
def test_step_zero_is_the_base_and_eject_the_way_back(name):
    model = zoo.build(name)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    modules = {key: id(module) for key, module in model.named_modules()}
    base = logits(model)
    assert inject_dual_path_moe(model, **SIZES) is model
    assert torch.equal(logits(model), base)
    wake(model)
    assert (logits(model) - base).abs().max() > 1e-3
    with static_only(model):
        assert torch.equal(logits(model), base)
    eject_dual_path_moe(model)
    assert torch.equal(logits(model), base)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert {key: id(module) for key, module in model.named_modules()} == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_family
def test_only_new_parameters_train_and_all_of_them_do(name):
    model = inject_dual_path_moe(zoo.build(name), **SIZES).train()
    wake(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    new = {id(p) for layer in dual_path_layers(model).values() for p in layer.new_parameters().values()}
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in new), key
        if id(parameter) in new:
            assert parameter.grad.abs().max() > 0, key


@every_family
def test_experts_mirror_the_host(name):
    """An expert made of the whole FFN computes what the FFN computes: activation, gate order, biases, layout."""
    model = zoo.build(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.2)
    whole = dict(num_experts=2, top_k=1, router_softmax="all", expert_dim=1.0, shared_expert_dim=1.0)
    inject_dual_path_moe(model, expert_init="ffn_slice", preserve_base=False, **whole)
    for layer in dual_path_layers(model).values():
        x = torch.randn(5, layer.ffn.hidden)
        rest = () if layer.ffn.residual is None else (torch.zeros_like(x),)
        with torch.no_grad():
            expected = layer.static_expert(x, *rest)
            ones, first = torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.long)
            torch.testing.assert_close(layer.experts(x, first, ones), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.shared_expert(x), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_adapter_round_trip(name, tmp_path):
    model = inject_dual_path_moe(zoo.build(name), **SIZES)
    wake(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(zoo.build(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2", "gpt2", "gemma2", "mpt"])
def test_greedy_generation_is_unchanged_with_left_padding(name, use_cache):
    model = zoo.build(name)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :3], mask[0, :3] = 0, 0
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use_cache)
    base = model.generate(**options)
    inject_dual_path_moe(model, **SIZES)
    assert torch.equal(model.generate(**options), base)


def test_an_image_goes_through_an_injected_vision_language_model():
    model = zoo.build("qwen2_vl")
    grid = torch.tensor([[1, 4, 4]])
    ids = torch.tensor([[5, 122, *[120] * 4, 123, 7, 8]])
    inputs = dict(
        pixel_values=torch.randn(16, 3 * 2 * 14 * 14),
        image_grid_thw=grid,
        mm_token_type_ids=(ids == 120).long(),
        attention_mask=torch.ones_like(ids),
    )
    with torch.no_grad():
        base = model(input_ids=ids, **inputs).logits
        inject_dual_path_moe(model, **SIZES)
        assert torch.equal(model(input_ids=ids, **inputs).logits, base)
    assert all(layer.routing.calls[0].mask_T.sum() == ids.numel() for layer in dual_path_layers(model).values())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_step_zero_in_other_dtypes_and_alphas(dtype, alpha):
    model = zoo.build("qwen2").to(dtype)
    base = logits(model)
    inject_dual_path_moe(model, alpha_init=alpha, **SIZES)
    layer = next(iter(dual_path_layers(model).values()))
    assert layer.experts.down_proj.dtype == dtype
    found = logits(model)
    if alpha == 0.5:
        assert torch.equal(found, base)
    else:
        torch.testing.assert_close(found, base)


def test_the_seven_billion_plan_has_the_papers_counts():
    import transformers as tf

    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    text |= dict(num_key_value_heads=4, vocab_size=152064, rope_parameters=zoo.MROPE)
    vision = dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, mlp_ratio=4)
    with torch.device("meta"):
        model = tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision))
    plan = plan_injection(model)
    assert plan.added == plan.trainable == 3_391_496_248
    assert plan.total == 11_682_871_864
    assert "3,391,496,248" in str(plan)
    inject_dual_path_moe(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_391_496_248
    assert {p.device.type for p in model.parameters()} == {"meta"}
