"""What can be changed of a model's routing: see `intervene`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_adapter.analysis.routers import RoutedBlock
from moe_adapter.errors import MoEAdapterError
from moe_adapter.layer import DualPathMoE
from moe_adapter.routing import in_backward

Numbers = int | Sequence[int]

SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # what transformers' blocks call it


class Routing(NamedTuple):
    """What a router decided: weights (T, K) and indices (T, K) into E experts, `out` of which are knocked out."""

    weights_TK: torch.Tensor
    index_TK: torch.Tensor
    num_experts: int
    out: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class KnockOut:
    """Take experts out: a token goes to the best of the others, weighted as the router weighs those.

    That is equation (4) over the experts that are left. With reroute=False a token keeps its experts, and those
    knocked out weigh 0.
    """

    experts: Numbers
    layers: Numbers | None = None
    reroute: bool = True

    def change(self, routing: Routing, generator: torch.Generator) -> Routing:
        if self.reroute:
            return routing  # intervene has done it: only the router knows its weights for others
        out = torch.tensor(checked_experts(self.experts, routing.num_experts), device=routing.index_TK.device)
        return routing._replace(weights_TK=routing.weights_TK.masked_fill(torch.isin(routing.index_TK, out), 0))


@dataclass(frozen=True, kw_only=True)
class ForceRoute:
    """Send every token to these experts, in equal shares of the sum of its weights."""

    experts: Numbers
    layers: Numbers | None = None

    def change(self, routing: Routing, generator: torch.Generator) -> Routing:
        index = torch.tensor(checked_experts(self.experts, routing.num_experts)).to(routing.index_TK)
        weights_T1 = routing.weights_TK.sum(dim=-1, keepdim=True) / len(index)
        return routing._replace(
            weights_TK=weights_T1.repeat(1, len(index)), index_TK=index.repeat(len(routing.index_TK), 1)
        )


@dataclass(frozen=True, kw_only=True)
class ShuffleRouter:
    """Send every token to experts drawn at random, all different, with its weights as they are.

    The draws depend on the seed, the layer and the calls of its router before; not on the device.
    """

    layers: Numbers | None = None
    seed: int = 0

    def change(self, routing: Routing, generator: torch.Generator) -> Routing:
        if in_backward():
            raise MoEAdapterError(
                "a shuffled router draws other experts when gradient checkpointing runs it again; switch "
                "checkpointing off, or evaluate under torch.no_grad()."
            )
        tokens, top_k = routing.index_TK.shape
        scores_TE = torch.rand(tokens, routing.num_experts, generator=generator)
        scores_TE[:, list(routing.out)] = -1
        return routing._replace(index_TK=scores_TE.topk(top_k, dim=-1).indices.to(routing.index_TK))


@dataclass(frozen=True, kw_only=True)
class UniformWeights:
    """Keep every token's experts, each with an equal share of the sum of its weights."""

    layers: Numbers | None = None

    def change(self, routing: Routing, generator: torch.Generator) -> Routing:
        mean_T1 = routing.weights_TK.mean(dim=-1, keepdim=True)
        return routing._replace(weights_TK=mean_T1.expand_as(routing.weights_TK).contiguous())


@dataclass(frozen=True, kw_only=True)
class StaticOnly:
    """Answer with the static expert alone, FFN(X), as the base model does; of dual-path layers only."""

    layers: Numbers | None = None

    def apply(self, block: RoutedBlock, undo: ExitStack) -> None:
        layer = block.block
        if not isinstance(layer, DualPathMoE):
            raise MoEAdapterError(f"{block.name} is a {type(layer).__name__}, which has no static expert.")
        undo.callback(setattr, layer, "static_only", layer.static_only)
        layer.static_only = True


@dataclass(frozen=True, kw_only=True)
class WithoutShared:
    """Leave the shared expert out of the sum: S(X) = 0."""

    layers: Numbers | None = None

    def apply(self, block: RoutedBlock, undo: ExitStack) -> None:
        shared = next((part for name in SHARED if (part := getattr(block.block, name, None)) is not None), None)
        if shared is None:
            raise MoEAdapterError(f"{block.name} has no shared expert to leave out.")
        undo.callback(shared.register_forward_hook(lambda module, args, output: torch.zeros_like(output)).remove)


RouterChange = KnockOut | ForceRoute | ShuffleRouter | UniformWeights
BlockChange = StaticOnly | WithoutShared
Intervention = RouterChange | BlockChange


def numbers_of(given: Numbers) -> list[int]:
    return [given] if isinstance(given, int) else list(given)


def checked_experts(experts: Numbers, num_experts: int) -> list[int]:
    numbers = list(dict.fromkeys(numbers_of(experts)))
    if not numbers or any(not 0 <= number < num_experts for number in numbers):
        raise MoEAdapterError(f"got experts {numbers}; the layer has experts 0 to {num_experts - 1}.")
    return numbers
