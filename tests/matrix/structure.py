"""What a model is, read off its modules: where its decoder's blocks lie, and whether they are dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

# A block's parts that mix tokens rather than transform each: their linear maps are no feed-forward block.
MIXERS = ("attn", "attention", "mixer", "mamba", "ssm", "conv", "recurrent", "mlstm", "deltanet", "temporal")
TOWERS = ("vision", "visual", "image", "audio", "speech", "protein", "patch", "qformer", "resampler", "perceiver")
EXPERTS = ("experts", "moe")


class NotDense(Exception):
    """The model is no dense language model; the message says why."""


def expected_sites(model: nn.Module) -> int:
    """How many feed-forward blocks the decoder has: one for each of its blocks that holds any.

    Raises:
        NotDense: it has routed experts already, or no feed-forward block at all.
    """
    blocks = list(decoder_blocks(model))
    if not blocks:
        raise NotDense("no list of decoder blocks")
    for name, block in blocks:
        if experts := next(_experts(name, block), None):
            raise NotDense(f"routed experts already: {experts}")
    count = sum(has_feed_forward(block) for _, block in blocks)
    if not count:
        raise NotDense(f"no feed-forward block: its blocks are {', '.join(sorted({_parts(b) for _, b in blocks}))}")
    return count


def decoder_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of the text decoder, by name: the items of its outermost lists of blocks.

    Lists as long as the config has layers go before others, and the decoder of an encoder-decoder before its encoder.
    """
    text = model.config.get_text_config(decoder=True)
    lists = [(name, blocks) for name, blocks in _outermost_lists(model) if any(_is_block(block) for block in blocks)]
    lists = _narrowed(lists, lambda name, blocks: name.startswith(_decoder_name(model)))
    lists = _narrowed(lists, lambda name, blocks: len(blocks) == getattr(text, "num_hidden_layers", None))
    if model.config.is_encoder_decoder or text.is_encoder_decoder:
        lists = _narrowed(lists, lambda name, blocks: "decoder" in name)
    for name, blocks in lists:
        for index, block in enumerate(blocks):
            yield f"{name}.{index}", block


def _narrowed(lists: list, fits: Callable[[str, nn.ModuleList], bool]) -> list:
    """Those that fit; all where none does."""
    return [(name, blocks) for name, blocks in lists if fits(name, blocks)] or lists


def has_feed_forward(block: nn.Module) -> bool:
    """Whether, outside its mixers, a block maps some width up by one linear map and back by another."""
    widths = [_widths(module) for _, module in _outside_mixers(block) if _widths(module)]
    return any(one[0] == two[1] and one[0] not in (one[1], two[0]) for one in widths for two in widths)


def _decoder_name(model: nn.Module) -> str:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    seen: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(other + ".") for other in seen)
        if not isinstance(module, nn.ModuleList) or nested or _hinted(name, TOWERS):
            continue
        layers = all(type(block).__name__.endswith("Layer") for block in module)  # named for the attention in them
        if layers or not _hinted(name, MIXERS):
            seen.append(name)
            yield name, module


def _is_block(block: nn.Module) -> bool:
    return has_feed_forward(block) or any(_is_mixer(block, *named) for named in block.named_children())


def _outside_mixers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if _widths(child) or not _is_mixer(module, name, child):
            yield prefix + name, child
            yield from _outside_mixers(child, f"{prefix}{name}.")


def _is_mixer(parent: nn.Module, name: str, child: nn.Module) -> bool:
    return _hinted(_own_name(parent, name, child), MIXERS) and not type(child).__name__.endswith("DecoderLayer")


def _own_name(parent: nn.Module, name: str, child: nn.Module) -> str:
    """Name and class of a part, the class without what it shares with its parent's (the architecture's name)."""
    kind, other = type(child).__name__, type(parent).__name__
    shared = next((i for i, (a, b) in enumerate(zip(kind, other, strict=False)) if a != b), len(other))
    return f"{name} {kind[shared:]}"


def _widths(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return tuple(module.weight.shape)
    return None


def _experts(name: str, block: nn.Module) -> Iterator[str]:
    for inner, module in block.named_modules():
        own = f"{inner.rpartition('.')[2]} {_own_name(block, '', module)}"
        if inner and _hinted(own, EXPERTS) and next(module.parameters(), None) is not None:
            yield f"{name}.{inner} ({type(module).__name__})"


def _parts(block: nn.Module) -> str:
    return "+".join(type(child).__name__ for child in block.children())


def _hinted(text: str, hints: tuple[str, ...]) -> bool:
    return any(hint in text.lower() for hint in hints)
