"""One registry of implementations of the routed experts, all with the signature of transformers' experts functions.

A backend is `fn(experts, x_TD, top_k_index_TK, top_k_weights_TK) -> y_TD`, or its dotted name "module:function",
imported when first used. `eager` is the plain reference that every other is tested against.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache

import torch

from moe_adapter.errors import MoEAdapterError

logger = logging.getLogger(__name__)

Backend = Callable[..., torch.Tensor]

BACKENDS: dict[str, Backend | str] = {
    "eager": "moe_adapter.experts:eager",
    "grouped_mm": "transformers.integrations.moe:grouped_mm_experts_forward",
    "batched_mm": "transformers.integrations.moe:batched_mm_experts_forward",
}
AUTO = "grouped_mm"


def check_backend(name: str) -> None:
    """Raises MoEAdapterError for a name that the registry doesn't hold."""
    if name != "auto" and name not in BACKENDS:
        raise MoEAdapterError(f"backend {name!r} is unknown; expected 'auto' or one of {', '.join(sorted(BACKENDS))}.")


def run_backend(
    name: str, experts, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The routed experts' output (T, D) by the backend `name`, or by `eager` where that one refuses the input."""
    chosen = AUTO if name == "auto" else name
    reason = _refusal(chosen, experts, x_TD)
    if reason:
        _say_once(chosen, reason)
        chosen = "eager"
    return load_backend(chosen)(experts, x_TD, index_TK, weights_TK)


@cache
def load_backend(name: str) -> Backend:
    """The function behind a registered name. Raises MoEAdapterError when its library is missing."""
    check_backend(name)
    entry = BACKENDS[name]
    if not isinstance(entry, str):
        return entry
    module, _, function = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        extra = module.partition(".")[0]
        raise MoEAdapterError(
            f'backend {name!r} needs {extra}, which gave: {error}. Install it: pip install "moe-adapter[{extra}]".'
        ) from error


def _refusal(name: str, experts, x_TD: torch.Tensor) -> str | None:
    """Why the backend can't take this input, or None."""
    if name == "eager":
        return None
    if _missing(name) is not None:
        return _missing(name)
    if x_TD.shape[0] == 0:
        return "no tokens"
    if name != "grouped_mm":
        return None
    first = experts.first
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm has no {str(first.dtype).removeprefix('torch.')} kernel"
    if any(size * first.element_size() % 16 for size in (*first.shape[1:], experts.down_proj.shape[2])):
        return f"grouped_mm wants rows of a multiple of 16 bytes; the experts are {tuple(first.shape)}"
    return None


@cache
def _missing(name: str) -> str | None:
    try:
        load_backend(name)
    except MoEAdapterError as error:
        return str(error)
    return None


@cache
def _say_once(name: str, reason: str) -> None:
    logger.warning("backend %s goes on with eager: %s", name, reason)
