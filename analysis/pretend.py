"""Runs a model without data: floating-point tensors have shapes and no memory, integers keep their values.

torch's FakeTensorMode carries the shapes, on the CPU. What is added: integers (token ids, masks, image grids) stay
real, so that code which reads them takes its way; tokens spread evenly over the experts; and what differs on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_adapter import backends, dense, lean, recognise

REAL = 2**24  # elements; a larger tensor, such as a mask of tokens × tokens, has no values whatever made it
GROUPED_MM, LAYER_NORM = torch._grouped_mm, F.layer_norm
VALUES_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)


@contextlib.contextmanager
def without_data(model: nn.Module, device: str) -> Iterator[None]:
    """Within it `model`, of the meta device, runs without data, and as it would on `device`, "cpu" or "cuda".

    On a GPU the layer takes another backend and a dense block the tokens at once; torch's attention keeps the same
    tensors as the CPU's flash kernel, and autocast has layer norms in float32.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    replacements: list[tuple[Any, str, Any]] = [
        (lean, "_groups", _even_groups),
        (recognise, "_is_plain", _is_plain),
        (torch, "_grouped_mm", _grouped_mm),
    ]
    if device == "cuda":
        replacements += [
            (backends, "choose", _choose_on_gpu),
            (dense, "_chunks", lambda *_, **__: (slice(None),)),
            (F, "layer_norm", _layer_norm),
        ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(_replaced(owner, name, value))
        for context in (fake, _moved(model), _IntegersAreReal()):
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """`model` with tensors of the same shapes on the CPU in place of its own, tied where they are tied."""
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    before = [dict(table) for table in tables]
    new: dict[int, Tensor] = {}
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None:
                table[name] = new.setdefault(id(tensor), _like(tensor))
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _even_groups(index_TK: Tensor, experts: int) -> tuple[Tensor, list[tuple[int, slice]]]:
    """`lean._groups` of tokens that spread evenly, as their choice of experts has no values."""
    slots = index_TK.numel()
    ends = [slots * (expert + 1) // experts for expert in range(experts)]
    groups = [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return index_TK.reshape(-1).argsort(stable=True), [group for group in groups if group[1].start < group[1].stop]


class _IntegersAreReal(TorchDispatchMode):
    """Operators on integers that have values are run for real; where they meet others, they give up their values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given) or not self._can_be_real(func, given, args, kwargs):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _can_be_real(self, func, given: list[Tensor], args, kwargs) -> bool:
        """Whether an operator's result may have values: what is made of real tensors alone, and integers of none."""
        try:
            results = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
        except VALUES_NEEDED:
            return True
        return all(result.numel() <= REAL and (bool(given) or not result.is_floating_point()) for result in results)


def _choose_on_gpu(experts, x_TD: Tensor) -> str:
    """`backends.choose` for a tensor on a GPU."""
    return "lean" if backends._refusal("grouped_mm", experts, x_TD) else "grouped_mm"


def _is_plain(part: nn.Module) -> bool:
    """`recognise._is_plain` of a map whose weight has no data, and is of another class therefore."""
    return type(part) is nn.Linear and isinstance(part.weight, nn.Parameter) and not recognise._is_hooked(part)


def _grouped_mm(left: Tensor, right: Tensor, *, offs: Tensor, bias: None = None, out_dtype: None = None) -> Tensor:
    """torch's, which has a shape rule for bfloat16 alone."""
    if left.dtype == torch.bfloat16:
        return GROUPED_MM(left, right, offs=offs)
    return torch.ops.transformers.grouped_mm_fallback(left, right, offs)


def _layer_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """F.layer_norm under a GPU's autocast, which has it in float32."""
    return LAYER_NORM(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)
