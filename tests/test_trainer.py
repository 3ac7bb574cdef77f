"""The balance loss under transformers' own Trainer: accumulation neither sums nor loses it."""

from __future__ import annotations

import pytest
import torch
import zoo
from reference import assert_same_gradients, perturb, reference_loss, reference_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_adapter import balance_loss, inject_dual_path_moe

GAMMA = 3.0
LENGTHS = (9, 5, 7, 3)  # label tokens differ, so a plain mean over micro-batches would be seen


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 100, (length,), generator=generator) for length in LENGTHS]
    return [dict(input_ids=ids, labels=ids.clone(), attention_mask=torch.ones_like(ids)) for ids in rows]


class KeepGradients(TrainerCallback):
    """Copies the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_accumulated_gradients_are_weighted_by_label_tokens(tmp_path, kind):
    model = perturb(
        inject_dual_path_moe(zoo.build("qwen2"), num_experts=4, expert_dim=16, shared_expert_dim=24, balance_coef=GAMMA)
    )
    twin = reference_model(model)
    keep = KeepGradients()
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(LENGTHS),
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=kind is not None,
        gradient_checkpointing_kwargs=None if kind is None else dict(use_reentrant=kind),
    )
    Trainer(model, arguments, train_dataset=examples(), callbacks=[keep]).train()

    items = sum(length - 1 for length in LENGTHS)
    for example in examples():
        batch = {name: value[None] for name, value in example.items()}
        reference_loss(twin, batch, GAMMA, items=items).backward()
    for name, parameter in model.named_parameters():
        parameter.grad = keep.gradients.get(name)
    assert_same_gradients(model, twin)
    assert torch.isfinite(balance_loss(model))
