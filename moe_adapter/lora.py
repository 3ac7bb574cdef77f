"""What peft puts around a model's parts: its LoRA layers, which of them answer, and names without them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

WRAPPED = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module")  # what wrappers of a part call it
COPIES = ("original_module", "modules_to_save")  # what peft calls a part and its copy, where it trains the copy


def plain_name(name: str) -> str:
    """A name in a model as it is without what peft, torch.compile or checkpointing wrapped around parts of it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is peft's wrapper of another; transformers models have a `peft_config` of their own."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def lora_parameters(model: nn.Module, *, active: bool = False) -> dict[str, nn.Parameter]:
    """The parameters that peft's tuner layers added, by full name; of those that answer only, if asked."""
    found = {}
    for prefix, module in model.named_modules():
        for attribute in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, attribute, None)
            if isinstance(part, nn.Module | nn.ParameterDict):
                for name, parameter in part.named_parameters():
                    if not active or name.partition(".")[0] in _answering(module):
                        found[f"{prefix}.{attribute}.{name}"] = parameter
    return found


def active_loras(model: nn.Module) -> tuple[str, ...]:
    """The names of the LoRAs that answer; none where they are off, or the model has none."""
    return tuple(dict.fromkeys(name for part in _tuner_layers(model) for name in _answering(part)))


def switch_lora(model: nn.Module, names: Iterable[str]) -> None:
    """Let the LoRAs `names` answer and no others; a PeftModel around them hears of it too."""
    names, parts = list(names), _tuner_layers(model)
    for part in parts:
        part.enable_adapters(bool(names))
    if names and parts:
        from peft.functional import set_adapter

        set_adapter(model, names if len(names) > 1 else names[0])
        if is_peft_model(model):
            wrapper: Any = model
            wrapper.active_adapter = wrapper.base_model.active_adapter = names if len(names) > 1 else names[0]


def _tuner_layers(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if hasattr(part, "adapter_layer_names")]


def _answering(part: Any) -> list[str]:
    return [] if part.disable_adapters else part.active_adapters
