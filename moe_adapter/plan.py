"""What an injection would do, counted before anything is touched; works on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_adapter.backends import check_backend
from moe_adapter.config import DualPathConfig, resolve_dim
from moe_adapter.errors import MoEAdapterError
from moe_adapter.find import LANGUAGE_MODEL_FFN, Site, Target, find_sites
from moe_adapter.layer import DualPathMoE


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One layer to be: where, over which FFN, and what is added. Widths in units, `added` in parameters."""

    name: str
    module: str
    hidden: int
    ffn_dim: int
    expert_dim: int
    shared_expert_dim: int
    added: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The injection's sites and counts; `print(plan)` shows them as a table.

    `added` counts new parameters, all of them trainable in stage I (`trainable`); `total` counts base and new;
    `bytes` is the memory of the new ones.
    """

    config: DualPathConfig
    sites: tuple[Site, ...]
    rows: tuple[PlanRow, ...]
    base: int

    @property
    def added(self) -> int:
        return sum(row.added for row in self.rows)

    @property
    def trainable(self) -> int:
        return self.added

    @property
    def total(self) -> int:
        return self.base + self.added

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        heads = ("layer", "FFN", "D", "F", "expert F", "shared F", "added")
        body = [
            (r.name, r.module, r.hidden, r.ffn_dim, r.expert_dim, r.shared_expert_dim, f"{r.added:,}")
            for r in self.rows
        ]
        widths = [max(len(str(line[column])) for line in [heads, *body]) for column in range(len(heads))]
        lines = [
            "  ".join(
                f"{value!s:<{w}}" if i < 2 else f"{value!s:>{w}}"
                for i, (value, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in [heads, *body]
        ]
        c = self.config
        lines.append(
            f"{len(self.rows)} layers: 1 static, {int(bool(c.shared_expert_dim))} shared, {c.num_experts} routed "
            f"experts, top-{c.top_k}; new {self.added:,} ({self.bytes / 2**30:.2f} GiB), "
            f"base {self.base:,}, total {self.total:,} parameters; trainable {self.trainable / self.total:.1%}"
        )
        return "\n".join(lines)


def plan_injection(
    model: nn.Module,
    target: Target = LANGUAGE_MODEL_FFN,
    config: DualPathConfig | None = None,
    **overrides: Any,
) -> Plan:
    """Find what `target` means and count what `inject_dual_path_moe` would add, without touching the model.

    Args:
        model: any torch module, also on the meta device.
        target: "mlp" for the FFN of every block of the language model, whatever the architecture calls it; another
            suffix of module names, a list of them, a regex, or a callable (name, module) -> bool.
        config: the sizes; `overrides` change single fields of it.

    Raises:
        MoEAdapterError: nothing matches, a match is no FFN, or the config doesn't fit.
    """
    config = (config or DualPathConfig()).replace(**overrides) if overrides else config or DualPathConfig()
    check_backend(config.backend)
    if any(isinstance(module, DualPathMoE) for module in model.modules()):
        raise MoEAdapterError(
            "the model has dual-path layers already: eject_dual_path_moe(model) first, or load_adapter."
        )
    sites = _chosen(find_sites(model, target), config)
    rows = tuple(_row(site, config) for site in sites)
    base = sum(parameter.numel() for parameter in model.parameters())
    return Plan(config=config, sites=tuple(sites), rows=rows, base=base)


def new_layer(site: Site, config: DualPathConfig, device: torch.device | None = None) -> DualPathMoE:
    """An uninitialised dual-path layer for `site`, on the device and in the dtype of the FFN it joins."""
    home, dtype = _device_and_dtype(site)
    return DualPathMoE(site.module, site.ffn, config, device=device or home, dtype=dtype)


def _row(site: Site, config: DualPathConfig) -> PlanRow:
    new = new_layer(site, config, torch.device("meta")).new_parameters().values()
    width = site.ffn.intermediate
    return PlanRow(
        name=site.name,
        module=type(site.module).__name__,
        hidden=site.ffn.hidden,
        ffn_dim=width,
        expert_dim=resolve_dim(config.expert_dim, width) if config.num_experts else 0,
        shared_expert_dim=resolve_dim(config.shared_expert_dim, width) if config.shared_expert_dim else 0,
        added=sum(parameter.numel() for parameter in new),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in new),
    )


def _chosen(sites: list[Site], config: DualPathConfig) -> list[Site]:
    if config.layers is None:
        return sites
    beyond = [index for index in config.layers if not 0 <= index < len(sites)]
    if beyond:
        raise MoEAdapterError(f"layers={config.layers}: the target matches {len(sites)} blocks; {beyond} lie outside.")
    return [sites[index] for index in sorted(config.layers)]


def _device_and_dtype(site: Site) -> tuple[torch.device, torch.dtype]:
    """Those of the FFN's parameters; over integers (a quantised base) the first floating parameter's dtype."""
    tensors: list[torch.Tensor] = list(site.module.parameters())
    floats: Iterator[torch.dtype] = (t.dtype for t in tensors if t.is_floating_point() and t.element_size() >= 2)
    return tensors[0].device, next(floats, torch.get_default_dtype())
