"""The ideal: dense blocks with the multiply-adds that the layer's active parts have, and nothing else.

What the layer's time is divided by. `dense` is the frozen static FFN and one trainable dense FFN as wide as the shared
expert and the K chosen experts together, activations included. `gemms` are its matrix products alone, written into
memory that is there already: no layer can be faster. Neither routes, sorts, mixes or allocates for any of that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import Shape


class DenseFFN(nn.Module):
    """A SwiGLU block."""

    def __init__(self, hidden: int, width: int, *, trains: bool, like: Tensor):
        super().__init__()
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(shape, device=like.device).mul_(0.02).to(like.dtype), requires_grad=trains)
            for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class Dense(nn.Module):
    """The whole layer's ideal or, without a static part, that of the routed experts alone."""

    def __init__(self, shape: Shape, like: Tensor, *, routed_only: bool):
        super().__init__()
        width = shape.top_k * shape.expert + (0 if routed_only else shape.shared)
        self.static = None if routed_only else DenseFFN(shape.hidden, shape.static, trains=False, like=like)
        self.moe = DenseFFN(shape.hidden, width, trains=True, like=like)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x) if self.static is None else self.static(x) + self.moe(x)

    def products(self, tokens: int, *, training: bool) -> list[tuple[int, int, int]]:
        """(m, k, n) of every matrix product of a forward or a training step, the input's gradient included."""
        found = []
        for ffn in filter(None, (self.static, self.moe)):
            width, hidden = ffn.gate.shape
            found += [(tokens, hidden, width)] * 2 + [(tokens, width, hidden)]
            if training:  # dx through the three maps, then their own gradients
                found += [(tokens, width, hidden)] * 2 + [(tokens, hidden, width)]
                if ffn.gate.requires_grad:
                    found += [(width, tokens, hidden)] * 2 + [(hidden, tokens, width)]
        return found


def gemms(dense: Dense, x: Tensor, *, training: bool) -> Callable[[], None]:
    """A function that runs the products of `dense` and no more."""
    products = dense.products(len(x), training=training)
    sizes = {shape for m, k, n in products for shape in ((m, k), (n, k), (m, n))}
    memory = {size: torch.zeros(size, device=x.device, dtype=x.dtype).add_(0.01) for size in sizes}

    def run() -> None:
        for m, k, n in products:
            torch.mm(memory[m, k], memory[n, k].T, out=memory[m, n])

    return run


def multiply_adds(call: Callable[[], object]) -> int:
    """Multiply-adds that torch counts in a call, of matrix products only."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2
