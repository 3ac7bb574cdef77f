"""The processes of a run: one alone, or those that a launcher (torchrun, deepspeed, accelerate) has started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # while the main process draws cases or follows tokens; a process that died ends the run


def launched() -> bool:
    """Whether a launcher has started this process."""
    return "LOCAL_RANK" in os.environ


def join() -> None:
    """Meet the other processes, if there are any: gloo on CPUs, NCCL on GPUs."""
    if launched():
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: T) -> list[T]:
    """The value of each process, in order of rank, on all of them."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all have: every so-manieth item."""
    return items[rank() :: count()]


def in_order(mine: Sequence[T]) -> list[T]:
    """What each process made of its `share`, in the order of all, on all of them."""
    parts = gather(list(mine))
    return [parts[index % count()][index // count()] for index in range(sum(map(len, parts)))]


def from_main(value: T) -> T:
    """The main process's value, on all of them."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
