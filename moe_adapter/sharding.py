"""Parameters that are spread over processes: the one place that knows how to read and write them whole.

DTensors, FSDP2's and expert parallelism's, are torch's own; what another engine spreads is known by the attribute that
holds its whole shape, which GATHERED leads to the context that gathers it. For a spread parameter `whole`, `put` and
`in_place` are collective: every rank of the run calls them, in one order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn

from moe_adapter.errors import MoEAdapterError

# `gathered(parameters, write)`: within it they are whole, and with `write` rank 0's values are spread again after it.
Gathered = Callable[[list[nn.Parameter], bool], AbstractContextManager]

# Attribute → the function, or its dotted name "module:function".
GATHERED: dict[str, Gathered | str] = {"ds_shape": "moe_adapter.integrations.deepspeed:gathered"}  # ZeRO-3


def is_spread(parameter: torch.Tensor) -> bool:
    """Whether this process holds a part of a parameter only."""
    return hasattr(parameter, "full_tensor") or _engine(parameter) is not None


def has_spread(model: nn.Module) -> bool:
    """Whether any parameter of a model is spread."""
    return any(is_spread(parameter) for parameter in model.parameters())


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of all of a parameter; no collective."""
    return next((getattr(parameter, name) for name in GATHERED if hasattr(parameter, name)), parameter.shape)


def is_main_process() -> bool:
    """Whether this is the process that writes files: rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@torch.no_grad()
def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter, without gradient: the tensor itself where it isn't spread."""
    if hasattr(parameter, "full_tensor"):
        shards = parameter.detach()
        return shards.to(shards.device_mesh.device_type).full_tensor()  # pyright: ignore  # offloaded ones are moved
    if gathered := _engine(parameter):
        with gathered([parameter], False):  # pyright: ignore
            return parameter.detach().clone()
    return parameter.detach()


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter a whole value, the same on every rank, of which a spread one keeps its part."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore
        part = distribute_tensor(value.to(parameter.dtype), mesh, placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())  # pyright: ignore
    elif gathered := _engine(parameter):
        with gathered([parameter], True):  # pyright: ignore
            parameter.copy_(value)
    else:
        parameter.copy_(value)


@contextmanager
def in_place(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block these parameters are whole in `model`, for a library that reads them itself.

    They are gathered all at once: meant for a LoRA.
    """
    spread = {id(parameter): parameter for parameter in parameters if is_spread(parameter)}
    stand_ins = {
        key: nn.Parameter(whole(parameter), parameter.requires_grad)
        for key, parameter in spread.items()
        if hasattr(parameter, "full_tensor")
    }
    places = [
        (part._parameters, name, parameter)
        for part in model.modules()
        for name, parameter in part._parameters.items()
        if id(parameter) in stand_ins
    ]
    with ExitStack() as stack:
        for key, parameter in spread.items():
            if key not in stand_ins:
                stack.enter_context(_engine(parameter)([parameter], False))  # pyright: ignore
        for holder, name, parameter in places:
            holder[name] = stand_ins[id(parameter)]
        try:
            yield
        finally:
            for holder, name, parameter in places:
                holder[name] = parameter


def settle(model: nn.Module) -> None:
    """Give FSDP2's units their own parameters back: after a forward some hold whole ones, in the dtype of compute."""
    for part in model.modules():
        if _is_fsdp2(part):
            part.reshard()  # pyright: ignore


def own_class(module: nn.Module) -> type:
    """A module's class as it was before FSDP2 put one of its own in front."""
    return type(module).__mro__[2] if _is_fsdp2(module) else type(module)


@contextmanager
def together(spread: bool) -> Iterator[None]:
    """Where parameters are spread, ranks leave the block at one time, and with an error if any of them has one.

    Otherwise a rank that fails, on its disk for one, would leave the others waiting for it.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if spread and dist.is_initialized():
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure and f"{type(failure).__name__}: {failure}")
        first = next((rank for rank, text in enumerate(failures) if text), None)
        if first is not None and failure is None:
            raise MoEAdapterError(f"rank {first} failed, and this one stops with it: {failures[first]}")
    if failure is not None:
        raise failure


def _is_fsdp2(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _engine(parameter: torch.Tensor) -> Gathered | None:
    """What gathers a parameter that an engine other than torch's spreads."""
    entry = next((entry for attribute, entry in GATHERED.items() if hasattr(parameter, attribute)), None)
    if not isinstance(entry, str):
        return entry
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)
