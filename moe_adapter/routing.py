"""What the routers decided in one forward pass, and the way of the balance loss's gradient back to them.

A pass through a stack of blocks opens a `ForwardPass`; each router call in it leaves a `RouterCall`, from which the
balance loss is computed when it is asked for. Recomputation under gradient checkpointing runs inside backward and
leaves none, so nothing counts twice.

Reentrant checkpointing runs the first forward without a graph: its calls have values but no gradient. There the loss
goes over a `_Bridge`, whose backward leaves the gradient that arrived with the pass; when a block is recomputed, its
layer attaches its own part of the balance loss to its output, with that gradient. So whatever scales the loss
(accumulation, loss scaling, a weight) scales the balance loss too.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from moe_adapter.errors import MoEAdapterError
from moe_adapter.losses import RouterCall, layer_balance_loss
from moe_adapter.masks import given_mask, token_mask


class ForwardPass:
    """One pass through a stack of blocks: its mask, and each layer's calls and gradient of its balance loss.

    `fractions` holds each layer's F of equation (6) where it is taken over more than this pass.
    """

    def __init__(self, mask: Any = None, *, is_open: bool):
        self.mask = mask
        self.is_open = is_open
        self.calls: dict[RoutingLog, list[RouterCall]] = {}
        self.fractions: dict[RoutingLog, torch.Tensor] = {}
        self.gradients: dict[RoutingLog, torch.Tensor] = {}
        self.recomputed: dict[RoutingLog, int] = {}

    def receive(self, log: RoutingLog, gradient: torch.Tensor) -> None:
        """Keep the gradient of a layer's balance loss until the running backward ends."""
        if not self.gradients:
            Variable._execution_engine.queue_callback(self._end_backward)
        self.gradients[log] = self.gradients.get(log, 0) + gradient

    def _end_backward(self) -> None:
        lost = [log for log in self.gradients if self.recomputed.get(log, 0) < len(self.calls[log])]
        self.gradients.clear()
        self.recomputed.clear()
        if lost:
            raise MoEAdapterError(
                f"the gradient of the balance loss did not reach {len(lost)} router(s): under reentrant checkpointing "
                "it needs the blocks to be recomputed in the same backward. Add L_bal to the model's loss before "
                "backward and let the blocks' input require a gradient (model.enable_input_require_grads()), or use "
                "use_reentrant=False."
            )


class RoutingLog:
    """A layer's view of the passes: the last one, and those without a graph that backward may still recompute."""

    def __init__(self) -> None:
        self.last: ForwardPass | None = None
        self._ungraphed: list[weakref.ref[ForwardPass]] = []

    def __deepcopy__(self, memo: dict) -> RoutingLog:
        return RoutingLog()

    def __reduce__(self):
        return RoutingLog, ()

    @property
    def calls(self) -> list[RouterCall]:
        """The layer's router calls in the last forward pass."""
        return self.last.calls.get(self, []) if self.last else []

    def record(self, call: RouterCall, y_TD: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Note a router call on tokens of `shape`, (B, S) or (T,); gives y_TD back, the routed experts' output."""
        if in_backward():
            return self._recompute(call, y_TD, shape)
        if self.last is None or not self.last.is_open:  # called from outside any stack: a pass of its own
            self.last = ForwardPass(is_open=False)
        call = call._replace(mask_T=token_mask(self.last.mask, shape))
        self.last.calls.setdefault(self, []).append(call)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():  # dynamo would keep the pass itself
            alive = [ref for ref in self._ungraphed if ref() not in (None, self.last)]
            self._ungraphed = [*alive, weakref.ref(self.last)]
        return y_TD

    def balance_loss(self, anchor: torch.Tensor) -> torch.Tensor:
        """Equation (8) of the last pass, with gradient if `anchor`, the router's weight, is to have one."""
        loss = layer_balance_loss(self.calls, fraction_E=self.last.fractions.get(self) if self.last else None)
        if loss.requires_grad or not (torch.is_grad_enabled() and anchor.requires_grad):
            return loss
        return _Bridge.apply(loss, anchor, self.last, self)  # pyright: ignore

    def _recompute(self, call: RouterCall, y_TD: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Attach this call's part of the balance loss to y_TD if the call's pass waits for it."""
        for ref in reversed(self._ungraphed):  # backward visits passes last to first
            source = ref()
            if source is None or self not in source.gradients or not call.logits_TE.requires_grad:
                continue
            done = source.recomputed.get(self, 0)
            if done < len(source.calls[self]):
                source.recomputed[self] = done + 1
                call = call._replace(mask_T=token_mask(source.mask, shape))
                part = layer_balance_loss(source.calls[self], [call], source.fractions.get(self))
                return _Attach.apply(y_TD, part, source.gradients[self])  # pyright: ignore
        return y_TD


def in_backward() -> bool:
    """Whether this forward runs inside a backward pass, as recomputation does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class OpenPass:
    """Forward pre-hook of the module that runs the blocks: a new pass for its layers, under its attention mask."""

    def __init__(self, stack: nn.Module, logs: list[RoutingLog]):
        self.logs = logs
        self.order = list(inspect.signature(stack.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if in_backward():
            return
        given = {**dict(zip(self.order, args, strict=False)), **kwargs}
        new = ForwardPass(given_mask(given), is_open=True)
        for log in self.logs:
            log.last = new


class ClosePass:
    """Forward hook of the module that runs the blocks: what layers do from here on belongs to no pass of it."""

    def __init__(self, logs: list[RoutingLog]):
        self.logs = logs

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        for log in self.logs:
            if log.last is not None:
                log.last.is_open = False


class _Bridge(torch.autograd.Function):
    """The value of a balance loss that has no graph; its gradient goes to the pass.

    Made after the forward, it runs before any node of the forward: autograd takes the latest ready node first.
    """

    @staticmethod
    def forward(ctx, value: torch.Tensor, anchor: torch.Tensor, source: ForwardPass, log: RoutingLog) -> torch.Tensor:
        ctx.source, ctx.log = source, log
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # pyright: ignore
        ctx.source.receive(ctx.log, gradient)
        return None, None, None, None


class _Attach(torch.autograd.Function):
    """Hand y through; in backward give `part`, a scalar loss, the gradient `scale`."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.scale = scale.to(part.device, part.dtype)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # pyright: ignore
        return gradient, ctx.scale, None


class RequireInputGradient:
    """Forward pre-hook of an injected block: under reentrant checkpointing its input gets a gradient.

    The base is frozen, so the hidden states of the first blocks have none, and reentrant checkpointing gives no
    parameter a gradient unless an input has one.
    """

    def __call__(self, block: nn.Module, args: tuple) -> None:
        reentrant = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        active = reentrant and getattr(block, "gradient_checkpointing", False) and block.training
        if active and torch.is_grad_enabled() and args and not args[0].requires_grad:
            args[0].requires_grad_(True)
