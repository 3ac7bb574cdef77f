"""The ways to fit the base to ultrasound: the paper's, those that it compares itself with, and controls it lacks.

A preset's `method` names one. What it trains on, and how, is the rest of the preset, the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from examples.echovlm.config import Method, RecipeConfig
from moe_adapter import (
    MoEAdapterError,
    dual_path_layers,
    inject_dual_path_moe,
    load_adapter,
    plan_injection,
    set_stage,
)
from moe_adapter.lora import is_peft_model, lora_parameters


@dataclass(frozen=True, kw_only=True)
class Way:
    """`stages` are trained; `dual_path`: an injected path learns; `lora`: stage II adds one. Without both, all does."""

    stages: tuple[int, ...]
    dual_path: bool = False
    lora: bool = False


METHODS: dict[Method, Way] = {
    "dual-path": Way(stages=(1, 2), dual_path=True, lora=True),  # the paper's
    "dense": Way(stages=(1, 2), dual_path=True, lora=True),  # as many parameters, but every token sees all of them
    "plain": Way(stages=(2,), lora=True),  # the paper's fine-tuned baselines
    "full": Way(stages=(2,)),  # full fine-tuning: what does it forget?
    "zero-shot": Way(stages=()),
}
# A preset's names for what `frozen` keeps at its start value, and what layers call it.
FROZEN = {"router": "router.weight", "alpha": "alpha_logit", "lambda": "lam_logit"}


def inject(model: PreTrainedModel, config: RecipeConfig) -> None:
    """Put the method's dual-path layers into the model, if it has any and they aren't there yet."""
    if METHODS[config.method].dual_path and not dual_path_layers(model):
        inject_dual_path_moe(model, **moe_arguments(model, config))


def moe_arguments(model: PreTrainedModel, config: RecipeConfig) -> dict[str, Any]:
    """The preset's `moe`; for "dense" without routed experts, and a shared one as wide as parameters are to be equal.

    The width is a whole number, so the counts differ by half a hidden unit of it at most.
    """
    if config.method != "dense":
        return config.moe

    def added(moe: dict[str, Any]) -> int:
        return plan_injection(model, **moe).added

    narrow, wider = ({**config.moe, "num_experts": 0, "shared_expert_dim": width} for width in (1, 2))
    width = 1 + round((added(config.moe) - added(narrow)) / (added(wider) - added(narrow)))
    return {**narrow, "shared_expert_dim": width}


def choose_trained(model: nn.Module, stage: int, config: RecipeConfig) -> dict[str, int]:
    """Set `requires_grad` for a stage of the method; returns the numbers of parameters, dict(trainable=…, total=…).

    Raises: MoEAdapterError if `frozen` names what the layers haven't got.
    """
    way = METHODS[config.method]
    if way.dual_path:
        set_stage(model, stage)
        _freeze(model, config)
    else:
        model.requires_grad_(not way.lora)
        for parameter in lora_parameters(model).values():
            parameter.requires_grad_(True)
    return count_parameters(model)


def _freeze(model: nn.Module, config: RecipeConfig) -> None:
    for layer in dual_path_layers(model).values():
        parameters = layer.new_parameters()
        for name in config.frozen:
            if FROZEN[name] not in parameters:
                raise MoEAdapterError(
                    f"frozen: got {name!r}, which this preset's layers haven't got; expected one of "
                    f"{', '.join(known for known, path in FROZEN.items() if path in parameters) or 'none'}"
                )
            parameters[FROZEN[name]].requires_grad_(False)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """dict(trainable=…, total=…)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trainable": sum(n for n, trained in sizes if trained), "total": sum(n for n, _ in sizes)}


def load_trained(model: Any, folder: Path) -> None:
    """Put what was trained and saved in `folder` into a model of the same parts: an adapter, peft's LoRA, or all of it.

    Raises: MoEAdapterError if there is no such adapter, or it is another base's.
    """
    if dual_path_layers(model):
        load_adapter(model, folder)
    elif is_peft_model(model):
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    else:  # Trainer reads its own checkpoint past transformers' renaming of weights, and would find none of Qwen2-VL's
        whole = type(model).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        model.load_state_dict(whole.state_dict())
