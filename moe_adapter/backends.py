"""One registry of implementations of the routed experts, all with the signature of transformers' experts functions.

A backend is `fn(experts, x_TD, top_k_index_TK, top_k_weights_TK) -> y_TD`, or its dotted name "module:function",
imported when first used. `eager` is the plain reference that every other is tested against.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import torch

from moe_adapter.errors import MoEAdapterError

logger = logging.getLogger(__name__)

Backend = Callable[..., torch.Tensor]

BACKENDS: dict[str, Backend | str] = {
    "eager": "moe_adapter.experts:eager",
    "lean": "moe_adapter.lean:lean",
    "grouped_mm": "transformers.integrations.moe:grouped_mm_experts_forward",
    "batched_mm": "transformers.integrations.moe:batched_mm_experts_forward",
    "megablocks": "moe_adapter.integrations.megablocks:megablocks",
}

_loaded: dict[str, Backend | MoEAdapterError] = {}  # what the names turned out to be
_said: set[str] = set()


def check_backend(name: str) -> None:
    """Look a backend up before it is used. Raises MoEAdapterError for a name that the registry doesn't hold."""
    if name != "auto" and name not in BACKENDS:
        raise MoEAdapterError(f"backend {name!r} is unknown; expected 'auto' or one of {', '.join(sorted(BACKENDS))}.")
    for candidate in ("lean", "grouped_mm", "eager") if name == "auto" else (name, "eager"):
        _load(candidate)


def run_backend(
    name: str, experts, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The routed experts' output (T, D) by the backend `name`, or by `eager` where that one refuses the input."""
    chosen = choose(experts, x_TD) if name == "auto" else name
    reason = _refusal(chosen, experts, x_TD)
    if reason:
        _say_once(logging.WARNING, f"backend {chosen} goes on with eager: {reason}")
        chosen = "eager"
    elif name == "auto":
        device, dtype = x_TD.device.type, str(experts.first.dtype).removeprefix("torch.")
        _say_once(logging.INFO, f"backend auto is {chosen} for {dtype} on {device}")
    return load_backend(chosen)(experts, x_TD, index_TK, weights_TK)


def choose(experts, x_TD: torch.Tensor) -> str:
    """The backend that "auto" stands for.

    On a GPU `grouped_mm`, which never waits for the counts of the experts' tokens; else `lean`, which goes by the
    number of tokens itself: no other earned a threshold here (docs/speed.md), which torch.compile would guard.
    """
    if experts.activation is None or (x_TD.is_cuda and _refusal("grouped_mm", experts, x_TD) is None):
        return "grouped_mm"
    return "lean"


def doctor() -> dict[str, str]:
    """Which backends there are here: name → "available", or why it is not and what to do."""
    return {name: str(found) if isinstance(found := _load(name), MoEAdapterError) else "available" for name in BACKENDS}


def load_backend(name: str) -> Backend:
    """The function behind a registered name. Raises MoEAdapterError when there is none or its library is missing."""
    found = _load(name)
    if isinstance(found, MoEAdapterError):
        raise found
    return found


def _load(name: str) -> Backend | MoEAdapterError:
    if name not in _loaded:
        _loaded[name] = _resolve(name)
    return _loaded[name]


def _resolve(name: str) -> Backend | MoEAdapterError:
    entry = BACKENDS[name]
    if not isinstance(entry, str):
        return entry
    module, _, function = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except MoEAdapterError as error:  # an integration that says itself what to install
        return error
    except (ImportError, AttributeError) as error:
        extra = module.partition(".")[0]
        return MoEAdapterError(
            f'backend {name!r} needs {extra}, which gave: {error}. Install it: pip install "moe-adapter[{extra}]".'
        )


def _refusal(name: str, experts, x_TD: torch.Tensor) -> str | None:
    """Why the backend can't take this input, or None; a backend that knows holds its answer as `refusal`."""
    found = _load(name)
    if isinstance(found, MoEAdapterError):
        return str(found)
    refusal = getattr(found, "refusal", None) or (_grouped_mm_refusal if name == "grouped_mm" else None)
    return refusal(experts, x_TD) if refusal else None


def _grouped_mm_refusal(experts, x_TD: torch.Tensor) -> str | None:
    first = experts.first
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm has no {str(first.dtype).removeprefix('torch.')} kernel"
    if any(size * first.element_size() % 16 for size in (*first.shape[1:], experts.down_proj.shape[2])):
        return f"grouped_mm wants rows of a multiple of 16 bytes; the experts are {tuple(first.shape)}"
    return None


def _say_once(level: int, message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.log(level, message)
