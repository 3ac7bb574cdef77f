"""Experts that a model has of its own: mixtures of experts are told from dense blocks by structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.ffn import is_ffn, is_mixer
from moe_adapter.language import inside


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A module `name` that routes tokens to `count` experts, which the module `experts` in it holds."""

    name: str
    kind: str  # its class
    experts: str
    count: int

    def touches(self, name: str) -> bool:
        """Whether a module is the mixture or its experts, holds it, or is one of the experts."""
        return inside(self.name, name) or inside(name, self.experts)

    def refusal(self, dense: list[str]) -> MoEAdapterError:
        """The error for a target that means it; `dense` names feed-forward blocks beside the experts."""
        beside = f"such as {', '.join(dense[:3])}" if dense else "which this model has none of"
        return MoEAdapterError(
            f"{self.name} ({self.kind}) is a mixture of {self.count} experts already, expected a dense feed-forward "
            f"block: name dense blocks or shared experts by a regex or a callable, {beside}."
        )


def find_mixtures(model: nn.Module) -> list[Mixture]:
    """The mixtures of experts in a model: parts that hold several experts beside a router with a row for each."""
    modules = dict(model.named_modules())
    found: list[Mixture] = []
    for name, module in modules.items():
        count = _num_experts(module)
        if not count or any(is_mixer(part, modules[parent]) for part, parent in _path(name)):
            continue
        for owner in _ancestors(name):
            if _has_router(modules[owner], module, count):
                kind = type(modules[owner]).__name__
                found = [other for other in found if other.name != owner]
                found.append(Mixture(name=owner, kind=kind, experts=name, count=count))
                break
    return found


def _num_experts(module: nn.Module) -> int:
    """How many experts a module holds, as a list of FFNs or in stacked weights (E, …, …); 0 if it holds none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module) if sum(map(is_ffn, module.children())) > 1 else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0
    stacked = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1]
    return stacked[0][0] if len(stacked) > 1 or (stacked and stacked[0][0] > 1) else 0


def _has_router(owner: nn.Module, experts: nn.Module, count: int) -> bool:
    """Whether, beside the experts, `owner` holds a matrix with a row for each of them, and perhaps for some more."""
    own = {id(parameter) for parameter in experts.parameters()}
    shapes = [p.shape for p in owner.parameters() if p.dim() == 2 and id(p) not in own]
    return any(count <= shape[0] <= 2 * count or shape[1] == count for shape in shapes)


def _path(name: str) -> Iterator[tuple[str, str]]:
    """(last part, name) of a module and of each of its parents."""
    parts = name.split(".") if name else []
    return ((parts[end], ".".join(parts[: end + 1])) for end in range(len(parts)))


def _ancestors(name: str) -> Iterator[str]:
    """The parents of a module, from the nearest, up to the block that it is part of."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:end])
        if parts[end - 1].isdigit():
            return
