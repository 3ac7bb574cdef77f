"""Changes where tokens go while a model runs: what an expert causes, not only what it goes together with.

with intervene(model, KnockOut(experts=3, layers=[0, 1])):
    model(**batch)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_adapter.analysis.interventions import (
    BlockChange,
    ForceRoute,
    Intervention,
    KnockOut,
    RouterChange,
    Routing,
    ShuffleRouter,
    StaticOnly,
    UniformWeights,
    WithoutShared,
    checked_experts,
    numbers_of,
)
from moe_adapter.analysis.routers import find_routers, read_routing
from moe_adapter.errors import MoEAdapterError

__all__ = [
    "ForceRoute",
    "Intervention",
    "KnockOut",
    "ShuffleRouter",
    "StaticOnly",
    "UniformWeights",
    "WithoutShared",
    "intervene",
]


@contextmanager
def intervene(model: nn.Module, *interventions: Intervention) -> Iterator[None]:
    """Run the model with its routing changed, in our dual-path layers and in transformers' own MoE blocks.

    Layers are numbered as in a record, None is all of them. Experts are knocked out first; the other changes follow in
    the order given. `record_routing` around it or inside it shows the routing as changed. What was changed is put back
    when the block ends, by an error too. torch.compile is off inside the block.

    Source: DeepSeekMoE, arXiv 2401.06066, section 4.5, masks experts and routes to the top-k of the rest.

    Raises:
        MoEAdapterError: the model has no router; a layer, an expert, a static or a shared expert that isn't there; too
            few experts left; interventions inside another `intervene`.
    """
    blocks = find_routers(model)
    if any(isinstance(hook, RouterHook) for block in blocks for hook in block.router._forward_hooks.values()):
        raise MoEAdapterError("interventions are in force already; give them all to one intervene(model, …).")
    with ExitStack() as undo, torch.compiler.set_stance("force_eager"):  # compiled code skips hooks
        for number, block in enumerate(blocks):
            here = [each for each in interventions if number in _layers(each, len(blocks))]
            for each in here:
                if isinstance(each, BlockChange):
                    each.apply(block, undo)
            if changes := [each for each in here if not isinstance(each, BlockChange)]:
                hook = RouterHook(block.name, number, changes)
                handle = block.router.register_forward_hook(hook, with_kwargs=True, prepend=True)
                undo.callback(handle.remove)
        yield


class RouterHook:
    """Forward hook of a router that changes what it decided; first of the hooks, so that others see the change."""

    def __init__(self, name: str, layer: int, changes: list[RouterChange]):
        self.name = name
        self.changes = changes
        seeds = [getattr(change, "seed", 0) * 100_003 + layer for change in changes]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, router: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
        num_experts = read_routing(self.name, output)[2]
        out = self._knocked_out(num_experts)
        if out:
            output = self._reroute(router, args, kwargs, output, num_experts, out)
        logits, weights, index, *rest = output
        top_k = index.shape[-1]
        routing = Routing(weights.reshape(-1, top_k), index.reshape(-1, top_k), num_experts, out)
        for change, generator in zip(self.changes, self.generators, strict=True):
            routing = change.change(routing, generator)
        shape = (*index.shape[:-1], routing.index_TK.shape[-1])
        return (logits, routing.weights_TK.reshape(shape), routing.index_TK.reshape(shape), *rest)

    def _knocked_out(self, num_experts: int) -> tuple[int, ...]:
        rerouted = (change for change in self.changes if isinstance(change, KnockOut) and change.reroute)
        return tuple(sorted({expert for change in rerouted for expert in checked_experts(change.experts, num_experts)}))

    def _reroute(self, router, args, kwargs, output, num_experts: int, out: tuple[int, ...]) -> tuple:
        """The router's output with the experts `out` left out; its logits stay as they were."""
        top_k = output[2].shape[-1]
        if num_experts - len(out) < top_k:
            raise MoEAdapterError(
                f"{self.name} routes to {top_k} of {num_experts} experts, so at most {num_experts - top_k} can be "
                f"knocked out, not {len(out)}; with reroute=False any number can."
            )
        with _WithoutExperts(num_experts, out) as without:
            _, weights, index, *rest = router.forward(*args, **kwargs)
        if without.ran_out or torch.isin(index, torch.tensor(out, device=index.device)).any():
            raise MoEAdapterError(
                f"the router of {self.name} chooses {top_k} experts by groups, and without {list(out)} a group that it "
                "chose has too few. Use reroute=False."
            )
        return (output[0], weights, index, *rest)


class _WithoutExperts(TorchFunctionMode):
    """Inside a router: wherever all E experts are scored or chosen from, some have the logit −∞.

    So a router of any kind (softmax over the selected or over all, sigmoid scores, groups of experts) decides as if it
    had the others alone.
    """

    DECIDES = frozenset({"softmax", "log_softmax", "sigmoid", "softplus", "topk", "sort", "argsort", "argmax"})

    def __init__(self, num_experts: int, out: tuple[int, ...]):
        super().__init__()
        self.num_experts = num_experts
        self.out = out
        self.ran_out = False  # whether an expert with −∞ was chosen, for want of others

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in self.DECIDES or not args or args[0].shape[-1:] != (self.num_experts,):
            return func(*args, **(kwargs or {}))
        left = args[0].index_fill(-1, torch.tensor(self.out, device=args[0].device), -torch.inf)
        result = func(left, *args[1:], **(kwargs or {}))
        if name == "topk":
            self.ran_out |= bool(result[0].isneginf().any())
        return result


def _layers(intervention: Intervention, layers: int) -> list[int]:
    numbers = list(range(layers)) if intervention.layers is None else numbers_of(intervention.layers)
    if not numbers or any(not 0 <= number < layers for number in numbers):
        raise MoEAdapterError(f"got layers {numbers}; the model has routed layers 0 to {layers - 1}.")
    return numbers
