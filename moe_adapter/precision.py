"""Parameters that keep float32 (or float64) whatever dtype the rest of the model is cast to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from moe_adapter.sharding import whole

WIDE = (torch.float32, torch.float64)


class KeepsFloat32(nn.Module):
    """A module whose own parameters follow `.to(device)` but are never cast below float32.

    In bfloat16 a router's top-k flips, and a scalar at 0.5 swallows a step of 2e-5. DeepSpeed's bf16 and fp16 engines
    cast them nevertheless and train a float32 master of each, and under FSDP2's mixed precision a forward sees a cast
    copy of the float32 shards; there `precise` is the master's value.
    """

    def __init__(self) -> None:
        super().__init__()
        self._masters: dict[str, torch.Tensor] = {}  # of parameters that an engine has cast, as they last were

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(_keep_wide(fn), recurse=False)

    def precise(self, name: str) -> torch.Tensor:
        """The own parameter `name` in float32 at least: its master's value where an engine has cast it.

        The gradient goes to the parameter. A master that does not round to what the parameter holds is not its own any
        more: it has been loaded, or written to, or a step was made since.
        """
        parameter = getattr(self, name)
        value = parameter.to(wide(parameter.dtype))
        if parameter.dtype in WIDE or name not in self._masters:
            return value
        master, now = self._masters[name].to(value.device), value.detach()
        return value + torch.where(master.to(parameter.dtype) == parameter.detach(), master - now, 0.0)

    def settled(self, name: str) -> torch.Tensor:
        """The own parameter `name` between steps, whole and as it was trained; a collective where it is spread."""
        parameter = getattr(self, name)
        master = None if parameter.dtype in WIDE else float32_master(parameter)
        return whole(parameter) if master is None else master

    @property
    def is_cast(self) -> bool:
        """Whether an engine has cast own parameters, so that their values are masters, spread over ranks."""
        return any(p.dtype not in WIDE and has_master(p) for p in self.parameters(recurse=False))

    @property
    def has_engine(self) -> bool:
        """Whether an engine spreads own parameters or has cast them, so that there may be masters to follow."""
        return any(hasattr(p, "full_tensor") or p.dtype not in WIDE for p in self.parameters(recurse=False))

    def follow_masters(self, training: bool) -> None:
        """Look up the masters of what is cast, or will be: a collective of all ranks that hold the model together.

        DeepSpeed's in training steps alone: its ranks need not evaluate or generate side by side.
        """
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            if hasattr(parameter, "full_tensor"):  # FSDP2's, before the unit around it gathers and casts it
                self._masters[name] = whole(parameter)
            elif training and parameter.dtype not in WIDE and (master := float32_master(parameter)) is not None:
                self._masters[name] = master


class FollowMasters:
    """Forward pre-hook of the module that runs the blocks: its layers see what the last step changed."""

    def __init__(self, parts: Sequence[KeepsFloat32]):
        self.parts = parts

    def __call__(self, stack: nn.Module, args: tuple) -> None:
        if dist.is_available() and dist.is_initialized() and any(part.has_engine for part in self.parts):
            from moe_adapter.masters import follow_masters

            follow_masters(self.parts, stack.training and torch.is_grad_enabled())  # pyright: ignore


def float32_master(parameter: nn.Parameter) -> torch.Tensor | None:
    """The float32 value that DeepSpeed trains for a parameter it has cast, on every rank; None without one."""
    if not has_master(parameter):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    if master is None or master.shape != parameter.shape:  # ZeRO-3's parameter is spread
        return master
    return master if torch.equal(master.to(parameter.dtype), parameter.detach()) else None  # its engine is no more


def has_master(parameter: nn.Parameter) -> bool:
    """Whether a DeepSpeed engine trains this parameter, by attributes that ZeRO-3, and the other stages, give it."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what must not lose precision beside `dtype`: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _keep_wide(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        out = fn(tensor)
        narrowed = tensor.dtype in WIDE and out.dtype not in WIDE
        return tensor.to(out.device) if narrowed else out

    return apply
