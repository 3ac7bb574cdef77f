"""Injected models as transformers models: exported for anyone to load, and loaded again as they were.

`export_model` writes weights, config and `modeling_dual_path_moe.py`, which needs torch and transformers only. Where
this module is imported, the auto classes load such a directory without remote code, as a model with `DualPathMoE`
layers, whose loss holds the balance loss and from which the layers can be ejected.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from moe_adapter import DualPathConfig, DualPathMoE, MoEAdapterError, dual_path_layers, set_stage
from moe_adapter.activations import activation_name
from moe_adapter.integrations import modeling_dual_path_moe as remote
from moe_adapter.plan import plan_injection
from moe_adapter.stages import lora_parameters
from moe_adapter.surgery import apply_plan, injected_model


def export_model(model: nn.Module, path: str | os.PathLike) -> None:
    """Write an injected transformers model into the directory `path`, for use without moe-adapter.

    `AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)`, or whichever auto class the model
    belongs to, gives the same logits, bit for bit, and `AutoModel` its headless part. Save the processor or tokenizer
    beside it: `processor.save_pretrained(path)`.

    Raises:
        MoEAdapterError: no dual-path layers, no class of transformers, a LoRA that is not merged, or weights that
            are quantised, sharded or not loaded.
    """
    owner = injected_model(model)
    base = _transformers_class(owner)
    _check_weights(owner)
    auto_classes = _auto_classes(base)
    model_class, config_class = _remote(base), _remote(base.config_class)
    # From here on, saving these classes writes the modeling file too.
    model_class.register_for_auto_class(next(auto for auto in reversed(auto_classes) if auto_classes[auto] is base))
    config_class.register_for_auto_class()
    config = config_class.from_dict(owner.config.to_dict())
    config.dual_path = _describe(owner, base, auto_classes.get("AutoModel"))
    file = Path(remote.__file__).stem
    config.auto_map = {auto: f"{file}.{_remote(kind).__name__}" for auto, kind in auto_classes.items()}
    with torch.device("meta"):
        twin = model_class(config)
    twin.load_state_dict(owner.state_dict(), assign=True)
    if owner.can_generate():
        twin.generation_config = owner.generation_config
    twin.save_pretrained(path)


class LiveModelMixin(remote.ModelMixin):
    """An exported model as moe-adapter loads it: injected by the surgery itself."""

    def add_dual_path_layers(self, dual_path: dict[str, Any]) -> None:
        layers = [name for site in dual_path["sites"] for name in site["layers"]]
        names = remote.names_in(self, layers, dual_path)
        config = DualPathConfig.from_dict({**dual_path["method"], "layers": None})
        apply_plan(self, plan_injection(self, lambda name, _: name in names, config))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        set_stage(loaded[0] if isinstance(loaded, tuple) else loaded, 1)  # loading made every parameter trainable
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> Any:
        injected_model(self)  # once ejected, it is no longer what its config says
        saved = super().save_pretrained(save_directory, **kwargs)
        shutil.copy(remote.__file__, save_directory)
        return saved


class AnyDualPathConfig(transformers.PreTrainedConfig):
    """What AutoConfig knows of exported models; gives the config class of the architecture that was exported."""

    model_type = remote.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        classes = {auto: __getattr__(path.rpartition(".")[2]) for auto, path in config_dict["auto_map"].items()}
        config_class = classes.pop("AutoConfig")
        for auto, model_class in classes.items():
            getattr(modeling_auto, auto).register(config_class, model_class, exist_ok=True)
        return config_class.from_dict(config_dict, **kwargs)


def __getattr__(name: str) -> type:
    """`DualPath` and the name of a transformers class, as in the exported modeling file."""
    if name.startswith(remote.PREFIX) and hasattr(transformers, name.removeprefix(remote.PREFIX)):
        return remote.make_class(name, LiveModelMixin, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _remote(kind: type) -> type:
    return getattr(remote, remote.PREFIX + kind.__name__)


def _transformers_class(model: nn.Module) -> type:
    """The class of a model; of one that was exported before, the transformers class under it."""
    kinds = [kind for kind in type(model).__mro__ if not issubclass(kind, remote.ModelMixin)]
    if getattr(transformers, kinds[0].__name__, None) is not kinds[0]:
        raise MoEAdapterError(
            f"got a {kinds[0].__module__}.{kinds[0].__name__}, expected a model of a class that transformers has: only "
            "those can be exported. Keep others with save_adapter(model, path)."
        )
    return kinds[0]


def _check_weights(owner: nn.Module) -> None:
    if lora_parameters(owner):
        raise MoEAdapterError(
            "the model holds LoRA layers, which an exported model has not: merge them first, "
            "model = model.merge_and_unload(), or keep them apart with save_adapter(model, path)."
        )
    for name, parameter in owner.named_parameters():
        kind = type(parameter.data)
        if parameter.is_meta or kind is not torch.Tensor or not parameter.is_floating_point():
            state = "on the meta device" if parameter.is_meta else f"a {kind.__name__} of {parameter.dtype}"
            raise MoEAdapterError(
                f"{name} is {state}; expected plain floating-point weights: load the base neither offloaded nor "
                "quantised, gather it if it is sharded, and put the adapter onto it with load_adapter(model, path)."
            )


def _auto_classes(base: type) -> dict[str, type]:
    """Which class each auto class stands for: the config's, the headless model, and `base` wherever it is meant."""
    classes = {"AutoConfig": base.config_class}
    if headless := _mapped(modeling_auto.AutoModel, base.config_class):
        classes["AutoModel"] = headless[0]
    for name in modeling_auto.__all__:
        if name.startswith("AutoModelFor") and base in _mapped(getattr(modeling_auto, name), base.config_class):
            classes[name] = base
    return classes if base in classes.values() else {**classes, "AutoModel": base}


def _mapped(auto: Any, config_class: type) -> tuple[type, ...]:
    found = auto._model_mapping.get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def _describe(owner: nn.Module, base: type, headless: type | None) -> dict[str, Any]:
    """`config.dual_path`: the exported class and where it holds its headless model, the method, and the sites.

    A site is all layers of one shape.
    """
    sites: dict[str, dict[str, Any]] = {}
    for name, layer in dual_path_layers(owner).items():
        fields = _site(owner, name, layer)
        sites.setdefault(repr(fields), {"layers": [], **fields})["layers"].append(name)
    method = next(iter(dual_path_layers(owner).values())).config.to_dict()
    return {
        "architecture": base.__name__,
        "prefix": next(
            (name for name, part in owner.named_children() if type(part) is headless), base.base_model_prefix
        ),
        "method": method,
        "sites": list(sites.values()),
    }


def _site(owner: nn.Module, name: str, layer: DualPathMoE) -> dict[str, Any]:
    ffn = layer.ffn
    root = owner.get_submodule(name.removesuffix("." + ffn.down)) if ffn.split else layer.static_expert
    return dict(
        hidden=ffn.hidden,
        expert_dim=layer.experts.down_proj.shape[2] if layer.experts else 0,
        shared_expert_dim=layer.shared_expert.down_proj.in_features if layer.shared_expert else 0,
        gated=ffn.gated,
        bias=ffn.bias,
        activation=_activation_name(ffn.activation, root),
        residual=ffn.residual,
        split=[ffn.up, ffn.down] if ffn.split else None,
        sorts=bool(layer.experts and layer.experts.activation),
    )


def _activation_name(activation: Any, root: nn.Module) -> str:
    """transformers' name of a known activation, or where the host's FFN holds it, or its name in torch."""
    if known := activation_name(activation):
        return {"gelu_tanh": "gelu_pytorch_tanh", "relu_squared": "relu2"}.get(known, known)
    for prefix, module in root.named_modules():
        for name, value in {**vars(module), **module._modules}.items():
            if value is activation:
                return remote.HOST + f"{prefix}.{name}".lstrip(".")
    return activation.__name__


transformers.AutoConfig.register(remote.MODEL_TYPE, AnyDualPathConfig, exist_ok=True)
