"""A routing record of every evaluation in a Trainer's training, and its statistics for TensorBoard, W&B and the like.

    trainer = Trainer(model, TrainingArguments(out, eval_strategy="steps", report_to="tensorboard"), …)
    trainer.add_callback(RoutingSnapshots(trainer, "routing"))
    trainer.train()

`moe_adapter.analysis.snapshots` reads the folder, and draws how early routing settles.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback

from moe_adapter import DualPathMoE, MoEAdapterError
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.record import record_routing
from moe_adapter.analysis.routers import find_routers
from moe_adapter.analysis.snapshots import snapshot_parts, snapshot_path
from moe_adapter.analysis.statistics import normalised_entropy
from moe_adapter.injection import injected_model
from moe_adapter.integrations.trainer import report
from moe_adapter.losses import layer_balance_loss


class RoutingSnapshots(TrainerCallback):
    """Records each evaluation that `train()` makes, and logs its routing; training goes on as without it.

    The file of step 200 is FOLDER/step-000200.parquet, of several processes one for each; those of an evaluation set
    with a name, FOLDER/NAME/…. A step that is evaluated again, as after a resume, replaces its file.

    The log gains `eval_max_load` and, of dual-path layers, `eval_balance_loss`, the mean over layers and batches.
    Reporters (TensorBoard, W&B, …) also get `eval_expert_load/LAYER/EXPERT`, the share of tokens that chose it,
    `eval_evenness/LAYER`, the load's normalised entropy, and of dual-path layers `eval_balance_loss/LAYER`,
    `eval_alpha/LAYER` and `eval_lambda/LAYER`.

    A callback that runs the model at a step's end is to stand before this one. torch.compile is off while an
    evaluation is recorded.

    Args:
        trainer: any Trainer of a model that `record_routing` takes; the callback is then added to it.
        cases: ids of the evaluation set's rows, in the set's order, which is that of Trainer's evaluations; else they
            are numbered. Of one evaluation set, a sequence in each row: several sets, or rows that TRL has packed,
            would need names for each.
        groups: the group of each case id.

    Raises, as a training begins:
        MoEAdapterError: the evaluation set has another number of rows than there are ids.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: str | os.PathLike[str],
        *,
        cases: Sequence[str] | None = None,
        groups: Mapping[str, str] | None = None,
    ):
        self._trainer = trainer
        self._folder = Path(folder)
        self._cases = cases
        self._groups = groups
        self._evaluation: _Evaluation | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = self._trainer.eval_dataset
        if self._cases is not None and isinstance(rows, Sized) and len(rows) != len(self._cases):
            raise MoEAdapterError(
                f"got {len(self._cases)} case ids for an evaluation set of {len(rows)} rows; give one for each. "
                "TRL may have packed them: SFTConfig(eval_packing=False) leaves rows as they are."
            )
        later = [step for step, _ in snapshot_parts(self._folder) if step > state.global_step]
        if later and state.is_world_process_zero:
            warnings.warn(
                f"{self._folder} has snapshots of steps {later[0]} to {later[-1]} of an earlier training, which goes "
                f"on from step {state.global_step}; each stays until its step is evaluated again.",
                stacklevel=2,
            )
        self._abandon()
        if args.eval_on_start:
            self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            self._begin()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self._evaluation is None:  # by hand, outside train()
            return
        prefix = next(name for name in metrics if name.endswith("_runtime")).removesuffix("_runtime")
        folder = self._folder / prefix.removeprefix("eval").removeprefix("_")
        path = snapshot_path(folder, state.global_step, rank=args.process_index, ranks=args.world_size)
        if state.is_world_process_zero:
            _remove_parts(folder, state.global_step, args.world_size)
        evaluation, self._evaluation = self._evaluation, None
        self._log(prefix, *evaluation.finish(path))
        self._begin()  # the next evaluation set's, if there is one

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._abandon()

    on_save = on_train_end = on_step_begin

    def _begin(self) -> None:
        self._abandon()
        path = self._folder / f".evaluation-{self._trainer.args.process_index}.parquet"
        self._evaluation = _Evaluation(self._trainer.model, path, self._own_cases(), self._groups)  # pyright: ignore

    def _abandon(self) -> None:
        if self._evaluation is not None:
            self._evaluation.abandon()
            self._evaluation = None

    def _own_cases(self) -> list[str] | None:
        """Those that this process meets, in its order: a full last round begins again with the first."""
        if self._cases is None:
            return None
        args, accelerator = self._trainer.args, self._trainer.accelerator
        batches = BatchSampler(range(len(self._cases)), args.eval_batch_size, args.dataloader_drop_last)
        if args.world_size > 1:
            dealt = args.world_size, args.process_index, accelerator.split_batches, accelerator.even_batches
            batches = BatchSamplerShard(batches, *dealt)
        return [self._cases[row] for batch in batches for row in batch]

    def _log(self, prefix: str, record: RoutingRecord, sums_LV: torch.Tensor) -> None:
        """Over all ranks: a collective."""
        trainer = self._trainer
        sums_LV = trainer.accelerator.reduce(sums_LV.to(trainer.args.device), "sum").cpu()  # pyright: ignore
        summary, details = _numbers(record, sums_LV)
        trainer.log({f"{prefix}_{name}": value for name, value in summary.items()})
        report(trainer, {f"{prefix}_{name}": value for name, value in details.items()})


class _Abandoned(Exception):
    """Ends a recording that is not to be kept."""


class _Evaluation:
    """An evaluation while it runs: its record, and the balance losses of dual-path layers."""

    def __init__(self, model: nn.Module, path: Path, cases: Sequence[str] | None, groups: Mapping[str, str] | None):
        self._path = path
        self._blocks = [routed.block for routed in find_routers(model)]
        self._balance: dict[int, torch.Tensor] = {}  # of a layer: Σ L_bal, forwards
        with ExitStack() as opening:
            if any(isinstance(block, DualPathMoE) for block in self._blocks):
                opening.callback(injected_model(model).register_forward_hook(self._on_forward).remove)
            opening.enter_context(record_routing(model, path, cases=cases, groups=groups))
            self._open = opening.pop_all()

    @torch.no_grad()
    def _on_forward(self, *args: Any) -> None:
        for i, block in enumerate(self._blocks):
            if isinstance(block, DualPathMoE) and (calls := block.routing.calls):
                loss = layer_balance_loss(calls)
                self._balance[i] = self._balance.get(i, 0) + torch.stack([loss, torch.ones_like(loss)])

    def finish(self, path: Path) -> tuple[RoutingRecord, torch.Tensor]:
        """Put the record at `path`; beside it, by layer, slots by expert, tokens, Σ L_bal and forwards, (L, E + 3)."""
        self._open.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self._path, path)
        record = RoutingRecord.open(path)
        experts = max(layer.num_experts for layer in record.facts.layers)
        sums_LV = torch.zeros(len(record.facts.layers), experts + 3)
        for row in record.count(["layer", "expert"]).to_pylist():
            sums_LV[row["layer"], row["expert"]] = row["count"]
        sums_LV[:, experts] = record.facts.tokens
        for i, balance in self._balance.items():
            sums_LV[i, experts + 1 :] = balance
        return record, sums_LV

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._open.__exit__(_Abandoned, _Abandoned(), None)


def _numbers(record: RoutingRecord, sums_LV: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers for a log line, and all of them for a reporter."""
    losses, loads, details = {}, {}, {}
    for i, layer in enumerate(record.facts.layers):
        *counts, tokens, loss, forwards = sums_LV[i].tolist()
        counts = counts[: layer.num_experts]
        loads |= {f"expert_load/{i}/{e}": count / tokens for e, count in enumerate(counts)}
        details[f"evenness/{i}"] = float(normalised_entropy(np.array(counts)))
        if forwards:
            losses[f"balance_loss/{i}"] = loss / forwards
        scalars = {f"alpha/{i}": layer.alpha, f"lambda/{i}": layer.lam}
        details |= {name: value for name, value in scalars.items() if value is not None}
    summary = {"max_load": max(loads.values())}
    if losses:
        summary["balance_loss"] = sum(losses.values()) / len(losses)
    return summary, {**losses, **loads, **details}


def _remove_parts(folder: Path, step: int, ranks: int) -> None:
    """What a training on another number of processes left of the step."""
    for (other, parts), paths in snapshot_parts(folder).items():
        if other == step and parts != ranks:
            for path in paths:
                path.unlink()
