"""The training objective of an injected model: L_bal of its last forward, and γ·L_bal inside its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.layer import DualPathMoE
from moe_adapter.losses import IGNORED_LABEL, total_loss


def dual_path_layers(model: nn.Module) -> dict[str, DualPathMoE]:
    """The dual-path layers of a model, wrapped or not, by dotted name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DualPathMoE)}


def balance_loss(model: nn.Module) -> torch.Tensor:
    """L_bal of the model's last forward pass, before γ: the mean of equation (8) over the layers that ran.

    A scalar with gradient, also under gradient checkpointing, reentrant or not; 0 for a model without routed experts.

    Raises:
        MoEAdapterError: the model has no dual-path layers, or none has run yet.
    """
    layers = dual_path_layers(model).values()
    if not layers:
        raise MoEAdapterError(
            f"{type(model).__name__} has no dual-path layers: call inject_dual_path_moe(model) first."
        )
    routed = [layer for layer in layers if layer.router is not None]
    if not routed:
        return torch.zeros((), device=next(model.parameters()).device)
    ran = [layer for layer in routed if layer.routing.calls]
    if not ran:
        raise MoEAdapterError("no dual-path layer has run yet: balance_loss(model) reads the last forward pass.")
    losses = [layer.routing.balance_loss(layer.router.weight) for layer in ran]  # pyright: ignore
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()


class AddBalanceLoss:
    """Forward hook of the injected model: in training mode its loss becomes L_ar + γ·L_bal, equation (9)."""

    def __init__(self, balance_coef: float):
        self.balance_coef = balance_coef

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Weighted, under transformers' `num_items_in_batch`, by this micro-batch's share of the step's label tokens.

        There the model's loss is a sum over the micro-batch divided by the label tokens of the whole step, so that
        losses are added over micro-batches; the shares make the balance loss the mean over them.
        """
        if not model.training or not any(layer.routing.calls for layer in dual_path_layers(model).values()):
            return output
        share = _step_share(model, kwargs)
        return _with_loss(output, lambda loss: total_loss(loss, share * balance_loss(model), self.balance_coef), kwargs)


def _with_loss(output: Any, change, kwargs: dict[str, Any]) -> Any:
    """`output` with its loss changed, where it has one: a ModelOutput or dict, or a tuple that starts with it."""
    if isinstance(output, tuple):
        has_loss = kwargs.get("labels") is not None and isinstance(output[0], torch.Tensor) and output[0].dim() == 0
        return (change(output[0]), *output[1:]) if has_loss else output
    if isinstance(output, dict) and isinstance(output.get("loss"), torch.Tensor):
        output["loss"] = change(output["loss"])
    return output


def _step_share(model: nn.Module, inputs: dict[str, Any]) -> float:
    """This micro-batch's share of `num_items_in_batch`, counted as transformers' Trainer counts; 1 without it."""
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0
    labels = inputs.get("shift_labels")
    if labels is None:
        shifted = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        labels = inputs["labels"][..., 1:] if shifted else inputs["labels"]
    return float(labels.ne(IGNORED_LABEL).sum() / items)
