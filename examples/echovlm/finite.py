"""What becomes of a step whose loss is not finite: the run stops, or the step is left out, and the cases are noted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from examples.echovlm import ranks
from moe_adapter import MoEAdapterError

PATIENCE = 10  # steps in a row without a finite loss: then it is the weights that are broken, not a case


class FiniteLoss(TrainerCallback):
    """Looks at each loss before its backward; `on_nan` "stop" raises, "skip" leaves the whole step out on all ranks.

    Left out, a step changes neither weights nor optimizer nor learning rate, as one that overflowed in float16; only
    the number of steps goes on. Each is a line of the JSONL file `notes`.
    """

    def __init__(self, on_nan: str, notes: Path) -> None:
        self.on_nan, self.notes = on_nan, notes
        self.bad, self.in_a_row = False, 0

    def check(self, loss: torch.Tensor, cases: Sequence[str], state: TrainerState) -> torch.Tensor:
        """The loss as it is, or NaN on all ranks, so that every engine sees that the step has no gradient to use.

        Raises: MoEAdapterError if one is not finite and the run is to stop, or was not for many steps in a row.
        """
        bad = ~torch.isfinite(loss.detach())
        if ranks.count() > 1:
            bad = bad.int()
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if not bad:
            return loss
        self._note(loss, cases, state.global_step + 1)
        self.bad = True
        return loss * float("nan")

    def _note(self, loss: torch.Tensor, cases: Sequence[str], step: int) -> None:
        seen = ranks.gather((float(loss.detach()), list(cases)))
        found = [case for value, names in seen for case in names if not torch.isfinite(torch.tensor(value))]
        if ranks.is_main():
            line = {"step": step, "losses": [str(value) for value, _ in seen], "cases": found}
            with self.notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.on_nan == "skip" and self.in_a_row < PATIENCE:
            return
        why = f"for {PATIENCE} steps before it too" if self.on_nan == "skip" else "on_nan is stop"
        raise MoEAdapterError(
            f"the loss of step {step} is not finite ({why}), on cases {', '.join(found)}, see {self.notes}: look at "
            "these cases, lower the learning rate, or leave such steps out by on_nan: skip in the preset."
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Without gradients the optimizer does nothing; DeepSpeed, which has stepped already, has seen to it itself."""
        if self.bad:
            optimizer.zero_grad()
        optimizer._is_overflow = self.bad  # what accelerate tells Trainer, which then leaves the scheduler alone

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_a_row = self.in_a_row + 1 if self.bad else 0
        self.bad = False
