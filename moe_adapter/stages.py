"""The paper's two training stages: which parameters learn."""

from __future__ import annotations

from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.objective import dual_path_layers
from moe_adapter.surgery import injected_model


def set_stage(model: nn.Module, stage: int) -> dict[str, int]:
    """Set `requires_grad` for a stage; returns the numbers of parameters, dict(trainable=…, total=…).

    Stage 1, parameter-isolated pre-training: the MoE blocks alone. Stage 2, cooperative instruction fine-tuning: the
    MoE blocks in full and the parameters of peft's active LoRA; the rest, the static experts with it, stays frozen.
    Call it after `get_peft_model`, which freezes all but the LoRA.

    Raises:
        MoEAdapterError: another stage, or a model without dual-path layers.
    """
    if stage not in (1, 2):
        raise MoEAdapterError(f"set_stage: got stage {stage!r}, expected 1 (MoE blocks) or 2 (MoE blocks and LoRA).")
    injected_model(model)
    model.requires_grad_(False)
    trainable = [
        parameter for layer in dual_path_layers(model).values() for parameter in layer.new_parameters().values()
    ]
    if stage == 2:
        trainable += list(lora_parameters(model, active=True).values())
    for parameter in trainable:
        parameter.requires_grad_(True)
    parameters = list(model.parameters())
    return dict(
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        total=sum(parameter.numel() for parameter in parameters),
    )


def lora_parameters(model: nn.Module, *, active: bool = False) -> dict[str, nn.Parameter]:
    """The parameters that peft's tuner layers added, by full name; of their active adapters only, if asked."""
    found = {}
    for prefix, module in model.named_modules():
        for attribute in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, attribute, None)
            if isinstance(part, nn.Module | nn.ParameterDict):
                for name, parameter in part.named_parameters():
                    if not active or name.partition(".")[0] in module.active_adapters:  # pyright: ignore
                        found[f"{prefix}.{attribute}.{name}"] = parameter
    return found
