"""DeepSpeed's ZeRO around an injected model: ready configurations, and parameters that ZeRO-3 spreads read whole.

The layer itself needs nothing: its experts are stacked in one module, so ranks whose tokens choose different experts
still run the same modules, and no class has to be registered as a leaf.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from moe_adapter.errors import MoEAdapterError

CONFIGS = Path(__file__).parent / "configs"


def zero_config(stage: int = 2, *, offload: bool = False) -> dict[str, Any]:
    """A configuration for `TrainingArguments(deepspeed=…)`: ZeRO-2, which the paper trains with (Table 8), or ZeRO-3.

    Precision, batch and clipping are "auto": the Trainer's arguments fill them in. Under bf16 gradients are summed in
    float32. With `offload` the optimizer's state, under ZeRO-3 the parameters too, wait in the host's memory.

    Raises:
        MoEAdapterError: another stage.
    """
    if stage not in (2, 3):
        raise MoEAdapterError(f"zero_config: got stage {stage!r}, expected 2 or 3.")
    return json.loads((CONFIGS / f"zero{stage}{'_offload' if offload else ''}.json").read_text())


def gathered(parameters: list[nn.Parameter], write: bool) -> AbstractContextManager:
    """Within it parameters that ZeRO-3 spreads are whole; with `write` rank 0's values are spread again after it."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)
