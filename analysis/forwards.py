"""Watches a model run: each forward's inputs, what its routers decided, and which call of generate it belongs to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_adapter.analysis.routers import RoutedBlock, read_routing
from moe_adapter.analysis.tokens import Forward, Generation, is_padding_mask
from moe_adapter.errors import MoEAdapterError
from moe_adapter.routing import in_backward

INPUTS = {"input_ids", "inputs_embeds"}  # a forward with one of these can say what its tokens are


class RouterCall(NamedTuple):
    """One call of the router of block number `layer`."""

    layer: int
    weights_TK: torch.Tensor
    index_TK: torch.Tensor
    num_experts: int


class ForwardWatch:
    """While entered, calls `on_forward(forward, calls)` after every forward in which a router ran.

    Of nested modules that take input ids or embeddings, the outermost one that runs says what the tokens are. Forwards
    that run inside backward (gradient checkpointing computes them again) and forwards that fail are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[RoutedBlock],
        on_forward: Callable[[Forward, list[RouterCall]], None],
    ):
        self._blocks = blocks
        self._on_forward = on_forward
        self.sources = _sources(model, blocks)
        self._owner: nn.Module | None = None
        self._forward: Forward | None = None
        self._calls: list[RouterCall] = []
        self._generation: Generation | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> ForwardWatch:
        for source, names in self.sources.items():
            handles = [
                source.register_forward_pre_hook(functools.partial(self._open, names), with_kwargs=True),
                source.register_forward_hook(self._close, always_call=True),
            ]
            for handle in handles:
                self._cleanup.callback(handle.remove)
            if hasattr(source, "generate"):
                self._watch_generate(source)
        for layer, block in enumerate(self._blocks):
            hook = functools.partial(self._route, layer)
            self._cleanup.callback(block.router.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    def _open(self, names: list[str], module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._owner is not None:
            return
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._forward = Forward(inputs=inputs, generation=self._generation)
        self._owner, self._calls = module, []

    def _route(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        if in_backward():
            return
        if self._owner is None:
            raise MoEAdapterError(
                f"the router of {self._blocks[layer].name} ran outside a forward of the model that is recorded; call "
                "the model itself, not a part of it."
            )
        self._calls.append(RouterCall(layer, *read_routing(self._blocks[layer].name, output)))

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is not self._owner:
            return
        forward, calls = self._forward, self._calls
        self._owner, self._forward, self._calls = None, None, []
        if output is not None and calls:  # None: the forward raised
            self._on_forward(forward, calls)  # type: ignore[arg-type]

    def _watch_generate(self, source: nn.Module) -> None:
        """Only generate itself knows where the prompt ends; so it is wrapped for the time of the record."""
        original: Callable[..., Any] = source.generate  # type: ignore[assignment]
        own = source.__dict__.get("generate")

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer, self._generation = self._generation, _generation(source, args, kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                self._generation = outer

        source.generate = generate  # type: ignore[assignment]
        self._cleanup.callback(lambda: setattr(source, "generate", own) if own else delattr(source, "generate"))


def _sources(model: nn.Module, blocks: list[RoutedBlock]) -> dict[nn.Module, list[str]]:
    """The modules around the routers whose forward takes input ids or embeddings, with its parameters' names."""
    routers = {block.router for block in blocks}
    sources = {}
    for module in model.modules():
        names = list(inspect.signature(module.forward).parameters)
        if INPUTS & set(names) and routers & set(module.modules()):
            sources[module] = names
    if not sources:
        raise MoEAdapterError(
            f"no module around the routers of {type(model).__name__} has a forward that takes input_ids or "
            "inputs_embeds, which say what its tokens are; name its parameters so."
        )
    return sources


def _generation(model: Any, args: tuple, kwargs: dict) -> Generation:
    """What is known of a call of generate before it runs."""
    given = (*args[:1], *map(kwargs.get, ("inputs", "input_ids", "inputs_embeds")))
    prompt = next((value for value in given if value is not None), None)
    if prompt is None:
        raise MoEAdapterError("generate was called without a prompt; give it input_ids or inputs_embeds to record it.")
    mask = kwargs.get("attention_mask")
    mask = mask if is_padding_mask(mask) else None
    return Generation(
        rows=prompt.shape[0],
        prompt_columns=(prompt if mask is None else mask).shape[1],  # over a filled cache, ids may be the new ones only
        prompt_mask=mask,
        stop_ids=_stop_ids(model, kwargs),
    )


def _stop_ids(model: Any, kwargs: dict) -> tuple[int, ...]:
    """End-of-sequence ids; other stopping rules leave no mark but the padding that follows."""

    def setting(name: str) -> Any:
        configs = (kwargs.get("generation_config"), model.generation_config)
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    names = ["eos_token_id"]
    if kwargs.get("stop_strings") is not None or kwargs.get("stopping_criteria") is not None:
        names.append("pad_token_id")
    ids = torch.tensor([], dtype=torch.long)
    for value in map(setting, names):
        if value is not None:
            ids = torch.cat([ids, torch.as_tensor(value).reshape(-1).cpu()])
    return tuple(ids.tolist())
