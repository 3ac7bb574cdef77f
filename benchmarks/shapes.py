"""What is measured: the layer's sizes, with Table 8's proportions of the paper, and numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths of a gated layer and a number of tokens."""

    tokens: int
    hidden: int
    static: int
    shared: int
    experts: int
    expert: int
    top_k: int

    def of(self, **changes: int) -> Shape:
        return replace(self, **changes)

    @property
    def routed(self) -> str:
        return f"hidden {self.hidden}, {self.experts} experts of {self.expert}, top-{self.top_k}, {self.tokens} tokens"

    @property
    def layer(self) -> str:
        return f"hidden {self.hidden}, static {self.static}, shared {self.shared}, {self.tokens} tokens"


# Table 8 is the larger one; the smaller keeps its proportions on a 0.5B host, in widths that kernels like.
LARGE = Shape(tokens=2048, hidden=3584, static=18944, shared=5632, experts=4, expert=1408, top_k=2)
SMALL = Shape(tokens=2048, hidden=896, static=4864, shared=1448, experts=4, expert=360, top_k=2)
FINE = SMALL.of(experts=64, expert=128, top_k=8)
TOY = Shape(tokens=64, hidden=64, static=160, shared=48, experts=4, expert=16, top_k=2)
