"""transformers' Trainer, and its subclasses such as TRL's SFTTrainer, around an injected model.

    class MyTrainer(DualPathMixin, SFTTrainer): ...        # or DualPathTrainer, the mixin over the plain Trainer

The plain Trainer needs none of this while it takes the model's loss, which holds γ·L_bal. Where a trainer computes the
loss itself (label smoothing, `compute_loss_func`, TRL's fused head) the mixin adds γ·L_bal to that; and it logs L_bal,
expert loads, α and λ to whatever `report_to` names, and warns of experts that collapse.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from moe_adapter import dual_path_layers
from moe_adapter.balance_scope import start_step
from moe_adapter.injection import STATE, Injection, injected_model
from moe_adapter.losses import layer_balance_loss, real_tokens, routed_counts, total_loss
from moe_adapter.objective import step_share

IDLE = 0.05  # of its fair share: an expert with less has lost almost everything
BUSY = 0.98  # of all tokens: an expert that is chosen for more takes almost everything
SUMS = "routing_statistics.pt"  # in a checkpoint: what the next log entry tells of the steps before


class CollapseWarning(UserWarning):
    """An expert takes or loses almost all tokens of a layer."""


class DualPathMixin:
    """Put before a Trainer class: adds γ·L_bal where that computes the loss itself, and logs the routing.

    Each log entry gains `balance_loss`, the mean over layers and micro-batches, and `max_load`, the largest share of
    tokens that an expert was chosen for. Reporters (TensorBoard, W&B, …) also get `balance_loss/LAYER`,
    `expert_load/LAYER/EXPERT`, `alpha/LAYER` and `lambda/LAYER`, layers numbered in the model's order.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        owner = injected_model(self.model)  # pyright: ignore
        self._injection: Injection = getattr(owner, STATE)
        self._statistics = RoutingStatistics(owner)
        self.add_callback(_Steps())  # pyright: ignore

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The trainer's own, plus γ·L_bal of the forward that it differentiates: the mean, if there are several."""
        weight = self._balance_weight(inputs, num_items_in_batch)
        objective = self._injection.objective
        objective.kept = []
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)  # pyright: ignore
            kept = objective.kept
        finally:
            objective.kept = None
        if not kept:  # in evaluation, or γ is 0
            return result
        loss, rest = (result[0], result[1:]) if return_outputs else (result, ())
        loss = total_loss(loss, weight * torch.stack(kept).mean(), self._injection.config.balance_coef)
        return (loss, *rest) if return_outputs else loss

    def _balance_weight(self, inputs: dict[str, Any], items: Any) -> float:
        """What makes the balance losses of a step's micro-batches a mean, after all that the Trainer does to a loss."""
        by_items = items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)  # pyright: ignore
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = by_items or self.compute_loss_func is not None  # pyright: ignore
        if not scaled:
            return 1.0
        if not by_items:
            return 1.0 / self.current_gradient_accumulation_steps  # pyright: ignore
        share = step_share(injected_model(self.model), {**inputs, "num_items_in_batch": items})  # pyright: ignore
        if self.args.average_tokens_across_devices:  # pyright: ignore
            share *= self.accelerator.num_processes // self.get_tp_size()  # pyright: ignore
        return share

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with the routing since the last entry; a collective of all ranks."""
        if "loss" not in logs or not self._statistics.sums:
            super().log(logs, *args, **kwargs)  # pyright: ignore
            return
        summary, details = self._statistics.read()
        super().log({**logs, **summary}, *args, **kwargs)  # pyright: ignore
        report(self, details)  # pyright: ignore

    def _save_rng_state(self, output_dir: str) -> None:
        """The trainer's own, and beside it the sums for the next log entry; a collective of all ranks."""
        super()._save_rng_state(output_dir)  # pyright: ignore
        sums = {i: total.cpu() for i, total in self._statistics.over_ranks().items()}
        if self.args.process_index == 0:  # pyright: ignore
            torch.save(sums, os.path.join(output_dir, SUMS))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # pyright: ignore
        if checkpoint and os.path.isfile(path := os.path.join(checkpoint, SUMS)):
            self._statistics.load(torch.load(path), first=self.args.process_index == 0)  # pyright: ignore


class DualPathTrainer(DualPathMixin, Trainer):
    """transformers' Trainer with `DualPathMixin`."""


class _Steps(TrainerCallback):
    """Tells where a step begins: one that is skipped, as when float16 overflows, ends in no optimizer's step."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        start_step()


class RoutingStatistics:
    """Loads and balance losses of an injected model's training passes, summed on its device until they are read."""

    def __init__(self, owner: nn.Module):
        self.layers = [layer for layer in dual_path_layers(owner).values() if layer.router is not None]
        self.sums: dict[int, torch.Tensor] = {}  # of a layer: slots by expert, tokens, L_bal, passes
        self._warned: set[tuple[int, int]] = set()
        owner.register_forward_hook(self._on_forward)

    @torch.no_grad()
    def _on_forward(self, owner: nn.Module, args: tuple, output: Any) -> None:
        if not owner.training:
            return
        for i, layer in enumerate(self.layers):
            if calls := layer.routing.calls:
                counts_E = routed_counts(calls)
                more = (real_tokens(calls), layer_balance_loss(calls), 1)
                more = [torch.as_tensor(value, dtype=counts_E.dtype, device=counts_E.device) for value in more]
                total = torch.cat([counts_E, torch.stack(more)])
                before = self.sums.get(i)
                self.sums[i] = total if before is None else total + before.to(total.device)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """The two numbers for a log line and all of them for a reporter, over all ranks; then it starts anew."""
        sums = {i: total.tolist() for i, total in self.over_ranks().items()}
        self.sums = {}
        losses = {i: loss / passes for i, (*_, loss, passes) in sums.items()}
        loads = {
            (i, e): n / max(tokens, 1) for i, (*counts, tokens, _, _) in sums.items() for e, n in enumerate(counts)
        }
        self._warn_of_collapse(loads)
        summary = {"balance_loss": sum(losses.values()) / len(losses), "max_load": max(loads.values())}
        details = {f"balance_loss/{i}": loss for i, loss in losses.items()}
        details |= {f"expert_load/{i}/{e}": load for (i, e), load in loads.items()}
        for i, layer in enumerate(self.layers):
            for name, logit in (("alpha", "alpha_logit"), ("lambda", "lam_logit")):
                if getattr(layer, logit) is not None:
                    details[f"{name}/{i}"] = layer.settled(logit).sigmoid().item()
        return summary, details

    def over_ranks(self) -> dict[int, torch.Tensor]:
        """The sums of all ranks; a collective."""
        sums = {i: total.clone() for i, total in sorted(self.sums.items())}
        if dist.is_available() and dist.is_initialized():
            for total in sums.values():
                dist.all_reduce(total)
        return sums

    def load(self, sums: dict[int, torch.Tensor], *, first: bool) -> None:
        """Go on from the sums of all ranks, which the first one keeps."""
        self.sums = {i: total * first for i, total in sums.items()}

    def _warn_of_collapse(self, loads: dict[tuple[int, int], float]) -> None:
        """Once for each expert, until it has recovered."""
        for (i, e), load in loads.items():
            config = self.layers[i].config
            fair = config.top_k / config.num_experts
            collapsed = load < IDLE * fair or load > BUSY > fair
            if collapsed and (i, e) not in self._warned:
                warnings.warn(
                    f"expert {e} of layer {i} was chosen for {load:.1%} of the tokens, where {fair:.0%} is even: raise "
                    "balance_coef, lower the learning rate, or try balance_scope='global'.",
                    CollapseWarning,
                    stacklevel=2,
                )
            (self._warned.add if collapsed else self._warned.discard)((i, e))


def report(trainer: Trainer, values: dict[str, float]) -> None:
    """Give values to the trainer's reporters alone (TensorBoard, W&B, …), and not to its log."""
    reporters = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, reporters):
            callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(values), model=trainer.model)
