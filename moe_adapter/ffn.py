"""What a dense feed-forward block looks like, read off its structure rather than off its model's name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.trace import adds_argument, inline_activation, is_activated, trace

# Hints, for what structure alone leaves open. Everything else follows from shapes.
GATE_HINTS = ("gate", "wi_0", "w_0", "w1")  # which of two equal maps is the activated one
DOWN_HINTS = ("down", "wo", "w2", "c_proj", "fc2", "out", "4h_to_h")  # the last map, where widths are equal
ACTIVATION_HINTS = ("act", "gelu", "silu", "relu", "nonlin")  # attribute that holds the activation
CONFIG_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "ff_activation")
RESIDUAL_ARGUMENT = "residual"  # an FFN with this argument adds it to its output (Bloom, MPT)
NOT_AN_FFN = ("attn", "attention", "router", "mamba", "conv", "adapter")  # parts whose maps may look like an FFN's

Activation = Callable[..., Any]


class NotAnFFN(MoEAdapterError):
    """The module is no feed-forward block that experts could mirror; the message says why."""


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A host FFN D → F → D: its widths, its maps and its activation.

    `gate` is None for an ungated FFN; `gate == up` for one map that yields gate and up, gate first. The maps are named
    relative to the FFN's module or, where the FFN is `split`, its maps lying in a block beside others, to the block.
    `inner` names parameters of width F between the maps, such as a norm's: experts have no such.
    """

    hidden: int
    intermediate: int
    gate: str | None
    up: str
    down: str
    bias: bool
    activation: Activation
    residual: str | None = None
    split: bool = False
    inner: tuple[str, ...] = ()
    guessed: bool = False  # whether neither the FFN nor a config says what the activation is

    @property
    def gated(self) -> bool:
        return self.gate is not None


def describe(module: nn.Module, config: Any = None) -> FeedForward:
    """Read an FFN's structure; `config` (a model's) names the activation where the module doesn't hold it.

    Raises:
        NotAnFFN: the module's linear maps don't form D → F → D, it holds parameters of another width than F, or it
            adds an argument to its output (but for one named `residual`).
    """
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise NotAnFFN("it is a container without a forward of its own")
    parts = dict(_parts(module))
    ffn, graph = _read(module, parts, config)
    covered = {id(p) for name in (ffn.gate, ffn.up, ffn.down) if name for p in parts[name].parameters()}
    if isinstance(ffn.activation, nn.Module):
        covered |= {id(p) for p in ffn.activation.parameters()}
    beside = {name: p for name, p in module.named_parameters() if id(p) not in covered}
    others = [name for name, p in beside.items() if ffn.intermediate == ffn.hidden or p.shape != (ffn.intermediate,)]
    if others:
        raise NotAnFFN(f"beside its linear maps it holds {', '.join(others[:3])}")
    if graph and adds_argument(graph, ffn.down, but=RESIDUAL_ARGUMENT):
        raise NotAnFFN("it adds its input to what its last map gives")
    adds_residual = RESIDUAL_ARGUMENT in inspect.signature(module.forward).parameters
    return dataclasses.replace(ffn, inner=tuple(beside), residual=RESIDUAL_ARGUMENT if adds_residual else None)


def describe_split(block: nn.Module, config: Any = None) -> FeedForward:
    """Read an FFN whose maps lie in a block beside its attention and norms (BART, OPT, BERT).

    Raises:
        NotAnFFN: the block's linear maps outside its attention, those D → D left out, don't form one D → F → D.
    """
    parts = dict(_parts(block, skip=is_mixer))
    square = {name for name, child in parts.items() if is_linear(child) and len(set(in_out(child))) == 1}
    try:
        ffn, _ = _read(block, parts, config)
    except NotAnFFN:
        if not square:
            raise
        ffn, _ = _read(block, {name: child for name, child in parts.items() if name not in square}, config)
    return dataclasses.replace(ffn, split=True)


def is_ffn(module: nn.Module) -> bool:
    """Whether a module is a feed-forward block, whole."""
    try:
        describe(module)
    except NotAnFFN:
        return False
    return True


def is_mixer(name: str, module: nn.Module) -> bool:
    """Whether a part of a block is, by name or class, its attention or another part not to be searched for an FFN."""
    kind = type(module).__name__
    named = name if kind.endswith(("Layer", "Block")) else f"{name} {kind}"  # a block may be named for its attention
    return any(hint in named.lower() for hint in NOT_AN_FFN)


def _read(root: nn.Module, parts: dict[str, nn.Module], config: Any) -> tuple[FeedForward, fx.Graph | None]:
    """What the linear maps among `parts` are to one another, and the graph of `root`'s forward, if there is one."""
    maps = {name: child for name, child in parts.items() if is_linear(child)}
    if not 2 <= len(maps) <= 3:
        raise NotAnFFN(f"it holds {len(maps)} linear maps; an FFN has two (up, down) or three (gate, up, down)")
    gate, up, down = _roles(maps)
    (hidden, width), (intermediate, _) = in_out(maps[up]), in_out(maps[down])
    graph = trace(root, _is_whole)
    if gate is None and width == 2 * intermediate:
        gate = up
    elif gate and graph and is_activated(graph, up) and not is_activated(graph, gate):
        gate, up = up, gate
    activation, guessed = _activation(root, parts, config, graph and inline_activation(graph, gate or up, down)), False
    if activation is None:
        activation, guessed = nn.GELU() if gate is None else nn.SiLU(), True
    ffn = FeedForward(
        hidden=hidden,
        intermediate=intermediate,
        gate=gate,
        up=up,
        down=down,
        bias=any(getattr(child, "bias", None) is not None for child in maps.values()),
        activation=activation,
        guessed=guessed,
    )
    return ffn, graph


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one linear map: nn.Linear, its quantised and LoRA kin, or transformers' Conv1D."""
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or _is_conv1d(module)


def in_out(module: nn.Module) -> tuple[int, int]:
    """(input width, output width) of a linear map."""
    if _is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]  # pyright: ignore
    return int(module.in_features), int(module.out_features)  # pyright: ignore


def weight_and_bias(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear map's weight as (out, in), whatever its layout, and its bias."""
    weight = module.weight.T if _is_conv1d(module) else module.weight
    return weight, getattr(module, "bias", None)  # pyright: ignore


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _parts(
    module: nn.Module, prefix: str = "", skip: Callable[[str, nn.Module], bool] = lambda name, child: False
) -> Iterator[tuple[str, nn.Module]]:
    """Every descendant, without descending into linear maps (a LoRA layer holds further ones)."""
    for name, child in module.named_children():
        if skip(name, child):
            continue
        yield prefix + name, child
        if not is_linear(child):
            yield from _parts(child, f"{prefix}{name}.", skip)


def _roles(maps: dict[str, nn.Module]) -> tuple[str | None, str, str]:
    """(gate, up, down) among two or three linear maps. Raises NotAnFFN when their widths don't fit."""
    shapes = ", ".join(f"{name} {'→'.join(map(str, in_out(child)))}" for name, child in maps.items())
    # by name first, then the one registered last: matters only where D = F fits several ways
    for down in sorted(maps, key=lambda name: (_hinted(name, DOWN_HINTS), list(maps).index(name)), reverse=True):
        width, hidden = in_out(maps[down])
        ups = [name for name in maps if name != down]
        if len(ups) == 1 and in_out(maps[ups[0]]) in ((hidden, width), (hidden, 2 * width)):
            return None, ups[0], down
        if len(ups) == 2 and all(in_out(maps[name]) == (hidden, width) for name in ups):
            gate, up = sorted(ups, key=lambda name: not _hinted(name, GATE_HINTS))
            return gate, up, down
    raise NotAnFFN(f"its linear maps ({shapes}) do not go D → F → D")


def _hinted(name: str, hints: tuple[str, ...]) -> bool:
    return any(hint in name.rsplit(".", 1)[-1].lower() for hint in hints)


def _activation(
    root: nn.Module, parts: dict[str, nn.Module], config: Any, inline: Activation | None
) -> Activation | None:
    """The activation that the FFN holds, else the one called `inline`, else the one its config names."""
    for name, child in [*parts.items(), *vars(root).items()]:
        if _hinted(name, ACTIVATION_HINTS) and callable(child) and not _is_more_than_activation(child):
            return child
    for child in parts.values():
        if type(child).__module__ == nn.modules.activation.__name__:
            return child
    if inline is not None:
        return inline
    for name in CONFIG_ACTIVATIONS:
        value = getattr(config, name, None)
        if isinstance(value, str) and (found := _by_name(value)):
            return found
    return None


def _is_whole(name: str, module: nn.Module) -> bool:
    """Whether a trace keeps a part whole: a linear map, an activation, a norm, or what mixes tokens."""
    return is_linear(module) or not any(True for _ in module.children()) or is_mixer(name.rpartition(".")[2], module)


def _is_more_than_activation(child: Any) -> bool:
    return isinstance(child, nn.Dropout) or (isinstance(child, nn.Module) and any(map(is_linear, child.modules())))


def _by_name(name: str) -> Activation | None:
    tanh = {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"}
    if name in tanh:
        return nn.GELU(approximate="tanh")
    return getattr(nn.functional, {"swish": "silu"}.get(name, name), None)
