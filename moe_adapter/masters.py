"""Looks up the float32 masters of engines ahead of a forward, where torch.compile leaves it alone.

A module of its own, imported where there is an engine, because saying so to torch.compile imports all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_adapter.precision import KeepsFloat32


@torch.compiler.disable  # a break of the graph, as engines' own hooks make one
def follow_masters(parts: Sequence[KeepsFloat32], training: bool) -> None:
    for part in parts:
        part.follow_masters(training)
