"""One training run with transformers' Trainer, the same for pre-training, stage I and stage II."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProgressCallback, TrainingArguments

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.batching import Packed, WithCases, lengths
from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig, StageConfig, TrainingConfig
from examples.echovlm.engines import engine_arguments, forget_engine
from examples.echovlm.finite import FiniteLoss
from examples.echovlm.trainer import RecipeTrainer, StageTrainer
from moe_adapter import MoEAdapterError, dual_path_layers
from moe_adapter.integrations.chunked_loss import use_chunked_loss

KEPT = 2  # checkpoints: the newest, and the one before in case a disk spoils it
NOTES = "not_finite.jsonl"


def train(
    model: nn.Module,
    data: Sequence[Any],
    collator: Collator,
    run: TrainingConfig,
    config: RecipeConfig,
    out: Path,
    account: Account,
    save: Callable[[nn.Module], None] | None = None,
) -> bool:
    """Train the parameters that require a gradient, and save the model; False if it is of no use after that.

    Without a `save` of the caller's the trainer's own leaves what was trained in `out`.

    A stage goes on from its newest checkpoint in `out`, under the preset's engine, which takes the model apart.
    """
    keep_masters(model)
    trainer = _trainer(model, data, collator, run, config, out)
    chunked = use_chunked_loss(model) if isinstance(run, StageConfig) and config.chunked_loss else nullcontext()
    with chunked:
        trainer.train(resume_from_checkpoint=True)
    save(trainer.model) if save else trainer.save_model()
    ranks.wait()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    processes = f" on {ranks.count()} processes" if ranks.count() > 1 else ""
    steps = f"{trainer.state.global_step} steps of {run.batch_size}{processes}"
    account.say(f"{steps}: loss {losses[0]:.2f} → {losses[-1]:.2f}")
    return _release(trainer, model)


def keep_masters(model: nn.Module) -> None:
    """Make what trains float32; the frozen rest keeps its own dtype.

    In bf16 they would be their own masters, and a step of 2e-5 would be lost on most of them. What bf16 means here is
    autocast: matrices are multiplied in bf16, whatever they are kept in.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _trainer(
    model: nn.Module, data: Sequence[Any], collator: Collator, run: TrainingConfig, config: RecipeConfig, out: Path
) -> RecipeTrainer:
    stage = run if isinstance(run, StageConfig) else None
    engine = engine_arguments(config.engine) if stage else {}
    saving = {"save_strategy": "steps", "save_steps": stage.save_steps} if stage and stage.save_steps else {}
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
        save_total_limit=KEPT,
        report_to=list(config.report_to),
        disable_tqdm=False,  # a line for every log takes the bar's place where transformers' logger is quiet
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=config.seed,
        # General text passes by the vision tower, a case never does; a whole model may hold layers that nothing uses.
        ddp_find_unused_parameters=stage is None or config.method == "full",
        **({"save_strategy": "no"} | saving | engine),
    )
    batching = stage.batching if stage else "plain"
    trainer = (StageTrainer if dual_path_layers(model) else RecipeTrainer)(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=WithCases(Packed(collator, model) if batching == "packed" else collator),
        finite=FiniteLoss(config.on_nan, out / NOTES),
        lora_rate=config.lora.learning_rate,
        lengths=lengths(data, collator) if batching == "grouped" else None,
    )
    if "fsdp" in engine and not trainer.is_fsdp_enabled:
        raise MoEAdapterError(
            "engine: fsdp is for GPUs, accelerate leaves it out on CPUs; expected deepspeed: zero3 there"
        )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossOnBar)
    return trainer


def _release(trainer: RecipeTrainer, model: nn.Module) -> bool:
    """Take from the model what training has put around it; False where an engine has cast, spread or sharded it."""
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else it would be evaluated in bf16 ever after
    vars(model).pop("_is_accelerate_prepared", None)  # else the next stage would train the same model without autocast
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    forget_engine()
    return not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


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
