"""The language-model loss of transformers models by chunks of tokens, so that no whole logits are ever made.

At 32768 tokens of Qwen2-VL's vocabulary logits are 19.9 GB in float32, and the plain loss holds three times that in
backward. Here each chunk's logits become its loss and its gradient at once, in the forward pass of the head, where an
engine that shards weights (ZeRO-3, FSDP) has gathered the head's; backward needs neither. Tokens without a label are
left out first. It runs wherever torch does; Liger and cut-cross-entropy need a GPU.

torch's own `F.linear_cross_entropy` (2.13) chunks in the same way and gives the loss in the input's dtype: in bf16 a
loss near 3 comes in steps of 0.016, and γ·L_bal, added to it, is lost.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from moe_adapter.errors import MoEAdapterError
from moe_adapter.lora import is_peft_model
from moe_adapter.losses import IGNORED_LABEL
from moe_adapter.precision import wide

CHUNK = 512  # tokens


def use_chunked_loss(model: nn.Module, chunk: int = CHUNK) -> ChunkedLoss:
    """From now on `model`, in training mode and given labels, makes its loss by chunks and its logits not at all.

    The loss and its gradients are the plain ones, `num_items_in_batch` and labels of -100 included; γ·L_bal is added to
    it as to any. In its output `logits` has no columns. In evaluation mode, or without labels, all is as before.
    `remove()` of what is returned takes it back.

    Args:
        model: a transformers model whose loss is the causal language model's, or peft's wrapper of one.
        chunk: tokens whose logits exist at a time.

    Raises:
        MoEAdapterError: the model's loss is another, or its head is no plain linear map. At the first step: the model
            changes logits or labels between head and loss, as softcapping does.
    """
    owner: Any = model.get_base_model() if is_peft_model(model) else model  # pyright: ignore
    head = owner.get_output_embeddings() if hasattr(owner, "get_output_embeddings") else None
    if type(head) is not nn.Linear or "forward" in vars(head):
        raise MoEAdapterError(
            f"{type(owner).__name__}: got {type(head).__name__} for its head, expected a torch.nn.Linear whose forward "
            "is its own: without LoRA, quantisation or offloading, and not chunked already."
        )
    if owner.loss_function is not ForCausalLMLoss:
        raise MoEAdapterError(f"{type(owner).__name__}: expected a causal language model's loss, ForCausalLMLoss.")
    return ChunkedLoss(owner, head, chunk)


class ChunkedLoss:
    """The chunked loss in its model; `remove()` puts the plain one back. Also a context manager that does.

    The head makes the loss, from the labels that the model was called with, and gives a stand-in for logits; where the
    model asks its loss function for the loss of that stand-in, it gets what the head made.
    """

    def __init__(self, owner: Any, head: nn.Linear, chunk: int):
        self.owner, self.head, self.chunk = owner, head, chunk
        self.order = list(inspect.signature(owner.forward).parameters)
        self.given: dict[str, Any] = {}  # what the model was called with, while its head is to make the loss
        self.made: tuple[Tensor, Tensor] | None = None  # stand-in and loss
        self.own_loss = vars(owner).get("_loss_function")
        head.forward = self._head
        owner.loss_function = self.ForCausalLMLoss
        before = owner.register_forward_pre_hook(self._before, with_kwargs=True)
        self.hooks = (before, owner.register_forward_hook(self._after))

    def remove(self) -> None:
        """Put the model's own head and loss back."""
        for hook in self.hooks:
            hook.remove()
        del self.head.forward, self.owner._loss_function
        if self.own_loss is not None:
            self.owner.loss_function = self.own_loss

    def __enter__(self) -> ChunkedLoss:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _before(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.order, args, strict=False)), **kwargs}
        self.made, self.given = None, given if owner.training and given.get("labels") is not None else {}

    def _head(self, hidden: Tensor) -> Tensor:
        if not self.given or hidden.shape[:-1] != self.given["labels"].shape:
            return nn.Linear.forward(self.head, hidden)
        weight, bias, device = self.head.weight, self.head.bias, hidden.device.type
        x = hidden
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias))
        target_T = _targets(self.given).to(hidden.device)
        labelled = (target_T != IGNORED_LABEL).nonzero().squeeze(1)
        items = self.given.get("num_items_in_batch")
        items = torch.as_tensor(len(labelled) if items is None else items, device=hidden.device)
        scale = items.to(wide(x.dtype)).reciprocal()
        x_TD = x.reshape(-1, x.shape[-1])[labelled]
        loss = _ChunkedCrossEntropy.apply(x_TD, weight, bias, target_T[labelled], scale, self.chunk)
        self.made = hidden.new_empty(*hidden.shape[:-1], 1)[..., :0], loss  # of a storage by which it is known
        return self.made[0]

    def ForCausalLMLoss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        """The model's loss function, under the name by which its kind is known."""
        if self.made is None:
            return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)
        stand_in, loss = self.made
        same = all(kwargs.get(name) is self.given.get(name) for name in ("num_items_in_batch", "shift_labels"))
        if not _is_same(logits, stand_in) or labels is not self.given["labels"] or not same:
            raise MoEAdapterError(
                f"{type(self.owner).__name__} changes its logits or labels between its head and its loss, as soft-"
                "capping does; the chunked loss can't follow: remove() it and use the plain loss."
            )
        self.made = None
        return loss

    def _after(self, owner: nn.Module, args: tuple, output: Any) -> None:
        left, self.made, self.given = self.made, None, {}
        if left is not None:
            raise MoEAdapterError(
                f"{type(owner).__name__} makes its loss in its own way: remove() the chunked one and use the plain one."
            )


def _is_same(logits: Tensor, stand_in: Tensor) -> bool:
    """Whether the model hands the stand-in on, be it as an alias, as ZeRO-3's hooks make of every output."""
    if logits is stand_in:
        return True
    return logits.shape == stand_in.shape and logits.untyped_storage()._cdata == stand_in.untyped_storage()._cdata


def _targets(given: dict[str, Any]) -> Tensor:
    """The token that each position predicts, as transformers has it: the next one, or what `shift_labels` says."""
    if given.get("shift_labels") is not None:
        return given["shift_labels"].reshape(-1)
    return F.pad(given["labels"], (0, 1), value=IGNORED_LABEL)[..., 1:].reshape(-1)


class _ChunkedCrossEntropy(Function):
    """scale·Σ_t −log softmax(W·x_t + b)[target_t], in float32 at least, with the gradients made beside it."""

    @staticmethod
    def forward(ctx, x_TD, weight_VD, bias_V, target_T, scale, chunk: int) -> Tensor:
        needs, dtype = ctx.needs_input_grad, wide(x_TD.dtype)
        dx_TD = torch.empty_like(x_TD) if needs[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs[1] else None
        dbias_V = torch.zeros_like(bias_V, dtype=dtype) if needs[2] else None
        loss = scale * 0  # NaN where the mean is over nothing, as the plain loss
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, start + chunk)
            dx = None if dx_TD is None else dx_TD[rows]
            loss += _of_chunk(x_TD[rows], weight_VD, bias_V, target_T[rows, None], scale, dx, dweight_VD, dbias_V)
        ctx.save_for_backward(dx_TD, dweight_VD, dbias_V)
        ctx.dtype = x_TD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore
        return *(None if d is None else (d * grad).to(ctx.dtype) for d in ctx.saved_tensors), None, None, None


def _of_chunk(x_TD, weight_VD, bias_V, target_T1, scale, dx_TD, dweight_VD, dbias_V) -> Tensor:
    """A chunk's part of the loss; its gradients go into those that are wanted. Nothing else of it is left."""
    log_p_TV = F.linear(x_TD, weight_VD, bias_V).log_softmax(dim=-1, dtype=scale.dtype)
    loss = -scale * log_p_TV.gather(1, target_T1).sum()
    if dx_TD is not None or dweight_VD is not None or dbias_V is not None:
        dlogits_TV = log_p_TV.exp_().scatter_add_(1, target_T1, -torch.ones_like(target_T1, dtype=scale.dtype))
        dlogits_TV = dlogits_TV.mul_(scale).to(x_TD.dtype)
        if dx_TD is not None:
            torch.mm(dlogits_TV, weight_VD, out=dx_TD)
        if dweight_VD is not None:
            dweight_VD += dlogits_TV.T @ x_TD
        if dbias_V is not None:
            dbias_V += dlogits_TV.sum(0)
    return loss
