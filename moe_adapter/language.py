"""Which part of a model is its language model: the one whose blocks target="mlp" means."""

from __future__ import annotations

from torch import nn

from moe_adapter.errors import MoEAdapterError

# A hint, used only where structure leaves several candidates.
OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech", "protein", "patcher", "perceiver", "resampler")


def language_model(model: nn.Module, stacks: list[str]) -> str:
    """Name of the part of a model that is its text decoder ("" for the whole), given the names of its block lists.

    transformers models say it themselves (`get_decoder`, `get_input_embeddings`): the decoder, or the smallest
    part that holds both the token embedding and a stack of blocks. Of a model that says nothing it is the one such
    model in it, else the one part that has blocks and an nn.Embedding of its own.

    Raises:
        MoEAdapterError: several parts could be it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = _decoder(model)
    if decoder is not model and id(decoder) in names and _holds(names[id(decoder)], stacks):
        return names[id(decoder)]
    if id(embedding := _embedding(model)) in names:
        return _with_blocks(names[id(embedding)], stacks)
    if parts := _language_models(model, stacks):
        name = _only(parts)
        inner = [stack.removeprefix(name + ".") for stack in stacks if inside(stack, name)]
        return f"{name}.{language_model(model.get_submodule(name), inner)}".rstrip(".")
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    scopes = list(dict.fromkeys(_with_blocks(name, stacks) for name in embeddings if not is_other_tower(name)))
    return _only([scope for scope in scopes if scope] or [""])


def check_one_stack(model: nn.Module, stacks: list[str]) -> None:
    """Raises MoEAdapterError for a model that does not say which of several lists of blocks are its decoder's."""
    if len(stacks) > 1 and _embedding(model) is None and not hasattr(model, "get_decoder"):
        _only(stacks)


def is_other_tower(name: str) -> bool:
    return any(hint in name.lower() for hint in OTHER_TOWERS)


def inside(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(scope + ".")


def _decoder(model: nn.Module) -> nn.Module:
    """What the model's `get_decoder` leads to, through however many wrappers; the model itself without one."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore
    return model if inner is model or inner is None else _decoder(inner)


def _embedding(model: nn.Module) -> nn.Module | None:
    """What the model says that it embeds its inputs with; None if it doesn't say."""
    try:
        return model.get_input_embeddings()  # pyright: ignore
    except (AttributeError, NotImplementedError):
        return None


def _language_models(model: nn.Module, stacks: list[str]) -> list[str]:
    """The outermost parts with blocks that embed tokens by their own account; of several, those with a head."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        known = any(inside(name, other) for other in found)
        if name and not known and _holds(name, stacks) and isinstance(_embedding(module), nn.Embedding):
            found[name] = module
    heads = [name for name, module in found.items() if getattr(module, "get_output_embeddings", lambda: None)()]
    return heads if len(found) > 1 and heads else list(found)


def _with_blocks(name: str, stacks: list[str]) -> str:
    """The smallest part around the module `name` that holds a stack of blocks."""
    while name and not _holds(name, stacks):
        name = name.rpartition(".")[0]
    return name


def _holds(name: str, stacks: list[str]) -> bool:
    return any(inside(stack, name) for stack in stacks)


def _only(names: list[str]) -> str:
    if len(names) > 1:
        raise MoEAdapterError(
            f'target="mlp" means the language model\'s blocks, and {", ".join(names)} could each be it: name the '
            f"modules instead, as by a regex that begins with {names[-1]}."
        )
    return names[0]
