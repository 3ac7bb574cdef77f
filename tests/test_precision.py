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

from moe_adapter import dual_path_layers, inject_dual_path_moe, set_stage

STEPS, RATE = 50, 2e-5


def alphas(engine: str | None, bf16: bool = True) -> list[torch.Tensor]:
    """The layers' α as each training forward uses it, (STEPS, layers), from 0.9 on, at a learning rate of 2e-5.

    At 0.5 the logit would be 0, around which bfloat16 is as fine as anything.
    """
    torch.manual_seed(0)
    model = zoo.build("qwen2")
    inject_dual_path_moe(model, num_experts=4, expert_dim=16, shared_expert_dim=24, alpha_init=0.9)
    set_stage(model, 1)
    seen: list[torch.Tensor] = []

    def look(stack, args, output):
        if engine != "zero3":  # which has spread them again
            seen.append(torch.cat([layer.alpha.detach() for layer in layers]))

    layers = list(dual_path_layers(model).values())
    model.model.register_forward_hook(look)
    for layer in layers if engine == "zero3" else []:
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
    )
    data = [row for batch in micro_batches("uneven", RANKS * STEPS) for row in batch]
    Ordered(model, args, train_dataset=data, data_collator=collate).train()
    if engine == "zero3":
        seen = [torch.cat(seen[i : i + len(layers)]) for i in range(0, len(seen), len(layers))]
    return seen[:: RANKS if alone else 1]


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


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero3", marks=pytest.mark.slow), "fsdp2"])
def test_engines(engine):
    expected = alphas(None, bf16=False)
    for found in run_ranks(RANKS, alphas, timeout=300, engine=engine):
        check(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_warns_of_experts_without_masters(tmp_path, caplog, dtype):
    model = inject_dual_path_moe(zoo.build("qwen2").to(dtype), num_experts=4, expert_dim=16, shared_expert_dim=24)
    args = TrainingArguments(str(tmp_path), max_steps=2, bf16=True, use_cpu=True, report_to=[], save_strategy="no")
    data = [row for batch in micro_batches("uneven", 16) for row in batch]
    with caplog.at_level(logging.WARNING, "moe_adapter"):
        Trainer(model, args, train_dataset=data, data_collator=collate).train()
    assert caplog.text.count("without float32 masters") == (dtype == torch.bfloat16)
