"""An injection in its model: the layers in and out of their places, and all that has to be put back with them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_adapter.config import DualPathConfig
from moe_adapter.errors import MoEAdapterError
from moe_adapter.find import Site
from moe_adapter.layer import CatchInput, DualPathMoE
from moe_adapter.lora import COPIES, active_loras, lora_parameters, plain_name, switch_lora
from moe_adapter.objective import AddBalanceLoss, dual_path_layers
from moe_adapter.offload import execution_device
from moe_adapter.plan import Plan, check_module
from moe_adapter.precision import FollowMasters
from moe_adapter.routing import ClosePass, OpenPass, RequireInputGradient

STATE = "_moe_adapter"  # attribute of the injected model that holds its Injection


@dataclass(eq=False)
class Injection:
    """A plan and the layers made for it, and what it takes to put them in and out of their model.

    `base_values` are base parameters that an adapter brings along; while the layers are in, the base's own, unless
    `at_base` says that they are swapped for the moment. `loras` are those that answer with the adapter, by peft's
    names, and `dtypes` those of the FFNs, both as they were when the layers left the model.
    """

    plan: Plan
    layers: list[DualPathMoE]
    base_values: dict[str, torch.Tensor] = field(default_factory=dict)
    at_base: bool = False
    loras: tuple[str, ...] = ()
    dtypes: list[torch.dtype | None] = field(default_factory=list)
    own_loras: tuple[str, ...] = ()  # those that answered before
    required_grad: dict[str, bool] = field(default_factory=dict)  # of the base's parameters, before
    hooks: list[Any] = field(default_factory=list)
    objective: AddBalanceLoss = field(init=False)

    def __post_init__(self) -> None:
        self.objective = AddBalanceLoss(self.config.balance_coef)

    @property
    def config(self) -> DualPathConfig:
        return self.plan.config


def attach(owner: nn.Module, injection: Injection) -> None:
    """Put an injection's layers where the FFNs are, which they keep; freeze the base."""
    injection.required_grad = {name: parameter.requires_grad for name, parameter in base_parameters(owner).items()}
    injection.own_loras = active_loras(owner)
    owner.requires_grad_(False)
    swaps: dict[nn.Module, nn.Module] = {}
    for index, (site, layer) in enumerate(zip(injection.plan.sites, injection.layers, strict=True)):
        layer.static_expert = owner.get_submodule(site.name)  # peft may have wrapped it meanwhile
        _follow(layer, injection.dtypes[index] if injection.dtypes else None)
        for parameter in layer.new_parameters().values():
            parameter.requires_grad_(True)
        swaps[layer.static_expert] = layer
    _rewire(owner, swaps)
    _swap_base_values(owner, injection)
    injection.hooks = _add_hooks(owner, injection)
    setattr(owner, STATE, injection)


def detach(model: nn.Module) -> Injection:
    """Take the layers out and give what `attach` takes; the FFNs, `requires_grad` and LoRAs of before are back."""
    owner = injected_model(model)
    injection: Injection = getattr(owner, STATE)
    check_not_at_base(owner)
    _check_base_values(owner, injection)
    injection.loras = active_loras(owner)
    injection.dtypes = [_float_dtype(layer.static_expert) for layer in injection.layers]
    _swap_base_values(owner, injection)
    _rewire(owner, {layer: layer.static_expert for layer in injection.layers})
    switch_lora(model, injection.own_loras)
    for name, parameter in base_parameters(owner).items():
        if name in injection.required_grad:
            parameter.requires_grad_(injection.required_grad[name])
    for hook in injection.hooks:
        hook.remove()
    delattr(owner, STATE)
    return injection


def check_not_at_base(owner: nn.Module) -> None:
    """Raises MoEAdapterError within `static_only`, where the adapter's own values are not in the model."""
    if STATE in vars(owner) and getattr(owner, STATE).at_base:
        raise MoEAdapterError("the model is in static_only, without its adapter's values: leave the block first.")


def _check_base_values(owner: nn.Module, injection: Injection) -> None:
    """That base parameters can be swapped where they are; a warning of those that have no value to go back to."""
    for name, parameter in owner.named_parameters():
        module = owner.get_submodule(name.rpartition(".")[0])
        offloaded = parameter.is_meta and execution_device(module).type != "meta"
        if offloaded and plain_name(name) in injection.base_values:
            raise MoEAdapterError(
                f"{name} came with the adapter and is offloaded: its place can't be given back to the base's own. "
                "Load the base without offloading, and the adapter onto it."
            )
    if trained := [name for name in trainable_base(owner) if name not in injection.base_values]:
        warnings.warn(
            f"{trained[0]} ({len(trained)} such) is a base parameter made trainable here: what training changed in it "
            "stays, as no copy of the base is kept. save_adapter, then load_adapter onto a fresh base, keeps both.",
            stacklevel=4,
        )


def _swap_base_values(owner: nn.Module, injection: Injection) -> None:
    """Exchange the base parameters that the adapter brings with the base's own, which follow the model's dtype."""
    if injection.base_values:
        parameters = base_parameters(owner)
        for name, value in injection.base_values.items():
            parameter = parameters[name]
            injection.base_values[name], parameter.data = parameter.data, value.to(parameter.device, parameter.dtype)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by plain name."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def trainable_base(owner: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters that are trainable, by plain name."""
    other = {id(p) for layer in dual_path_layers(owner).values() for p in layer.new_parameters().values()}
    other |= {id(p) for p in lora_parameters(owner).values()}
    return {name: p for name, p in base_parameters(owner).items() if p.requires_grad and id(p) not in other}


@contextmanager
def base_values_in(owner: nn.Module) -> Iterator[None]:
    """Within the block base parameters that the adapter brings have the base's own values; blocks may be nested."""
    injection: Injection = getattr(owner, STATE)
    if injection.at_base:
        yield
        return
    _check_base_values(owner, injection)
    _swap_base_values(owner, injection)
    injection.at_base = True
    try:
        yield
    finally:
        injection.at_base = False
        _swap_base_values(owner, injection)


def injected_model(model: nn.Module) -> nn.Module:
    """The module on which `inject_dual_path_moe` was called, found under any wrapper.

    Raises:
        MoEAdapterError: there is none, or more than one, or peft made copies of its layers.
    """
    check_module(model)
    owners = {name: module for name, module in model.named_modules() if STATE in vars(module)}
    if not owners:
        raise MoEAdapterError(
            f"{type(model).__name__} has no dual-path layers: call inject_dual_path_moe(model) first."
        )
    if len(owners) > 1:
        raise MoEAdapterError(
            f"{len(owners)} parts of the model were injected on their own ({', '.join(owners)}), expected one "
            "injection: eject each part, then inject the whole model once with a list of targets."
        )
    _check_no_copies(model)
    return next(iter(owners.values()))


def _check_no_copies(model: nn.Module) -> None:
    for prefix, layer in dual_path_layers(model).items():
        for name, _ in layer.named_modules(prefix=prefix):
            if set(COPIES) & set(name.split(".")):
                raise MoEAdapterError(
                    f"{name}: peft's modules_to_save holds a copy of a dual-path layer or of a part of it, which would "
                    "be trained and saved in its stead. Take what names it (mlp, router, experts, shared_expert) out "
                    "of modules_to_save: set_stage(model, 2) trains the whole layer."
                )


def _follow(layer: DualPathMoE, left: torch.dtype | None) -> None:
    """Take a layer to where its static expert runs, into its mode, and to its dtype if that has changed."""
    now = _float_dtype(layer.static_expert)
    target: dict[str, Any] = {"device": execution_device(layer.static_expert)}
    if left not in (None, now):
        target["dtype"] = now
    layer._apply(lambda tensor: tensor.to(**target), recurse=False)
    for name, part in layer.named_children():
        if name != "static_expert":
            part.to(**target)
    layer.train(layer.static_expert.training)


def _float_dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() >= 2), None)


def _rewire(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put new modules wherever a parent in `model` holds the old ones, which may be shared between blocks."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]


def _add_hooks(model: nn.Module, injection: Injection) -> list[Any]:
    hooks, plan, layers = [], injection.plan, injection.layers
    stacks: dict[str, list[DualPathMoE]] = defaultdict(list)
    for site, layer in zip(plan.sites, layers, strict=True):
        stacks[site.stack].append(layer)
    for name, members in stacks.items():
        stack, logs = model.get_submodule(name), [layer.routing for layer in members]
        parts = [part for layer in members for part in (layer, layer.router) if part is not None]
        hooks.append(stack.register_forward_pre_hook(FollowMasters(parts)))
        hooks.append(stack.register_forward_pre_hook(OpenPass(stack, logs), with_kwargs=True))
        hooks.append(stack.register_forward_hook(ClosePass(logs), always_call=True))
    for site, layer in zip(plan.sites, layers, strict=True):
        if site.ffn.split:
            hooks.append(site.root.get_submodule(site.ffn.up).register_forward_pre_hook(CatchInput(layer)))
    hooks.extend(_block(model, site).register_forward_pre_hook(RequireInputGradient()) for site in plan.sites)
    if plan.config.balance_coef and plan.config.num_experts:
        hooks.append(model.register_forward_hook(injection.objective, with_kwargs=True))
    return hooks


def _block(model: nn.Module, site: Site) -> nn.Module:
    """The block of its stack that the site lies in."""
    inner = site.name.removeprefix(site.stack).removeprefix(".").split(".")
    return model.get_submodule(".".join([site.stack, *inner[:2]]).strip("."))
