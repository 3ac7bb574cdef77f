"""From a target to the feed-forward blocks it means, in any model."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.ffn import FeedForward, NotAnFFN, describe, describe_split, is_ffn, is_linear, is_mixer
from moe_adapter.language import check_one_stack, inside, is_other_tower, language_model
from moe_adapter.mixture import Mixture, find_mixtures

logger = logging.getLogger(__name__)

Target = str | re.Pattern | Iterable[str] | Callable[[str, nn.Module], bool]

LANGUAGE_MODEL_FFN = "mlp"  # the target that means: the FFN of every block of the language model

# A hint, used only where structure leaves several candidates.
FFN_HINTS = ("mlp", "ffn", "feed_forward", "feedforward")  # which of a block's D → F → D parts is its FFN


@dataclass(frozen=True, kw_only=True)
class Site:
    """One FFN to replace: where it is, what it looks like, and the stack of blocks it belongs to.

    `module`, named `name`, is the FFN itself and the same as `root`; of a split FFN it is the last map and `root` the
    block, whose first map sees the FFN's input.
    """

    name: str
    module: nn.Module
    root: nn.Module
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
        raise MoEAdapterError(f"target {target!r} matches no module{nearest(target, modules)}.")
    outermost = [name for name in names if not any(name.startswith(other + ".") for other in names)]
    _refuse_mixtures(model, [mixture for mixture in find_mixtures(model) if any(map(mixture.touches, outermost))])
    return _unique(site for name in outermost for site in _sites_at(model, name))


def _language_model_sites(model: nn.Module) -> list[Site]:
    mixtures = find_mixtures(model)
    everywhere = dict(_stacks(model, {mixture.name for mixture in mixtures}))
    scope = language_model(model, list(everywhere))
    stacks = {stack: blocks for stack, blocks in everywhere.items() if inside(stack, scope)}
    own = {stack: blocks for stack, blocks in stacks.items() if not is_other_tower(stack.removeprefix(scope))}
    stacks = own or stacks
    _refuse_mixtures(model, [mixture for mixture in mixtures if any(inside(mixture.name, stack) for stack in stacks)])
    check_one_stack(model.get_submodule(scope), list(stacks))
    sites = _unique(
        _site(model, root, split)
        for stack, blocks in stacks.items()
        for index, block in enumerate(blocks)
        for root, split in _ffns_of_block(block, f"{stack}.{index}")
    )
    if not sites:
        raise MoEAdapterError(
            f"no feed-forward block found in the language model of {type(model).__name__}; name the modules yourself: "
            'target="suffix", a regex, or a callable (name, module) -> bool.'
        )
    return sites


def _refuse_mixtures(model: nn.Module, mixtures: list[Mixture]) -> None:
    """Raises MoEAdapterError for the first of the mixtures of experts that a target means."""
    if mixtures:
        stack = _stack_of(model, mixtures[0].name)
        dense = [name for name, module in model.named_modules() if inside(name, stack) and is_ffn(module)]
        raise mixtures[0].refusal([n for n in dense if not any(inside(n, m.experts) for m in find_mixtures(model))])


def _unique(sites: Iterable[Site]) -> list[Site]:
    """Each module once, under its first name, however many blocks share it."""
    found: dict[int, Site] = {}
    for site in sites:
        found.setdefault(id(site.module), site)
    return list(found.values())


def _stacks(model: nn.Module, mixtures: set[str]) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists of blocks, by name: those in which a block holds an FFN or one of the mixtures of experts."""
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(inside(name, outer) for outer in seen):
            continue
        if not name or not len(module):
            continue
        if any(inside(mixture, name) for mixture in mixtures) or any(_ffns(block, "") for block in module):
            seen.append(name)
            yield name, module


def _ffns(module: nn.Module, name: str) -> list[tuple[str, bool]]:
    """The FFNs in a part of a model, topmost first: (name, False), or (name of a block, True) for split ones."""
    if is_linear(module) or is_mixer(name.rpartition(".")[2], module):
        return []
    if is_ffn(module):
        return [(name, False)]
    parts = [found for child_name, child in module.named_children() for found in _ffns(child, f"{name}.{child_name}")]
    return parts or ([(name, True)] if _split_maps(module) else [])


def _ffns_of_block(block: nn.Module, name: str) -> list[tuple[str, bool]]:
    """The FFNs of a block: whole ones before split ones, and of several those that are called one.

    Low-rank and recurrent parts look like an FFN too.
    """
    found = _ffns(block, name)
    found = [ffn for ffn in found if not ffn[1]] or found
    return [ffn for ffn in found if _hinted(ffn[0].removeprefix(name), FFN_HINTS)] or found


def _hinted(name: str, hints: tuple[str, ...]) -> bool:
    return any(hint in name.lower() for hint in hints)


def _sites_at(model: nn.Module, name: str) -> list[Site]:
    """The FFN that a matched module is, or is a map of, or the FFNs that it holds, as a block does."""
    module = model.get_submodule(name)
    if is_linear(module):
        for end in range(name.count("."), 0, -1):
            block = ".".join(name.split(".")[:end])
            if name.removeprefix(block + ".") in _split_maps(model.get_submodule(block)):
                return [_site(model, block, True)]
    if found := _ffns(module, name):
        return [_site(model, root, split) for root, split in found]
    return [_site(model, name, False)]


def _split_maps(block: nn.Module) -> set[str | None]:
    """The names of the maps of the split FFN that a block holds; none where it holds none."""
    try:
        ffn = describe_split(block)
    except NotAnFFN:
        return set()
    return {ffn.gate, ffn.up, ffn.down}


def _site(model: nn.Module, name: str, split: bool) -> Site:
    """The site of the FFN `name`, or of the split FFN of the block `name`. Raises MoEAdapterError if it is none."""
    root, config = model.get_submodule(name), _config(model, name)
    try:
        ffn = describe_split(root, config) if split else describe(root, config)
    except NotAnFFN as error:
        raise MoEAdapterError(
            f"{name} ({type(root).__name__}) is no feed-forward block: {error}. Target modules that map "
            "D → F → D, such as a block's mlp."
        ) from error
    if ffn.guessed:
        _warn_guessed(type(root).__name__, repr(ffn.activation))
    place = f"{name}.{ffn.down}" if split else name
    return Site(name=place, module=model.get_submodule(place), root=root, ffn=ffn, stack=_stack_of(model, name))


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


def _matches(target: str | re.Pattern | Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
    """Strings match the end of a dotted name from a dot on: "visual.blocks.0.mlp", r"blocks\\.\\d+\\.mlp"."""
    if isinstance(target, str):
        plain = re.fullmatch(r"[\w.]+", target)
        target = re.compile(re.escape(target) if plain else target)
    if isinstance(target, re.Pattern):
        starts = [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]
        return any(target.fullmatch(name, start) for start in starts)
    return bool(target(name, module))


@cache
def _warn_guessed(kind: str, activation: str) -> None:
    logger.warning(
        "%s neither holds nor calls an activation that is known here: its experts take %s. If that is not what it "
        "computes, give the module an attribute `act_fn` that does.",
        kind,
        activation,
    )


def nearest(target: Target, modules: dict[str, nn.Module]) -> str:
    """The end of an error's sentence: module names like a target that names none, or nothing."""
    if not isinstance(target, str):
        return ""
    last = {name.rpartition(".")[2]: name for name in modules if name}
    near = [last[part] for part in difflib.get_close_matches(target.rpartition(".")[2], last, n=3, cutoff=0.4)]
    near += difflib.get_close_matches(target, modules, n=3, cutoff=0.4)
    return f"; the nearest names are {', '.join(dict.fromkeys(near))}" if near else ""
