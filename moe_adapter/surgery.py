"""The surgery itself: dual-path layers in, dual-path layers out, and the base's own answer in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moe_adapter.config import DualPathConfig
from moe_adapter.errors import MoEAdapterError
from moe_adapter.find import LANGUAGE_MODEL_FFN, Site, Target
from moe_adapter.init import initialise
from moe_adapter.layer import CatchInput, DualPathMoE
from moe_adapter.objective import AddBalanceLoss, dual_path_layers
from moe_adapter.plan import Plan, new_layer, plan_injection
from moe_adapter.routing import ClosePass, OpenPass, RequireInputGradient

STATE = "_moe_adapter"  # attribute of the injected model that holds its Injection
WRAPPERS = (
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DataParallel",
    "DeepSpeedEngine",
    "OptimizedModule",
)


@dataclass
class Injection:
    """What eject needs to undo an injection, and adapter files to describe it."""

    config: DualPathConfig
    names: list[str]  # of the replaced FFNs, as in the base model
    required_grad: dict[str, bool]  # of the base's parameters, before
    hooks: list[Any] = field(default_factory=list)


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
        model, target, config, overrides: as for `plan_injection`; a PeftModel's base model is injected.

    Raises:
        MoEAdapterError: as for `plan_injection`, or the model is wrapped for training; the model is left as it was.
    """
    base = unwrapped(model)
    apply_plan(base, plan_injection(base, target, config, **overrides))
    return model


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Carry out a plan: build and initialise all layers first, then swap them in."""
    layers = [new_layer(site, plan.config) for site in plan.sites]
    for site, layer in zip(plan.sites, layers, strict=True):
        initialise(layer, site.root, getattr(model, "config", None))
        layer.train(layer.static_expert.training)
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for site, layer in zip(plan.sites, layers, strict=True):
        for parameter in layer.new_parameters().values():
            parameter.requires_grad_(True)
        _rewire(model, site.module, layer)
    injection = Injection(plan.config, [site.name for site in plan.sites], required_grad)
    injection.hooks = _add_hooks(model, plan, layers)
    setattr(model, STATE, injection)


def eject_dual_path_moe(model: nn.Module) -> nn.Module:
    """Undo the injection: the original FFN objects, their `requires_grad`, no hook left; returns the same model.

    Raises:
        MoEAdapterError: the model has no dual-path layers.
    """
    owner = injected_model(model)
    injection: Injection = getattr(owner, STATE)
    for layer in dual_path_layers(owner).values():
        _rewire(owner, layer, layer.static_expert)
    for name, parameter in owner.named_parameters():
        if name in injection.required_grad:
            parameter.requires_grad_(injection.required_grad[name])
    for hook in injection.hooks:
        hook.remove()
    delattr(owner, STATE)
    return model


def injected_model(model: nn.Module) -> nn.Module:
    """The module on which `inject_dual_path_moe` was called, found under any wrapper.

    Raises:
        MoEAdapterError: there is none.
    """
    for module in model.modules():
        if STATE in vars(module):
            return module
    raise MoEAdapterError(f"{type(model).__name__} has no dual-path layers: call inject_dual_path_moe(model) first.")


@contextmanager
def static_only(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model answers as the base did: static experts alone, LoRA off too.

    Raises:
        MoEAdapterError: the model has no dual-path layers.
    """
    switches = [(layer, "static_only") for layer in dual_path_layers(injected_model(model)).values()]
    switches += [(module, "_disable_adapters") for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [(module, name, getattr(module, name)) for module, name in switches]
    try:
        for module, name in switches:
            setattr(module, name, True)
        yield model
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model to inject: itself, or a PeftModel's base. Raises MoEAdapterError for other wrappers."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()  # pyright: ignore
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if wrapper := next((name for name in WRAPPERS if name in kinds), None):
        raise MoEAdapterError(f"the model is wrapped by {wrapper}: inject before wrapping, then wrap the result.")
    return model


def _rewire(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever a parent in `model` holds `old`, which may be shared between blocks."""
    for parent in list(model.modules()):
        if parent is new or parent is old:
            continue
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def _add_hooks(model: nn.Module, plan: Plan, layers: list[DualPathMoE]) -> list[Any]:
    hooks = []
    stacks: dict[str, list[DualPathMoE]] = defaultdict(list)
    for site, layer in zip(plan.sites, layers, strict=True):
        stacks[site.stack].append(layer)
    for name, members in stacks.items():
        stack, logs = model.get_submodule(name), [layer.routing for layer in members]
        hooks.append(stack.register_forward_pre_hook(OpenPass(stack, logs), with_kwargs=True))
        hooks.append(stack.register_forward_hook(ClosePass(logs), always_call=True))
    for site, layer in zip(plan.sites, layers, strict=True):
        if site.ffn.split:
            hooks.append(site.root.get_submodule(site.ffn.up).register_forward_pre_hook(CatchInput(layer)))
    hooks.extend(_block(model, site).register_forward_pre_hook(RequireInputGradient()) for site in plan.sites)
    if plan.config.balance_coef and plan.config.num_experts:
        hook = AddBalanceLoss(plan.config.balance_coef)
        hooks.append(model.register_forward_hook(hook, with_kwargs=True))
    return hooks


def _block(model: nn.Module, site: Site) -> nn.Module:
    """The block of its stack that the site lies in."""
    inner = site.name.removeprefix(site.stack).removeprefix(".").split(".")
    return model.get_submodule(".".join([site.stack, *inner[:2]]).strip("."))
