"""The surgery itself: dual-path layers in, dual-path layers out, and the base's own answer in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_adapter.config import DualPathConfig
from moe_adapter.errors import MoEAdapterError
from moe_adapter.find import LANGUAGE_MODEL_FFN, Site, Target
from moe_adapter.init import initialise
from moe_adapter.layer import CatchInput, DualPathMoE
from moe_adapter.objective import AddBalanceLoss, dual_path_layers
from moe_adapter.offload import execution_device
from moe_adapter.plan import Plan, check_module, new_layer, plan_injection
from moe_adapter.routing import ClosePass, OpenPass, RequireInputGradient

STATE = "_moe_adapter"  # attribute of the injected model that holds its Injection
NAMED = "_moe_adapters"  # … and of a model with named adapters, that holds theirs by name
SHARDED = ("FullyShardedDataParallel", "FSDPModule")  # a model is refused if any part of it is one of these
WRAPPED = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module")  # what wrappers of a part call it
WRAPPERS = (*SHARDED, "DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "OptimizedModule")


@dataclass(eq=False)
class Injection:
    """A plan and the layers made for it, and what it takes to put them in and out of their model.

    `base_values` are base parameters that an adapter brings along; while the layers are in, the base's own. `lora`
    is the name that peft knows the adapter's LoRA by.
    """

    plan: Plan
    layers: list[DualPathMoE]
    base_values: dict[str, torch.Tensor] = field(default_factory=dict)
    lora: str | None = None
    required_grad: dict[str, bool] = field(default_factory=dict)  # of the base's parameters, before
    hooks: list[Any] = field(default_factory=list)

    @property
    def config(self) -> DualPathConfig:
        return self.plan.config


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
        initialise(layer, site.root, getattr(model, "config", None))
    attach(model, injection)


def attach(model: nn.Module, injection: Injection) -> None:
    """Put an injection's layers where the FFNs are, which they keep; freeze the base."""
    injection.required_grad = {name: parameter.requires_grad for name, parameter in base_parameters(model).items()}
    model.requires_grad_(False)
    swaps: dict[nn.Module, nn.Module] = {}
    for site, layer in zip(injection.plan.sites, injection.layers, strict=True):
        layer.static_expert = model.get_submodule(site.name)  # peft may have wrapped it meanwhile
        _follow(layer)
        for parameter in layer.new_parameters().values():
            parameter.requires_grad_(True)
        swaps[layer.static_expert] = layer
    _rewire(model, swaps)
    swap_base_values(model, injection)
    injection.hooks = _add_hooks(model, injection.plan, injection.layers)
    setattr(model, STATE, injection)


def detach(model: nn.Module) -> Injection:
    """Take the layers out and give what `attach` takes; the FFNs' module objects and `requires_grad` are back."""
    injection: Injection = getattr(model, STATE)
    swap_base_values(model, injection)
    _rewire(model, {layer: layer.static_expert for layer in injection.layers})
    for name, parameter in base_parameters(model).items():
        if name in injection.required_grad:
            parameter.requires_grad_(injection.required_grad[name])
    for hook in injection.hooks:
        hook.remove()
    delattr(model, STATE)
    return injection


def swap_base_values(model: nn.Module, injection: Injection) -> None:
    """Exchange the base parameters that the adapter brings with the base's own; its own inverse."""
    if injection.base_values:
        parameters = base_parameters(model)
        for name, value in injection.base_values.items():
            injection.base_values[name], parameters[name].data = parameters[name].data, value


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by plain name."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def plain_name(name: str) -> str:
    """A name in a model as it is without what peft, torch.compile or checkpointing wrapped around parts of it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def eject_dual_path_moe(model: nn.Module) -> nn.Module:
    """Undo the injection: the original FFN objects, their `requires_grad`, no hook left; returns the same model.

    Raises:
        MoEAdapterError: the model has no dual-path layers, or is wrapped for training.
    """
    owner = injected_model(unwrapped(model))
    detach(owner)
    vars(owner).pop(NAMED, None)
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
    owner = injected_model(model)
    switches = [(layer, "static_only") for layer in dual_path_layers(owner).values()]
    switches += [(module, "_disable_adapters") for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [(module, name, getattr(module, name)) for module, name in switches]
    swap_base_values(owner, getattr(owner, STATE))
    try:
        for module, name in switches:
            setattr(module, name, True)
        yield model
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        swap_base_values(owner, getattr(owner, STATE))


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


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is peft's wrapper of another; transformers models have a `peft_config` of their own."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _kinds(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _follow(layer: DualPathMoE) -> None:
    """Take a layer to where its static expert runs, and into its mode."""
    device = execution_device(layer.static_expert)
    layer._apply(lambda tensor: tensor.to(device), recurse=False)
    for name, part in layer.named_children():
        if name != "static_expert":
            part.to(device)
    layer.train(layer.static_expert.training)


def _rewire(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put new modules wherever a parent in `model` holds the old ones, which may be shared between blocks."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]


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
