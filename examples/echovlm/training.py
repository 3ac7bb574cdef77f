"""One training run with transformers' Trainer, the same for pre-training, stage I and stage II."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainingArguments

from examples.echovlm.account import Account
from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig, TrainingConfig


def train(
    model: nn.Module,
    data: Sequence[Any],
    collator: Collator,
    run: TrainingConfig,
    config: RecipeConfig,
    out: Path,
    account: Account,
) -> None:
    """Train the parameters that require a gradient, in float32; the frozen rest keeps its own dtype.

    In bf16 they would be their own masters, and a step of 2e-5 would be lost on most of them. What bf16 means here is
    autocast: matrices are multiplied in bf16, whatever they are kept in.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=run.learning_rate,
        num_train_epochs=run.epochs,
        lr_scheduler_type=run.scheduler,
        warmup_steps=run.warmup_ratio,
        weight_decay=run.weight_decay,
        bf16=use_bf16(config.precision),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=20,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,  # a line for every log takes the bar's place where transformers' logger is quiet
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=config.seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossOnBar)
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else it would be evaluated in bf16 ever after
    vars(model).pop("_is_accelerate_prepared", None)  # else the next stage would train the same model without autocast
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    account.say(f"{trainer.state.global_step} steps of {run.batch_size}: loss {losses[0]:.2f} → {losses[-1]:.2f}")


class LossOnBar(ProgressCallback):
    """transformers' progress bar with the loss beside it, in place of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.2f}")


def own_precision(model: PreTrainedModel) -> AbstractContextManager:
    """Autocast for evaluation in the base's own dtype: what was trained on it is float32, and the base may be less."""
    return torch.autocast(model.device.type, torch.bfloat16) if model.dtype == torch.bfloat16 else nullcontext()


def use_bf16(precision: str) -> bool:
    """Whether to compute in bf16; "auto" says yes where the processor multiplies bf16 matrices natively."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
