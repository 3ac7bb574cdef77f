"""Where the base's weights may live: half precision, quantised, offloaded, tied, compiled; and how it generates."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
import zoo
from accelerate import cpu_offload, disk_offload
from reference import gradients, perturb
from torch import nn

from moe_adapter import (
    MoEAdapterError,
    balance_loss,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
    static_only,
)

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
WIDE = {"alpha_logit", "lam_logit", "router.weight"}  # float32 whatever the base is


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": parameter
        for prefix, layer in dual_path_layers(model).items()
        for name, parameter in layer.new_parameters().items()
    }


def assert_trains(model: nn.Module) -> None:
    """Every new parameter gets a finite gradient that isn't zero, in its own dtype; the base gets none."""
    perturb(model, std=0.1).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    new = new_parameters(model)
    for name, parameter in new.items():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(new)


def assert_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    for layer in dual_path_layers(model).values():
        for name, parameter in layer.new_parameters().items():
            assert parameter.dtype == (torch.float32 if name in WIDE else dtype), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_is_kept_at_step_zero_and_trains(dtype):
    model = zoo.build("qwen2").to(dtype)
    base = logits(model)
    inject_dual_path_moe(model, **SIZES)
    assert_dtypes(model, dtype)
    assert torch.equal(logits(model), base)
    assert_trains(model)


def torchao(bits: int) -> Callable[[Path], nn.Module]:
    def build(folder: Path) -> nn.Module:
        ao = pytest.importorskip("torchao.quantization")
        int4 = dict(weight_dtype=torch.int4, granularity=ao.PerGroup(16))
        model = zoo.build("qwen2").bfloat16()
        ao.quantize_(model.model, ao.Int8WeightOnlyConfig() if bits == 8 else ao.IntxWeightOnlyConfig(**int4))
        return model

    return build


def bitsandbytes(**config) -> Callable[[Path], nn.Module]:
    """Stays in training mode: on CPUs with AVX512-BF16 an eval forward repacks the weights for inference only."""

    def build(folder: Path) -> nn.Module:
        pytest.importorskip("bitsandbytes")
        zoo.build("qwen2").bfloat16().save_pretrained(folder)
        quantised = tf.BitsAndBytesConfig(**config)
        loaded = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantised)
        return loaded.train()

    return build


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
QUANTISED = {
    "torchao int8": torchao(8),
    "torchao int4": torchao(4),
    "bitsandbytes nf4": bitsandbytes(**NF4),
    "bitsandbytes fp4, computing in float32": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_over_a_quantised_base_the_experts_are_bfloat16_and_train(kind, tmp_path):
    model = QUANTISED[kind](tmp_path / "base")
    weight = model.model.layers[0].mlp.up_proj.weight
    base = logits(model)
    inject_dual_path_moe(model, **SIZES)
    assert_dtypes(model, torch.bfloat16)
    assert torch.equal(logits(model), base)
    assert model.model.layers[0].mlp.static_expert.up_proj.weight is weight
    assert_trains(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = QUANTISED[kind](tmp_path / "base").train()
    with pytest.warns(UserWarning, match="quantised"):
        load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), trained)
    with static_only(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(eject_dual_path_moe(model)), base)


def test_after_pefts_preparation_the_experts_take_the_dtype_that_4_bit_layers_compute_in(tmp_path):
    """prepare_model_for_kbit_training casts all but the 4-bit weights to float32."""
    model = peft.prepare_model_for_kbit_training(bitsandbytes(**NF4)(tmp_path))
    assert model.model.norm.weight.dtype == torch.float32
    assert_dtypes(inject_dual_path_moe(model, **SIZES), torch.bfloat16)


def test_experts_cannot_start_as_slices_of_quantised_weights(tmp_path):
    model = bitsandbytes(**NF4)(tmp_path)
    with pytest.raises(MoEAdapterError, match='is quantised: use "normal"'):
        inject_dual_path_moe(model, expert_init="ffn_slice", **SIZES)
    assert not dual_path_layers(model)


def loaded_in_part_from_disk(folder) -> nn.Module:
    zoo.build("qwen2").save_pretrained(folder / "base")
    parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places = {**{f"model.{part}": "cpu" for part in parts}, "model.layers.1": "disk", "lm_head": "cpu"}
    loaded = tf.AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=places, offload_folder=folder / "offload"
    )
    return loaded.eval()


OFFLOADED = {
    "to the CPU": lambda folder: cpu_offload(zoo.build("qwen2"), execution_device=torch.device("cpu")),
    "to disk": lambda folder: disk_offload(zoo.build("qwen2"), folder, execution_device=torch.device("cpu")),
    "by a device map": loaded_in_part_from_disk,
}


@pytest.mark.parametrize("init", ["normal", "ffn_slice"])
@pytest.mark.parametrize("place", OFFLOADED)
def test_an_offloaded_base_keeps_its_hooks_and_answers_like_one_in_memory(place, init, tmp_path):
    model, twin = OFFLOADED[place](tmp_path / "weights"), zoo.build("qwen2")
    assert all(p.is_meta for p in model.model.layers[1].mlp.parameters())
    hooks = {name: getattr(module, "_hf_hook", None) for name, module in model.named_modules()}
    base = logits(twin)
    for injected in (model, twin):
        torch.manual_seed(0)
        inject_dual_path_moe(injected, expert_init=init, **SIZES)
    assert torch.equal(logits(model), base)
    for name, parameter in new_parameters(twin).items():
        assert torch.equal(new_parameters(model)[name], parameter), name
    for injected in (model, twin):
        perturb(injected).train()(input_ids=IDS, labels=IDS).loss.backward()
        injected.eval()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], gradient)  # in memory the FFN is one operator
    assert torch.equal(logits(model), logits(twin))
    eject_dual_path_moe(model)
    assert {name: getattr(module, "_hf_hook", None) for name, module in model.named_modules()} == hooks
    assert torch.equal(logits(model), base)


def test_an_adapter_goes_from_an_offloaded_base_to_one_in_memory_and_back(tmp_path):
    model = perturb(inject_dual_path_moe(OFFLOADED["to disk"](tmp_path / "weights"), **SIZES))
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that can't be compared
        assert torch.equal(logits(load_adapter(zoo.build("qwen2"), tmp_path / "adapter")), logits(model))
        again = load_adapter(OFFLOADED["to the CPU"](tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    other = cpu_offload(zoo.build("qwen2", seed=5), execution_device=torch.device("cpu"))
    with pytest.raises(MoEAdapterError, match=r"weights of model\.layers\.0\.mlp differ"):
        load_adapter(other, tmp_path / "adapter")


def test_tied_weights_stay_tied_and_out_of_the_adapter(tmp_path):
    model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**zoo.TEXT, tie_word_embeddings=True)).eval()
    base = logits(model)
    inject_dual_path_moe(model, **SIZES)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), base)
    model.model.embed_tokens.weight.requires_grad_(True)  # trained: travels once, under its first name
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save_adapter(model, tmp_path)
    trained = logits(model)
    fresh = tf.Qwen2ForCausalLM(model.config).eval()
    fresh.load_state_dict(eject_dual_path_moe(model).state_dict())
    with torch.no_grad():
        fresh.lm_head.weight.div_(2)
    load_adapter(fresh, tmp_path)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(logits(fresh), trained)
    assert torch.equal(logits(eject_dual_path_moe(fresh)), base)


IDS_LEFT = torch.tensor([[0, 0, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])  # left padding by 0
GENERATION = {
    "dynamic cache": {},
    "static cache": dict(cache_implementation="static"),
    "beam search": dict(num_beams=3),
    "beam search, static cache": dict(num_beams=3, cache_implementation="static"),
    "assisted": dict(assistant_model=True),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
}


def generate(model: nn.Module, *, use_cache: bool = True, **options) -> torch.Tensor:
    alone = options.keys() & {"assistant_model", "prompt_lookup_num_tokens"}  # these take a batch of one
    ids = IDS_LEFT[1:] if alone else IDS_LEFT
    if "assistant_model" in options:
        options["assistant_model"] = zoo.build(model.config.model_type, seed=3)
    return model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
        **options,
    )


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("name", ["qwen2", "qwen2_vl"])
def test_generation_is_the_bases_at_step_zero_and_the_same_with_and_without_a_cache(name, mode, caplog):
    options = GENERATION[mode]
    model = zoo.build(name)
    base = generate(model, **options)
    inject_dual_path_moe(model, **SIZES)
    assert torch.equal(generate(model, **options), base)
    perturb(model)
    with caplog.at_level(logging.WARNING, logger="moe_adapter"):
        cached = generate(model, **options)
    masks = [record for record in caplog.records if record.name.startswith("moe_adapter")]
    assert not masks  # every mask of the caches is understood
    assert not torch.equal(cached, base)
    plain = generate(model, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(cached, plain[-len(cached) :])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_layer_compiles_into_one_graph_for_all_numbers_of_tokens(backend, dtype, training):
    torch._dynamo.reset()
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), backend=backend, **SIZES)).to(dtype).train(training)
    layer = next(iter(dual_path_layers(model).values()))
    layer(torch.randn(2, 5, 32, dtype=dtype))  # outside any forward of the model: a first pass is opened, a guard
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    parameters = list(layer.new_parameters().values())
    for tokens in (4, 4, 7, 64, 23, 1, 1):
        x = torch.randn(tokens, 32, dtype=dtype)
        with torch.set_grad_enabled(training):
            y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        if training:
            grads = [torch.autograd.grad(out.float().square().sum(), parameters) for out in (y, expected)]
            for got, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert graphs.frame_count <= 3  # the first size, one for any, one for a single token


def test_a_compiled_model_has_the_loss_and_the_gradients_of_the_plain_one():
    torch._dynamo.reset()
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), balance_coef=1.0, **SIZES)).train()
    batch = dict(input_ids=IDS, labels=IDS, attention_mask=(IDS > 10).long(), use_cache=False)
    loss = model(**batch).loss
    loss.backward()
    expected, balance = gradients(model), balance_loss(model).detach()
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**batch).loss
    found.backward()
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(balance_loss(model), balance)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_compiled_model_takes_any_batch_size():
    torch._dynamo.reset()
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), **SIZES)).eval()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for batch, length in ((2, 7), (3, 7), (5, 9), (4, 12)):
        ids = torch.randint(3, 100, (batch, length))
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert graphs.frame_count <= 3  # the first size, then any number of rows, then any length


@pytest.mark.slow
def test_inductor_compiles_the_layer():
    torch._dynamo.reset()
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), backend="lean", **SIZES))
    layer = next(iter(dual_path_layers(model).values()))
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
