"""Which FFN modules compute exactly down(act(gate(x))·up(x)), so that one operator may stand in for their calls.

An FFN with one map for gate and up is not among them: two products round otherwise than one does.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as global_hooks

from moe_adapter.activations import activation_name
from moe_adapter.dense import Maps
from moe_adapter.ffn import FeedForward, is_linear

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def computes_ffn(module: nn.Module, ffn: FeedForward) -> bool:
    """Whether `module.forward`, traced, is the formula of `ffn` with an activation that kernels know, and no more."""
    if ffn.split or ffn.residual or ffn.gate == ffn.up or activation_name(ffn.activation, to_the_bit=True) is None:
        return False
    try:
        graph = _Tracer(ffn.activation).trace(module)
    except Exception:  # whatever a foreign forward does that can't be traced
        return False
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    return len(inputs) == 1 and _read(result, inputs[0], module, ffn) == _formula(ffn)


def plain_maps(module: nn.Module, gate_name: str | None, up_name: str, down_name: str) -> Maps | None:
    """The weights of a module that computes an FFN, by its maps' names; None while calling it does more than that.

    That is: a hook, a forward of its own (as accelerate's offloading sets), a LoRA or quantised map, sharded weights.
    """
    parts = (None if name is None else _part(module, name) for name in (gate_name, up_name, down_name))
    gate, up, down = parts
    if _is_hooked(module) or not all(part is None or _is_plain(part) for part in (gate, up, down)):
        return None
    if any(getattr(global_hooks, name) for name in _GLOBAL_HOOKS):
        return None
    weights = (None if gate is None else gate.weight, up.weight, down.weight)  # pyright: ignore
    return Maps(*weights, None if gate is None else gate.bias, up.bias, down.bias)  # pyright: ignore


def _part(module: nn.Module, name: str) -> nn.Module:
    """`get_submodule`, of which a decoding layer asks too much."""
    return module._modules[name] if name in module._modules else module.get_submodule(name)  # pyright: ignore


def _is_plain(part: nn.Module) -> bool:
    return type(part) is nn.Linear and type(part.weight) is nn.Parameter and not _is_hooked(part)


def _is_hooked(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    )


class _Tracer(fx.Tracer):
    """Keeps linear maps and the activation whole.

    Stricter than `trace.trace`: a branch on values is an error, since here a part of the forward may not stand for all.
    """

    def __init__(self, activation: Any):
        super().__init__(autowrap_functions=() if isinstance(activation, nn.Module) else (activation,))
        self.activation = activation

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_linear(m) or m is self.activation or super().is_leaf_module(m, module_qualified_name)


def _formula(ffn: FeedForward) -> tuple:
    if ffn.gate is None:
        return ("down", ("act", ("up", "x")))
    return ("down", ("mul", frozenset([("act", ("gate", "x")), ("up", "x")])))


def _read(node: Any, x: fx.Node, module: nn.Module, ffn: FeedForward) -> Any:
    """A node of the graph as a nested formula in the roles of `ffn`; None for anything that is not part of one."""
    if node is x:
        return "x"
    if not isinstance(node, fx.Node):
        return None

    def inner(index: int) -> Any:
        return _read(node.args[index], x, module, ffn)

    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        if target is ffn.activation:
            return ("act", inner(0))
        if isinstance(target, nn.Dropout) and target.p == 0:
            return inner(0)
        role = next((role for role in ("gate", "up", "down") if getattr(ffn, role) == node.target), None)
        return role and (role, inner(0))
    if node.op == "call_function" and node.target in (operator.mul, torch.mul):
        return ("mul", frozenset([inner(0), inner(1)]))
    if node.op == "call_function" and node.target is ffn.activation and not node.kwargs:
        return ("act", inner(0))
    return None
