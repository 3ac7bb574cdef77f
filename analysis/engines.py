"""How an engine spreads a training step over GPUs: bytes per GPU, from the step that one device would make.

A step is simulated as the engine computes it (see `computed_by`), and its weights, states and gradients are divided as
the engine divides them: a GPU's share is 1/n, and w the bytes of a parameter in the forward pass. Which copies and
buffers there are beside them was read off DeepSpeed 0.19, torch 2.14 and accelerate 1.15 on two processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from moe_adapter.analysis.memory import Moment, StepMemory

FP32 = 4  # bytes
LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered: `stage3_max_live_parameters`
BUCKET = 500_000_000  # gradients that ZeRO-1 sends at a time, DeepSpeed's `elements_per_buffer`
PREFETCHED = 0.9  # of hidden²: what `stage3_prefetch_bucket_size: auto` is to transformers


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters: trained and frozen, and of the parts that an engine gathers or sends as one."""

    trained: int
    frozen: int
    largest: int  # of the parameters that train
    block: int  # the largest
    block_trained: int
    end: int  # embedding or head, the larger one
    rest: int  # outside blocks, embedding and head
    hidden: int  # the width of the hidden states


@dataclass(frozen=True, kw_only=True)
class PerGPU:
    """Bytes on one GPU at the fullest moment of a step."""

    weights: int  # as the forward reads them, or this GPU's share
    masters: int  # a second, float32 copy of what trains
    optimizer: int
    gradients: int
    buffers: int  # gathered weights, and what gradients are exchanged in
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a model whose stage is set; blocks are its `_no_split_modules`, which FSDP2 shards one by one."""
    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    largest = max(blocks, key=_numel, default=model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # pyright: ignore
    config: Any = model.config
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return Sizes(
        trained=sum(trained),
        frozen=_numel(model) - sum(trained),
        largest=max(trained),
        block=_numel(largest),
        block_trained=sum(p.numel() for p in largest.parameters() if p.requires_grad),
        end=max(map(_numel, ends)),
        rest=_numel(model) - _numel(nn.ModuleList([*blocks, *ends])),
        hidden=config.get_text_config().hidden_size,
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How an engine computes, and what it leaves of a moment of the step on each of n GPUs."""

    masters: bool  # what trains is float32 in the forward pass; else it is in bf16 there, as the rest
    autocast: bool
    hooks: bool  # in every module, so that the layer calls its FFNs as they are and not as one operator
    divide: Callable[[StepMemory, Moment, Sizes, float, int], PerGPU]


def computed_by(engine: str, model: nn.Module, *, bf16: bool = True) -> bool:
    """Bring a model on the meta device, its stage set, to what `engine` computes; whether it does so under autocast."""
    traits = ENGINES[engine]
    for parameter in model.parameters():
        own = parameter.requires_grad and traits.masters
        parameter.data = parameter.data.to(torch.bfloat16 if bf16 and not own else torch.float32)
    for module in model.modules() if traits.hooks else ():
        module.register_forward_pre_hook(_none)
    return bf16 and traits.autocast


def _none(*_: Any) -> None:
    """A hook that does nothing."""


def per_gpu(step: StepMemory, sizes: Sizes, engine: str, gpus: int, *, width: int = 2, offload: bool = False) -> PerGPU:
    """What `engine` leaves of a step on each of `gpus` GPUs, at the moment that is then the fullest.

    `width`: bytes of a parameter in the forward pass. With `offload` all that ZeRO or FSDP2 divides waits in the host's
    memory, so that a GPU's share is none.
    """
    share = 0 if offload else 1 / gpus
    divided = [ENGINES[engine].divide(step, moment, sizes, share, width) for moment in step.moments]
    return max(divided, key=lambda candidate: candidate.total)


def _alone(step: StepMemory, moment: Moment, sizes: Sizes, share: float, w: int) -> PerGPU:
    return PerGPU(
        weights=step.frozen + step.trained,
        masters=0,
        optimizer=step.optimizer,
        gradients=moment.gradients,
        buffers=0,
        activations=moment.activations,
        logits=moment.logits,
    )


def _ddp(step: StepMemory, moment: Moment, sizes: Sizes, share: float, w: int) -> PerGPU:
    """Gradients are exchanged in buckets that hold all of them once more and stay."""
    return replace(_alone(step, moment, sizes, share, w), buffers=step.gradients)


def _zero1(step: StepMemory, moment: Moment, sizes: Sizes, share: float, w: int) -> PerGPU:
    """Every GPU adds its gradients up in float32, whole; when all are there, they are sent from a bucket."""
    sent = moment.gradients == step.gradients
    return replace(
        _zero2(step, moment, sizes, share, w),
        gradients=moment.gradients + FP32 * sizes.trained,
        buffers=w * min(sizes.trained, BUCKET) if sent else 0,
    )


def _zero2(step: StepMemory, moment: Moment, sizes: Sizes, share: float, w: int) -> PerGPU:
    """Its share of the gradients in float32, and until backward ends as it arrived; two buckets of hidden².

    On its way to the host's memory the largest gradient passes through a buffer of its own.
    """
    own = int(sizes.trained * share)
    return PerGPU(
        weights=step.frozen + step.trained,
        masters=FP32 * own,
        optimizer=2 * FP32 * own,
        gradients=FP32 * own + min(moment.gradients, w * own),
        buffers=w * (2 * sizes.hidden**2 + (0 if share else sizes.largest)),
        activations=moment.activations,
        logits=moment.logits,
    )


def _zero3(step: StepMemory, moment: Moment, sizes: Sizes, share: float, w: int) -> PerGPU:
    """Parameters are gathered up to a number; the largest one's gradient, and a copy to send, are whole for a while."""
    total = sizes.trained + sizes.frozen
    gathered = min(total, LIVE + int(PREFETCHED * sizes.hidden**2))
    return replace(
        _zero2(step, moment, sizes, share, w),
        weights=w * int(total * share),
        gradients=FP32 * int(sizes.trained * share),
        buffers=w * (gathered + 2 * sizes.largest + sizes.hidden**2),
    )


def _fsdp2(step: StepMemory, moment: Moment, sizes: Sizes, share: float, w: int) -> PerGPU:
    """A block, or an end, is gathered twice: in the buffer it arrives in, and as parameters; what is neither stays.

    A block's gradients are whole until they are sent.
    """
    return PerGPU(
        weights=int((FP32 * sizes.trained + step.frozen) * share),
        masters=0,
        optimizer=2 * FP32 * int(sizes.trained * share),
        gradients=FP32 * int(moment.gradients // w * share) + w * sizes.block_trained,
        buffers=w * (sizes.rest + 2 * max(sizes.block, sizes.end)),
        activations=moment.activations,
        logits=moment.logits,
    )


ENGINES = {
    "alone": Engine(masters=True, autocast=True, hooks=False, divide=_alone),
    "ddp": Engine(masters=True, autocast=True, hooks=False, divide=_ddp),
    "zero1": Engine(masters=False, autocast=False, hooks=False, divide=_zero1),
    "zero2": Engine(masters=False, autocast=False, hooks=False, divide=_zero2),
    "zero3": Engine(masters=False, autocast=False, hooks=True, divide=_zero3),
    "fsdp2": Engine(masters=False, autocast=True, hooks=False, divide=_fsdp2),
}
