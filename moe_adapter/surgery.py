"""The surgery itself: dual-path layers in, dual-path layers out, and the base's own answer in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moe_adapter.config import DualPathConfig
from moe_adapter.errors import MoEAdapterError
from moe_adapter.find import LANGUAGE_MODEL_FFN, Target, _config
from moe_adapter.init import initialise
from moe_adapter.injection import Injection, attach, base_values_in, detach, injected_model
from moe_adapter.lora import is_peft_model
from moe_adapter.objective import dual_path_layers
from moe_adapter.offload import execution_device
from moe_adapter.plan import Plan, check_module, new_layer, plan_injection

NAMED = "_moe_adapters"  # attribute of a model with named adapters that holds their injections by name
SHARDED = ("FullyShardedDataParallel", "FSDPModule")  # a model is refused if any part of it is one of these
WRAPPERS = (*SHARDED, "DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "OptimizedModule")


def inject_dual_path_moe(
    model: nn.Module,
    target: Target = LANGUAGE_MODEL_FFN,
    config: DualPathConfig | None = None,
    **overrides: Any,
) -> nn.Module:
    """Turn the FFNs that `target` means into dual-path layers, equation (3), in place; returns the same model.

    The base is frozen, the new parameters train. With `preserve_base` (the default) the model answers at first
    exactly as before. In training mode with labels its loss holds γ·L_bal from now on.

    Args:
        model, target, config, overrides: as for `plan_injection`, `budget` among them; a PeftModel's base is injected.

    Raises:
        MoEAdapterError: as for `plan_injection`, or the model is wrapped for training; the model is left as it was.
    """
    base = unwrapped(model)
    apply_plan(base, plan_injection(base, target, config, **overrides))
    return model


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Carry out a plan: build and initialise all layers first, then swap them in.

    Raises:
        MoEAdapterError: some of the weights have not been loaded, or as for `initialise`; the model is left as it was.
    """
    lost = [site.name for site in plan.sites if execution_device(site.module).type == "meta"]
    if lost and not all(parameter.is_meta for parameter in model.parameters()):
        raise MoEAdapterError(
            f"{lost[0]} ({len(lost)} such) is on the meta device while other parts are not: its weights were not "
            "loaded. Load the whole checkpoint first."
        )
    injection = Injection(plan, [new_layer(model, site, plan.config) for site in plan.sites])
    for site, layer in zip(plan.sites, injection.layers, strict=True):
        initialise(layer, site.root, _config(model, site.name))
    attach(model, injection)


def eject_dual_path_moe(model: nn.Module) -> nn.Module:
    """Undo the injection: the original FFN objects, their `requires_grad`, no hook left; returns the same model.

    A LoRA that came after the injection is off, one that answered before it is on. Base parameters that an adapter
    brought are the base's own again; of those trained since in this session a warning says that they are not.

    Raises:
        MoEAdapterError: the model has no dual-path layers, or is wrapped for training; the model stays as it was.
    """
    owner = injected_model(unwrapped(model))
    detach(model)
    vars(owner).pop(NAMED, None)
    return model


@contextmanager
def static_only(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model answers as the base did: static experts alone, LoRA off too.

    Base parameters that an adapter brought are the base's own; of those trained in this session a warning says that
    they are not.

    Raises:
        MoEAdapterError: the model has no dual-path layers.
    """
    owner = injected_model(model)
    switches = [(layer, "static_only") for layer in dual_path_layers(owner).values()]
    switches += [(module, "_disable_adapters") for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [(module, name, getattr(module, name)) for module, name in switches]
    with base_values_in(owner):
        try:
            for module, name in switches:
                setattr(module, name, True)
            yield model
        finally:
            for module, name, value in before:
                setattr(module, name, value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model to inject: itself, or a PeftModel's base. Raises MoEAdapterError for other wrappers, and no module."""
    check_module(model)
    if is_peft_model(model):
        return unwrapped(model.get_base_model())  # pyright: ignore
    kinds = _kinds(model) | {kind for part in model.modules() for kind in _kinds(part) & set(SHARDED)}
    if wrapper := next((name for name in WRAPPERS if name in kinds), None):
        raise MoEAdapterError(
            f"the model is wrapped by {wrapper}: inject before wrapping, then wrap the result; the same goes for "
            "loading, switching and ejecting adapters."
        )
    return model


def _kinds(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}
