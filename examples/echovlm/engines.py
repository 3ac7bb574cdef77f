"""What a preset's `engine` means to transformers' Trainer: DeepSpeed, FSDP2, or neither."""

from __future__ import annotations

import os
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from examples.echovlm.config import EngineConfig
from examples.echovlm.ranks import launched

SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
BROUGHT = any(os.environ.get(name) == "true" for name in SWITCHES)  # by `accelerate launch`, with a config of its own


def engine_arguments(engine: EngineConfig) -> dict[str, Any]:
    """Keywords of TrainingArguments; none where `accelerate launch` brings an engine, nor for a process on its own."""
    if BROUGHT or not launched():
        return {}
    if engine.fsdp:
        from moe_adapter.integrations.fsdp import fsdp_arguments

        return fsdp_arguments(offload=engine.offload)
    if engine.deepspeed in ("zero2", "zero3"):
        from moe_adapter.integrations.deepspeed import zero_config

        return {"deepspeed": zero_config(int(engine.deepspeed[-1]), offload=engine.offload)}
    return {"deepspeed": engine.deepspeed} if engine.deepspeed else {}


def forget_engine() -> None:
    """Undo what a stage's engine has switched on for the whole process: the next one would get it by default."""
    unset_hf_deepspeed_config()
    for name in () if BROUGHT else SWITCHES:
        os.environ.pop(name, None)
