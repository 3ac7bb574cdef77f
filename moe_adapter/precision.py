"""Parameters that keep float32 (or float64) whatever dtype the rest of the model is cast to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

WIDE = (torch.float32, torch.float64)


class KeepsFloat32(nn.Module):
    """A module whose own parameters follow `.to(device)` but are never cast below float32.

    In bfloat16 a router's top-k flips, and a scalar at 0.5 swallows a step of 2e-5.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(_keep_wide(fn), recurse=False)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what must not lose precision beside `dtype`: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _keep_wide(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        out = fn(tensor)
        narrowed = tensor.dtype in WIDE and out.dtype not in WIDE
        return tensor.to(out.device) if narrowed else out

    return apply
