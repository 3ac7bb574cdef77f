"""Stand-in for the compiled part of grouped_gemm, with the checks of its csrc/grouped_gemm.cu, any float dtype."""

from __future__ import annotations

import torch


def gmm(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, batch_sizes: torch.Tensor, trans_a: bool, trans_b: bool):
    """c[group] = a[group] @ b[group], by row groups of a; the groups without rows are left as they came."""
    assert not (trans_a and trans_b)
    assert batch_sizes.ndim == 1 and batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu"
    assert a.dtype == b.dtype == c.dtype
    assert all(tensor.is_contiguous() for tensor in (a, b, c))
    assert a.shape[0] == batch_sizes.sum()
    start = 0
    for group, size in enumerate(batch_sizes.tolist()):
        rows = slice(start, start + size)
        start += size
        if not size:
            continue
        if trans_a:
            c[group] = a[rows].T @ b[rows]
        else:
            c[rows] = a[rows] @ (b[group].T if trans_b else b[group])
