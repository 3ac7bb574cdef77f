"""transformers' Trainer as the recipe uses it: parameter groups, batches, checkpoints, and a look at each loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from examples.echovlm.batching import CASE_IDS, LengthGrouped
from examples.echovlm.finite import FiniteLoss
from examples.echovlm.methods import load_trained
from moe_adapter.integrations.checkpoints import AdapterCheckpoints
from moe_adapter.integrations.trainer import DualPathMixin
from moe_adapter.lora import lora_parameters


class RecipeTrainer(AdapterCheckpoints, Trainer):
    """`lora_rate`: the LoRA's own learning rate, None for the one of all; `lengths`: of the examples, to group by.

    A checkpoint of it holds what Trainer's own does: the whole model, or peft's LoRA.
    """

    save_model = Trainer.save_model

    def __init__(
        self, *args: Any, finite: FiniteLoss, lora_rate: float | None, lengths: list[int] | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, callbacks=[finite], **kwargs)
        self.finite, self.lora_rate, self.lengths = finite, lora_rate, lengths

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's own, its groups parted into the MoE blocks and the LoRA."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        lora = {id(parameter) for parameter in lora_parameters(model or self.model).values()}
        for group in list(optimizer.param_groups) if new else ():
            members = group["params"]
            group["params"] = [parameter for parameter in members if id(parameter) not in lora]
            own = [parameter for parameter in members if id(parameter) in lora]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": self.lora_rate or group["lr"]})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        cases = inputs.pop(CASE_IDS)
        return self.finite.check(super().compute_loss(model, inputs, *args, **kwargs), cases, self.state)

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> Any:
        """Trainer's own; accelerate tells only its own samplers the epoch, where a resumed run's ranks skip batches."""
        if self.lengths:
            train_dataloader.set_epoch(epoch)
        return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model if model is None else model, Path(resume_from_checkpoint))

    def _get_train_sampler(self, *args: Any) -> Sampler | None:
        if self.lengths is None:
            return super()._get_train_sampler(*args)
        return LengthGrouped(self.get_total_train_batch_size(self.args), self.lengths, self.args.seed)


class StageTrainer(DualPathMixin, RecipeTrainer):
    """Of an injected model: logs its balance loss and expert loads, and warns of experts that collapse."""

    save_model = AdapterCheckpoints.save_model
    _load_from_checkpoint = AdapterCheckpoints._load_from_checkpoint
