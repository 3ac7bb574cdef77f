"""What an FFN's forward does that its modules don't show, read off its torch.fx graph.

A graph needs no data, so this works on the meta device too. A forward that can't be traced tells nothing: None.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
SPLITS = ("chunk", "split", "tensor_split", "unbind", "getitem")  # what lies between one map for both and its halves
ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "tanh", "sigmoid")
ACTIVATIONS += ("softplus", "hardswish", "hardsigmoid", "hardtanh", "softsign", "logsigmoid", "square")


class Chain(nn.Module):
    """Functions of one argument, one after another."""

    def __init__(self, steps: list[Callable[[torch.Tensor], torch.Tensor]]):
        super().__init__()
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return x


def trace(module: nn.Module, is_leaf: Callable[[str, nn.Module], bool]) -> fx.Graph | None:
    """The graph of `module.forward` on its required arguments, the others at their defaults."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        return _Tracer(is_leaf).trace(module, concrete_args=defaults)
    except Exception:  # whatever a foreign forward does that can't be traced
        return None


def inline_activation(graph: fx.Graph, first: str, last: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The activation that is called as a function between the map `first`, gate or up, and the map `last`."""
    start = _call(graph, first)
    source = start and next(_activated(start, last), None)
    if source is None or source.op == "call_module":
        return None
    steps, node, end = [], source, source
    while (function := _function(node)) is not None:
        steps.append(function)
        users = list(node.users)
        if len(users) != 1:
            return None
        end, node = node, users[0]
    if node.target in PRODUCTS and source.args[0] in node.args:  # x·σ(x), written out
        return F.silu if steps == [torch.sigmoid] and end is source else None
    return steps[0] if len(steps) == 1 else Chain(steps)


def is_activated(graph: fx.Graph, first: str) -> bool:
    """Whether what the map `first` gives goes through an activation, function or module, before anything else."""
    start = _call(graph, first)
    return start is not None and next(_activated(start, ""), None) is not None


def adds_argument(graph: fx.Graph, last: str, but: str) -> bool:
    """Whether, after the map `last`, the forward adds one of its own arguments, other than the one named `but`."""
    nodes = list(graph.nodes)
    end = _call(graph, last)
    after = nodes[nodes.index(end) :] if end else []
    sums = [node for node in after if node.op in ("call_function", "call_method") and node.target in ADDITIONS]
    terms = [arg for node in sums for arg in node.args if isinstance(arg, fx.Node)]
    return any(term.op == "placeholder" and term.target != but for term in terms)


class _Tracer(fx.Tracer):
    """Keeps parts whole that `is_leaf` names, and takes no branch that depends on values."""

    def __init__(self, is_leaf: Callable[[str, nn.Module], bool]):
        super().__init__()
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(module_qualified_name, m) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return False


def _call(graph: fx.Graph, name: str) -> fx.Node | None:
    return next((node for node in graph.nodes if node.op == "call_module" and node.target == name), None)


def _activated(node: fx.Node, last: str) -> Iterator[fx.Node]:
    """The first activations behind a map, through its halves and dropout."""
    for user in node.users:
        if _function(user) is not None or (user.op == "call_module" and "dropout" not in _name(user)):
            yield user
        elif user.target != last and (_name(user) in SPLITS or "dropout" in _name(user)):
            yield from _activated(user, last)


def _function(node: fx.Node) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The activation that a node calls, its options bound; None for any other node."""
    name = _name(node)
    if name == "pow" and tuple(node.args[1:]) == (2,):
        return torch.square
    if name not in ACTIVATIONS or len(node.args) != 1:
        return None
    function = getattr(torch, name, None) or getattr(F, name)
    function = getattr(F, name) if name in ("gelu", "elu", "leaky_relu", "softplus") else function
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    return functools.partial(function, **options) if options else function


def _name(node: fx.Node) -> str:
    """What a node calls, by name: `relu` for torch.relu, F.relu, x.relu() and x.relu_()."""
    if node.op not in ("call_function", "call_method"):
        return "dropout" if node.op == "call_module" and "drop" in str(node.target) else ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_")
