"""From a target to the feed-forward blocks it means, in any model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.ffn import FeedForward, NotAnFFN, describe

Target = str | re.Pattern | Iterable[str] | Callable[[str, nn.Module], bool]

LANGUAGE_MODEL_FFN = "mlp"  # the target that means: the FFN of every block of the language model
NOT_AN_FFN = ("attn", "attention", "router")  # hint: parts of a block whose maps may look like an FFN's


@dataclass(frozen=True, kw_only=True)
class Site:
    """One FFN to replace: its dotted name, the module, what it looks like, and the stack it belongs to."""

    name: str
    module: nn.Module
    ffn: FeedForward
    stack: str  # name of the module that runs the blocks; its `attention_mask` says which tokens are padding


def find_sites(model: nn.Module, target: Target) -> list[Site]:
    """The FFNs that `target` means, in the model's order, each once however often it is shared.

    Raises:
        MoEAdapterError: nothing matches, or a match is no FFN.
    """
    if target == LANGUAGE_MODEL_FFN:
        return _language_model_sites(model)
    if not isinstance(target, str | re.Pattern) and not callable(target):
        union = {site.name: site for part in target for site in find_sites(model, part)}
        return [union[name] for name, _ in model.named_modules() if name in union]
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if name and _matches(target, name, module)]
    if not names:
        raise MoEAdapterError(f"target {target!r} matches no module{_nearest(target, modules)}.")
    outermost = [name for name in names if not any(name.startswith(other + ".") for other in names)]
    return [_site(model, name) for name in outermost]


def _language_model_sites(model: nn.Module) -> list[Site]:
    scope = _language_model(model)
    found = [
        _site(model, name)
        for stack, blocks in _stacks(model)
        if _inside(stack, scope)
        for index, block in enumerate(blocks)
        for name in _ffns(block, f"{stack}.{index}")
    ]
    unique = list({id(site.module): site for site in reversed(found)}.values())[::-1]
    if not unique:
        raise MoEAdapterError(
            f"no feed-forward block found in the language model of {type(model).__name__}; name the modules yourself: "
            'target="suffix", a regex, or a callable (name, module) -> bool.'
        )
    return unique


def _language_model(model: nn.Module) -> str:
    """Name of the part of the model that is its text decoder ("" for the whole model).

    transformers models say it themselves (`get_decoder`, `get_input_embeddings`): the decoder, or the smallest
    part that holds both the token embedding and a stack of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    stacks = [stack for stack, _ in _stacks(model)]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore
    if decoder is not model and id(decoder) in names and any(_inside(s, names[id(decoder)]) for s in stacks):
        return names[id(decoder)]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # pyright: ignore
    scope = names.get(id(embedding), "")
    while scope and not any(_inside(stack, scope) for stack in stacks):
        scope = scope.rpartition(".")[0]
    return scope


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists of blocks, by name: those in which a block holds an FFN."""
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(_inside(name, outer) for outer in seen):
            continue
        if name and len(module) and any(_ffns(block, "") for block in module):
            seen.append(name)
            yield name, module


def _ffns(block: nn.Module, name: str) -> list[str]:
    """Names of the FFNs of one block: the topmost modules in it that look like one."""
    found = []
    for child_name, child in block.named_children():
        path = f"{name}.{child_name}"
        if any(hint in f"{child_name} {type(child).__name__}".lower() for hint in NOT_AN_FFN):
            continue
        try:
            describe(child)
            found.append(path)
        except NotAnFFN:
            found += _ffns(child, path)
    return found


def _site(model: nn.Module, name: str) -> Site:
    module = model.get_submodule(name)
    stack = _stack_of(model, name)
    try:
        ffn = describe(module, _config(model, name))
    except NotAnFFN as error:
        raise MoEAdapterError(
            f"{name} ({type(module).__name__}) is no feed-forward block: {error}. Target modules that map "
            "D → F → D, such as a block's mlp."
        ) from error
    return Site(name=name, module=module, ffn=ffn, stack=stack)


def _stack_of(model: nn.Module, name: str) -> str:
    """Name of the module that runs the blocks among which `name` lies; its parent if it lies in no list."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList | nn.Sequential):
            return ".".join(parts[: end - 1])
    return ".".join(parts[:-1])


def _config(model: nn.Module, name: str) -> Any:
    """The config of the nearest ancestor that has one, as every part of a transformers model does."""
    while name:
        name = name.rpartition(".")[0]
        if config := getattr(model.get_submodule(name), "config", None):
            return config
    return None


def _inside(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(scope + ".")


def _matches(target: str | re.Pattern | Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
    """Strings match the end of a dotted name from a dot on: "visual.blocks.0.mlp", r"blocks\\.\\d+\\.mlp"."""
    if isinstance(target, str):
        plain = re.fullmatch(r"[\w.]+", target)
        target = re.compile(re.escape(target) if plain else target)
    if isinstance(target, re.Pattern):
        return re.fullmatch(rf"(?:.*\.)?(?:{target.pattern})", name, target.flags) is not None
    return bool(target(name, module))


def _nearest(target: Target, modules: dict[str, nn.Module]) -> str:
    if not isinstance(target, str):
        return ""
    last = {name.rpartition(".")[2]: name for name in modules if name}
    near = [last[part] for part in difflib.get_close_matches(target.rpartition(".")[2], last, n=3, cutoff=0.4)]
    near += difflib.get_close_matches(target, modules, n=3, cutoff=0.4)
    return f"; the nearest names are {', '.join(dict.fromkeys(near))}" if near else ""
