"""What an injection would do, counted before anything is touched; works on the meta device."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_adapter.backends import check_backend
from moe_adapter.budget import fit_budget
from moe_adapter.config import DualPathConfig, resolve_dim
from moe_adapter.errors import MoEAdapterError
from moe_adapter.find import LANGUAGE_MODEL_FFN, Site, Target, find_sites
from moe_adapter.layer import DualPathMoE
from moe_adapter.offload import execution_device


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
    *,
    budget: int | str | None = None,
    **overrides: Any,
) -> Plan:
    """Find what `target` means and count what `inject_dual_path_moe` would add, without touching the model.

    Args:
        model: any torch module, also on the meta device.
        target: "mlp" for the FFN of every block of the language model, whatever the architecture calls it; another
            suffix of module names, a list of them, a regex, or a callable (name, module) -> bool.
        config: the sizes; `overrides` change single fields of it.
        budget: the most parameters to add, such as 200_000_000 or "200M": the experts become as wide as it allows, in
            multiples of 8 and in the config's proportion of shared to routed.

    Raises:
        MoEAdapterError: nothing matches, a match is no FFN, the config doesn't fit, or the budget is too small.
    """
    check_module(model)
    target, config = _checked_target(target), _checked_config(config)
    config = config.replace(**overrides) if overrides else config
    check_backend(config.backend)
    if any(isinstance(module, DualPathMoE) for module in model.modules()):
        raise MoEAdapterError(
            "the model has dual-path layers already: eject_dual_path_moe(model) first, or load_adapter."
        )
    sites = _chosen(find_sites(model, target), config)
    _warn_of_slices(sites, config)
    if budget is not None:
        width = sites[0].ffn.intermediate
        config = fit_budget(config, width, budget, lambda c: sum(_row(model, site, c).added for site in sites))
    rows = tuple(_row(model, site, config) for site in sites)
    base = sum(parameter.numel() for parameter in model.parameters())
    return Plan(config=config, sites=tuple(sites), rows=rows, base=base)


def _warn_of_slices(sites: list[Site], config: DualPathConfig) -> None:
    inner = next((site.ffn.inner for site in sites if site.ffn.inner), ())
    if inner and config.expert_init == "ffn_slice":
        warnings.warn(
            f"expert_init='ffn_slice': the feed-forward blocks hold {', '.join(inner)} between their maps, which "
            "experts have none of, so experts made of slices do not compute what the slices do.",
            stacklevel=3,
        )


def check_module(model: Any) -> None:
    """Raises MoEAdapterError for what is no module, such as a model's name."""
    if not isinstance(model, nn.Module):
        raise MoEAdapterError(
            f"got {type(model).__name__} {str(model)[:40]!r} for the model, expected a torch.nn.Module: load it first."
        )


def _checked_config(config: Any) -> DualPathConfig:
    if config is None:
        return DualPathConfig()
    if not isinstance(config, DualPathConfig):
        raise MoEAdapterError(
            f"got {type(config).__name__} for the config, expected a DualPathConfig: DualPathConfig(…) or "
            "DualPathConfig.from_dict(…) makes one."
        )
    return config


def _checked_target(target: Any) -> Any:
    """The target, an iterable as a tuple. Raises MoEAdapterError for what can't name modules."""
    if isinstance(target, str):
        try:
            re.compile(target)
        except re.error as error:
            raise MoEAdapterError(f"target {target!r} is neither a name nor a regex: {error}.") from error
        return target
    if isinstance(target, re.Pattern) or callable(target):
        return target
    parts: Any = tuple(map(_checked_target, target)) if isinstance(target, Iterable) else ()
    if not parts:
        raise MoEAdapterError(
            f"got the target {target!r}, expected a suffix of module names, a list of them, a regex, or a callable "
            "(name, module) -> bool."
        )
    return parts


def new_layer(model: nn.Module, site: Site, config: DualPathConfig, device: torch.device | None = None) -> DualPathMoE:
    """An uninitialised dual-path layer for `site` of `model`, on the device and in the dtype of the FFN it joins."""
    device = device or execution_device(site.module)
    return DualPathMoE(site.module, site.ffn, config, device=device, dtype=_dtype(model, site.module))


def _row(model: nn.Module, site: Site, config: DualPathConfig) -> PlanRow:
    new = new_layer(model, site, config, torch.device("meta")).new_parameters().values()
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


def _dtype(model: nn.Module, ffn: nn.Module) -> torch.dtype:
    """That of the FFN's weights; over integers, the narrower of what the FFN computes in and the model is kept in."""
    if own := _floats(ffn):
        return own[0]
    computes_in = [dtype for part in ffn.modules() if (dtype := getattr(part, "compute_dtype", None))]
    return min(
        [*computes_in[:1], *_floats(model)[:1]], key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype()
    )


def _floats(module: nn.Module) -> list[torch.dtype]:
    return [p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() >= 2]
