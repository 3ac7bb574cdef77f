"""Stand-in for the compiled part of MegaBlocks, with the checks of its csrc/*.h: for Triton's interpreter only."""

from __future__ import annotations

import torch


def sort(x: torch.Tensor, end_bit: int, x_out: torch.Tensor, iota_out: torch.Tensor) -> None:
    """A stable radix sort that, like CUB's, looks at the lowest `end_bit` bits alone."""
    assert x.ndim == x_out.ndim == iota_out.ndim == 1 and x.is_contiguous()
    assert x.dtype == x_out.dtype == iota_out.dtype == torch.int32
    order = (x & ((1 << end_bit) - 1)).argsort(stable=True)
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x: torch.Tensor, bins: int) -> torch.Tensor:
    assert x.ndim == 1 and x.dtype == torch.int32
    return torch.bincount(x, minlength=bins).int()


def inclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    assert x.ndim == out.ndim == 2 and dim == 1 and x.dtype == out.dtype
    out.copy_(x.cumsum(dim))
