"""F of equation (6) over the whole batch: all data-parallel ranks, and the micro-batches of the step so far.

A step ends where an optimizer's does. Importing this counts them, by a hook on all of torch's optimizers, which
DeepSpeed's and accelerate's run inside their own. Where one is skipped, as when float16 overflows, `start_step` has to
say so.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe_adapter.losses import real_tokens, routed_counts
from moe_adapter.routing import RoutingLog

_so_far: weakref.WeakKeyDictionary[RoutingLog, tuple[int, torch.Tensor]] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)
_step = 0


def start_step(*_) -> None:
    """From here on a new step begins, whatever the one before has come to."""
    global _step
    _step = next(_numbers)


register_optimizer_step_post_hook(start_step)


@torch.no_grad()
def widen_fractions(logs: Sequence[RoutingLog]) -> None:
    """Give the last pass of each layer its global F. A collective of all ranks; a pass that has one keeps it."""
    logs = [log for log in logs if log.last is not None and log not in log.last.fractions]
    if not logs:
        return
    parts = [torch.cat([routed_counts(log.calls), _tokens(log)]) for log in logs]  # (E + 1,): slots, and tokens
    total = torch.cat([part.to(parts[0].device) for part in parts])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    for log, now in zip(logs, total.split([len(part) for part in parts]), strict=True):
        step, before = _so_far.get(log, (_step, torch.zeros_like(now)))
        now = now + before if step == _step else now
        _so_far[log] = _step, now
        fraction_E = now[:-1] / now[-1].clamp(min=1)
        log.last.fractions[log] = fraction_E.to(log.calls[0].logits_TE.device)  # pyright: ignore


def _tokens(log: RoutingLog) -> torch.Tensor:
    logits_TE = log.calls[0].logits_TE
    return torch.as_tensor(real_tokens(log.calls), dtype=logits_TE.dtype, device=logits_TE.device).reshape(1)
