"""The training objective of an injected model: L_bal of its last forward, and γ·L_bal inside its loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.layer import DualPathMoE
from moe_adapter.losses import IGNORED_LABEL, total_loss
from moe_adapter.plan import check_module
from moe_adapter.precision import has_master

HALF = (torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


def dual_path_layers(model: nn.Module) -> dict[str, DualPathMoE]:
    """The dual-path layers of a model, wrapped or not, by dotted name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DualPathMoE)}


def balance_loss(model: nn.Module) -> torch.Tensor:
    """L_bal of the model's last forward pass, before γ: the mean of equation (8) over the layers that ran.

    A scalar with gradient, also under gradient checkpointing, reentrant or not; 0 for a model without routed experts.
    With balance_scope="global" a collective of all ranks, once a pass.

    Raises:
        MoEAdapterError: no model, one without dual-path layers, or none of them has run yet.
    """
    check_module(model)
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
    if ran[0].config.balance_scope == "global":
        from moe_adapter.balance_scope import widen_fractions

        widen_fractions([layer.routing for layer in ran])
    losses = [layer.routing.balance_loss(layer.router.weight) for layer in ran]  # pyright: ignore
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()


class AddBalanceLoss:
    """Forward hook of the injected model: in training mode its loss becomes L_ar + γ·L_bal, equation (9).

    While `kept` is a list, what computes the loss adds L_bal itself: it is put there, and the output left as it is.
    """

    def __init__(self, balance_coef: float):
        self.balance_coef = balance_coef
        self.kept: list[torch.Tensor] | None = None
        self._said: set[str] = set()

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Weighted, under transformers' `num_items_in_batch`, by this micro-batch's share of the step's label tokens.

        There the model's loss is a sum over the micro-batch divided by the label tokens of the whole step, so that
        losses are added over micro-batches; the shares make the balance loss the mean over them.
        """
        layers = dual_path_layers(model).values()
        if not model.training or not any(layer.routing.calls for layer in layers):
            return output
        if self.kept is not None:
            if torch.is_grad_enabled():
                self.kept.append(balance_loss(model))
            return output
        loss = _loss_of(output)
        self._warn(kwargs, loss, [p for layer in layers for p in layer.new_parameters().values()])
        if loss is None:
            return output
        share = step_share(model, kwargs)
        return _with_loss(output, loss, total_loss(loss, share * balance_loss(model), self.balance_coef))

    def _warn(self, kwargs: dict[str, Any], loss: torch.Tensor | None, parameters: list[nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        own_loss = loss is None or kwargs.get("fused_lm_head")  # so TRL asks for the log-probabilities alone
        if own_loss and trained and torch.is_grad_enabled():
            self._say_once(NO_LOSS)
        if loss is not None and loss.requires_grad and not trained:
            self._say_once(ALL_FROZEN)
        if torch.is_grad_enabled() and any(p.dtype in HALF and not has_master(p) for p in trained):
            self._say_once(NO_MASTERS)

    def _say_once(self, message: str) -> None:
        if message not in self._said and not torch.compiler.is_compiling():
            self._said.add(message)
            logger.warning(message)


NO_LOSS = (
    "the injected model ran in training mode and what is trained is not the loss in its output, so γ·L_bal was not "
    "added. If you compute the loss yourself (label smoothing, compute_loss_func, a loss on the logits), add it there: "
    "loss = loss + γ·moe_adapter.balance_loss(model); under a Trainer moe_adapter.integrations.trainer does it."
)
NO_MASTERS = (
    "the MoE blocks train in half precision without float32 masters, which loses most of the small steps: at a rate of "
    "2e-5 most weights never move. Make what trains float32 (for p in model.parameters(): if p.requires_grad: "
    "p.data = p.data.float()) and train under autocast, as bf16=True of a Trainer does, or under DeepSpeed's bf16."
)
ALL_FROZEN = (
    "the model trains while its MoE blocks are frozen: get_peft_model freezes all but the LoRA. Call "
    "set_stage(model, 2) after it to train both."
)


def _loss_of(output: Any) -> torch.Tensor | None:
    """The loss in a model's output: `loss` of a mapping or object, else the one scalar in it."""
    if isinstance(output, Mapping):
        found = [output.get("loss")]
    elif hasattr(output, "loss"):
        found = [output.loss]
    else:
        found = [part for part in (output if isinstance(output, tuple | list) else (output,)) if _is_scalar(part)]
    return found[0] if len(found) == 1 and _is_scalar(found[0]) else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()


def _with_loss(output: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """`output` with `new` in place of its loss `old`."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        output["loss"] = new  # pyright: ignore
        return output
    if isinstance(output, tuple | list):
        parts = [new if part is old else part for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)  # a NamedTuple's fields
    output.loss = new
    return output


def step_share(model: nn.Module, inputs: dict[str, Any]) -> float:
    """This micro-batch's share of `num_items_in_batch`, counted as transformers' Trainer counts; 1 without it."""
    items, labels = inputs.get("num_items_in_batch"), inputs.get("shift_labels")
    if labels is None and (labels := inputs.get("labels")) is not None and _shifts_labels(model):
        labels = labels[..., 1:]
    return 1.0 if items is None or labels is None else float(labels.ne(IGNORED_LABEL).sum() / items)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss is transformers' causal one, whose first label is no target."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not getattr(model, "loss_type", None):
        return False
    return model.loss_function.__name__ == "ForCausalLMLoss"  # pyright: ignore
