"""peft beside an injected model: the LoRA of the paper's stage II, without naming a module."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig
from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.ffn import is_linear
from moe_adapter.find import Site
from moe_adapter.injection import STATE, Injection, injected_model
from moe_adapter.language import inside


def stage2_lora(model: nn.Module, *, r: int = 8, lora_alpha: int = 16, lora_dropout: float = 0.05, **settings: Any):
    """The LoRA of stage II (paper, Table 8) as peft's `LoraConfig`, for `get_peft_model(model, …)`; then set_stage(2).

    It lies on the vision encoder, the vision-to-text projection and the language model's attention: on every linear
    map but the blocks' FFNs, the dual-path layers and the output head.

    Raises:
        MoEAdapterError: the model is not injected, or has no such map.
    """
    targets = lora_targets(model)
    return LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets, **settings)


def lora_targets(model: nn.Module) -> str:
    """One regular expression that matches the full names of the linear maps of `stage2_lora`, and no other module."""
    owner = injected_model(model)
    injection: Injection = getattr(owner, STATE)
    ffns = {(site.stack, name) for site in injection.plan.sites for name in _ffn_parts(site)}
    head = getattr(owner, "get_output_embeddings", lambda: None)()
    modules = dict(owner.named_modules())
    names = [name for name, part in modules.items() if is_linear(part) and part is not head and not _in_ffn(name, ffns)]
    if not names:
        raise MoEAdapterError(f"{type(owner).__name__} has no linear map outside its FFNs that a LoRA could go on.")
    return "|".join(_patterns(names, set(modules) - set(names)))


def _ffn_parts(site: Site) -> list[str]:
    """What a block's FFN is called in it: one module, or the maps of a split one."""
    if site.ffn.split:
        return [name for name in (site.ffn.gate, site.ffn.up, site.ffn.down) if name]
    return [_in_block(site.name, site.stack)]


def _in_ffn(name: str, ffns: set[tuple[str, str]]) -> bool:
    return any(inside(name, stack) and inside(_in_block(name, stack), ffn) for stack, ffn in ffns)


def _in_block(name: str, stack: str) -> str:
    """A module's name within its block: after the stack, the list of blocks and the number."""
    return ".".join(name.removeprefix(stack).removeprefix(".").split(".")[2:])


def _patterns(names: list[str], others: set[str]) -> list[str]:
    """The names with `\\d+` for numbers, where that takes in none of the others."""
    patterns = {}
    for name in names:
        pattern = re.sub(r"(?<=\\.)\d+(?=\\.|$)", lambda _: r"\d+", re.escape(name))
        if pattern not in patterns:
            patterns[pattern] = not any(re.fullmatch(pattern, other) for other in others)
    general = [pattern for pattern, safe in patterns.items() if safe]
    rest = [re.escape(name) for name in names if not any(re.fullmatch(pattern, name) for pattern in general)]
    return [*general, *rest]
