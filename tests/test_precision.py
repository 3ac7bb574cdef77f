"""α, λ and router in bf16: the α that the forward uses moves as in float32, whatever the engine does to parameters."""

from __future__ import annotations

import logging
import tempfile

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run_ranks
from engines import BATCH, RANKS, Ordered, arguments_of, collate, micro_batches
from transformers import Trainer, TrainingArguments

from moe_adapter import dual_path_layers, inject_dual_path_moe, load_adapter, save_adapter, set_stage
from moe_adapter.sharding import whole

STEPS, RATE = 50, 2e-5


def alphas(engine: str | None, bf16: bool = True, **arguments) -> list[torch.Tensor]:
    """The layers' α as each training forward uses it, (STEPS, layers), from 0.9 on, at a learning rate of 2e-5.

    At 0.5 the logit would be 0, around which bfloat16 is as fine as anything.
    """
    torch.manual_seed(0)
    model = zoo.build("qwen2")
    inject_dual_path_moe(model, num_experts=4, expert_dim=16, shared_expert_dim=24, alpha_init=0.9)
    set_stage(model, 1)
    seen: list[torch.Tensor] = []
    layers = dual_path_layers(model).values()
    for layer in layers:  # within the forward: before and after it an engine may hold something else
        layer.register_forward_hook(lambda part, args, output: seen.append(part.alpha.detach().clone()))
    alone = not dist.is_initialized()
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=RANKS if alone else 1,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **({} if engine is None else arguments_of(engine)),
        **arguments,
    )
    data = [row for batch in micro_batches("uneven", RANKS * STEPS) for row in batch]
    Ordered(model, args, train_dataset=data, data_collator=collate).train()
    steps = [torch.cat(seen[i : i + len(layers)]) for i in range(0, len(seen), len(layers))]
    return steps[:: RANKS if alone else 1]


def check(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """What engines round at the start, α₀ to bfloat16, is a constant; the way from there is float32's."""
    assert len(found) == len(expected) == STEPS
    way, reference = found[-1] - found[0], expected[-1] - expected[0]
    assert reference.abs().min() > 5e-6
    torch.testing.assert_close(way, reference, rtol=0.1, atol=1e-7)
    moved = torch.stack(found).diff(dim=0).ne(0).float().mean()
    assert moved > 0.9, f"α moved in {moved:.0%} of the steps"


def test_autocast():
    check(alphas(None), alphas(None, bf16=False))


@pytest.mark.parametrize("engine", ["zero2", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero3", "fsdp2"))])
def test_engines(engine):
    expected = alphas(None, bf16=False)
    for found in run_ranks(RANKS, alphas, timeout=300, engine=engine):
        check(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_engines_whose_model_is_compiled_whole(engine):
    expected = alphas(None, bf16=False)
    whole = dict(torch_compile=True, torch_compile_backend="aot_eager")
    for found in run_ranks(RANKS, alphas, timeout=500, engine=engine, **whole):
        check(found, expected)


def saved(engine: str, folder: str) -> dict[str, torch.Tensor]:
    """Train three steps in bf16 and save; α as the layers have it."""
    model = adapted()
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=3,
        learning_rate=1e-2,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **arguments_of(engine),
    )
    data = [row for batch in micro_batches("uneven", 3 * RANKS) for row in batch]
    Ordered(model, args, train_dataset=data, data_collator=collate).train()
    save_adapter(model, folder)
    layers = dual_path_layers(model)
    return {name: whole(layer.settled("alpha_logit")).clone() for name, layer in layers.items()}


def adapted() -> torch.nn.Module:
    torch.manual_seed(0)
    model = zoo.build("qwen2").bfloat16()
    inject_dual_path_moe(model, num_experts=4, expert_dim=16, shared_expert_dim=24, alpha_init=0.9)
    set_stage(model, 1)
    return model


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_files_hold_the_masters(tmp_path, engine):
    alphas, _ = run_ranks(RANKS, saved, timeout=300, engine=engine, folder=str(tmp_path))
    model = load_adapter(zoo.build("qwen2").bfloat16(), tmp_path)
    start = adapted()
    for name, layer in dual_path_layers(model).items():
        assert layer.alpha_logit.dtype == layer.router.weight.dtype == torch.float32
        torch.testing.assert_close(layer.alpha_logit.detach(), alphas[name], rtol=0, atol=0)
        assert layer.alpha_logit.item() != layer.alpha_logit.bfloat16().item()
        assert not torch.equal(layer.experts.down_proj, start.get_submodule(name).experts.down_proj)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_warns_of_experts_without_masters(tmp_path, caplog, dtype):
    model = inject_dual_path_moe(zoo.build("qwen2").to(dtype), num_experts=4, expert_dim=16, shared_expert_dim=24)
    args = TrainingArguments(str(tmp_path), max_steps=2, bf16=True, use_cpu=True, report_to=[], save_strategy="no")
    data = [row for batch in micro_batches("uneven", 16) for row in batch]
    with caplog.at_level(logging.WARNING, "moe_adapter"):
        Trainer(model, args, train_dataset=data, data_collator=collate).train()
    assert caplog.text.count("without float32 masters") == (dtype == torch.bfloat16)


def test_a_master_that_is_not_the_parameters_own_is_not_used():
    """As after a load, a step that no training forward has followed, or in a copy that trains by itself."""
    layer = next(iter(dual_path_layers(adapted()).values()))
    start = layer.alpha_logit.detach().clone()
    layer.alpha_logit.data = start.bfloat16()
    layer._masters = {"alpha_logit": start}
    assert start != start.bfloat16() and torch.equal(layer.precise("alpha_logit"), start)
    layer.precise("alpha_logit").sum().backward()
    assert layer.alpha_logit.grad == 1
    with torch.no_grad():
        layer.alpha_logit.fill_(0.25)
    assert layer.precise("alpha_logit").item() == 0.25
