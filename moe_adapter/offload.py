"""Weights that accelerate keeps on the CPU or on disk while their module doesn't run: meta tensors, until it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module runs: that of its weights, wherever they are kept meanwhile."""
    hooks = [hook for part in module.modules() if (hook := _offload_hook(part))]
    return torch.device(hooks[0].execution_device) if hooks else next(module.parameters(), torch.empty(0)).device


@contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """Within the block the offloaded weights of a module and its parts are there, as during its forward."""
    with ExitStack() as stack:
        for part in module.modules():
            if _offload_hook(part):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield


def _offload_hook(module: nn.Module):
    """The accelerate hook that brings the module's weights when it runs; None where they stay."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None
