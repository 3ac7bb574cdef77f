"""torch's FSDP2 around an injected model: the Trainer's arguments, and accelerate's file `configs/fsdp2.yaml`.

Units are the model's own blocks (`_no_split_modules`), so no class has to be named; a dual-path layer is whole in one.
Trainable parameters are to be float32, which the Trainer's bf16=True makes them: FSDP2 wants one dtype in a unit.
"""

from __future__ import annotations

from typing import Any


def fsdp_arguments(*, offload: bool = False) -> dict[str, Any]:
    """Keywords for `TrainingArguments` that shard an injected model with FSDP2 under torchrun or accelerate.

    Checkpoints are sharded too: each process writes its own part. With `offload` parameters wait in the host's memory.
    """
    config = dict(
        version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_offload=offload,
    )
    return {"fsdp": True, "fsdp_config": config}
