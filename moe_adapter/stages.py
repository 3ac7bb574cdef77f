"""The paper's two training stages: which parameters learn."""

from __future__ import annotations

from torch import nn

from moe_adapter.errors import MoEAdapterError
from moe_adapter.injection import injected_model
from moe_adapter.lora import lora_parameters
from moe_adapter.objective import dual_path_layers


def set_stage(model: nn.Module, stage: int) -> dict[str, int]:
    """Set `requires_grad` for a stage; returns the numbers of parameters, dict(trainable=…, total=…).

    Stage 1, parameter-isolated pre-training: the MoE blocks alone. Stage 2, cooperative instruction fine-tuning: the
    MoE blocks in full and the parameters of the LoRA that answers; the rest, the static experts with it, stays frozen.
    Call it after `get_peft_model`, which freezes all but the LoRA.

    Raises:
        MoEAdapterError: another stage, a model without dual-path layers, or one of whose layers peft made copies.
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
