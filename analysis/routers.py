"""Finds the routers of a model: our dual-path layers' and those of transformers' own MoE blocks alike."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from moe_adapter.analysis.schema import LayerFacts
from moe_adapter.errors import MoEAdapterError

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")  # DDP, torch.compile, peft


@dataclass(frozen=True, kw_only=True)
class RoutedBlock:
    """A block with a router; `name` as `dual_path_layers` has it, without the prefixes of wrappers."""

    name: str
    block: nn.Module
    router: nn.Module

    def facts(self, num_experts: int, top_k: int) -> LayerFacts:
        """What the record keeps of the layer, α and λ as they are now; a collective where an engine spreads them."""
        alpha, lam = (  # settled: whole and as they were trained where an engine spreads or casts them
            None if getattr(self.block, logit, None) is None else self.block.settled(logit).sigmoid().item()  # pyright: ignore
            for logit in ("alpha_logit", "lam_logit")
        )
        return LayerFacts(name=self.name, num_experts=num_experts, top_k=top_k, alpha=alpha, lam=lam)


def find_routers(model: nn.Module) -> list[RoutedBlock]:
    """The routed blocks of the model's language model, in order.

    A routed block holds `experts` beside a `router` or `gate`: the form of DualPathMoE and of transformers'
    MoE blocks.

    Raises:
        MoEAdapterError: there is none.
    """
    language_model = next((m.get_decoder() for m in model.modules() if hasattr(m, "get_decoder")), model)  # type: ignore[operator]
    inside = set(language_model.modules())
    blocks = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router = children.get("router", children.get("gate"))
        if module in inside and router is not None and "experts" in children:
            blocks.append(RoutedBlock(name=WRAPPERS.sub("", name), block=module, router=router))
    if not blocks:
        raise MoEAdapterError(
            f"{type(model).__name__} has no router in its language model: no block holds experts beside a router or "
            "gate. inject_dual_path_moe(model) adds them."
        )
    return blocks


def read_routing(name: str, output: object) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(weights_TK, index_TK, E) from what a router returned: (logits_TE, weights_TK, index_TK), detached.

    Raises:
        MoEAdapterError: it returned something else.
    """
    if isinstance(output, tuple) and len(output) >= 3 and all(isinstance(part, torch.Tensor) for part in output[:3]):
        logits, weights, index = (part.detach() for part in output[:3])
        if not index.is_floating_point() and index.shape == weights.shape:
            top_k = index.shape[-1]
            return weights.reshape(-1, top_k), index.reshape(-1, top_k), logits.shape[-1]
    parts = output if isinstance(output, tuple) else (output,)
    got = ", ".join(str(tuple(getattr(part, "shape", ()))) + f" {type(part).__name__}" for part in parts)
    raise MoEAdapterError(
        f"the router of {name} returned {got}; expected (logits (T, E), weights (T, K), expert index (T, K)), as "
        "DualPathMoE's and most of transformers' routers return."
    )
