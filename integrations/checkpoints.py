"""Checkpoints for transformers' Trainer that hold what trains, not the frozen base, and are whole or not resumed from.

    class MyTrainer(AdapterCheckpoints, Trainer): ...

    MyTrainer(model, TrainingArguments(out, save_steps=500), …).train(resume_from_checkpoint=True)

A checkpoint is a directory of `save_adapter`, with the optimizer, the scheduler and the random states that Trainer, or
the engine under it, adds; `load_adapter` reads it. It gets its name when all of it is on the disk, with a list of its
files: a training that was killed while saving, or whose disk was full, goes on from the checkpoint before.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from moe_adapter import MoEAdapterError, load_adapter, save_adapter
from moe_adapter.directory import replace_file

COMPLETE = "complete.json"  # the sizes of a checkpoint's files, in bytes
UNFINISHED = "unfinished"  # where one is written

logger = logging.getLogger(__name__)


class AdapterCheckpoints:
    """For an injected model, left of Trainer among a class's bases: what a checkpoint holds, and which is resumed from.

    `resume_from_checkpoint=True` takes the newest whole checkpoint, or starts afresh where there is none. Data order,
    random states, optimizer and scheduler are Trainer's own, so that the resumed training equals one that ran through.
    """

    args: Any
    state: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _initial_global_step: int
    _saving = False

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own. Raises MoEAdapterError: the checkpoint that was named is not whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and (damage := _damage(Path(resume_from_checkpoint))):
            raise MoEAdapterError(
                f"{resume_from_checkpoint} is no whole checkpoint ({damage}): name another, or let "
                "resume_from_checkpoint=True find one."
            )
        resume = os.fspath(resume_from_checkpoint) if resume_from_checkpoint else None
        trained = super().train(resume, *args, **kwargs)  # pyright: ignore
        if self.state.global_step == self._initial_global_step:
            self._load_rng_state(resume)  # pyright: ignore  # what follows goes on as after the training itself
        return trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        load_adapter(model, resume_from_checkpoint)  # with a LoRA it sets stage 2, which the training may not be
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, best, load_module_strict=False)
        else:
            self._load_from_checkpoint(best)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # pyright: ignore
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # pyright: ignore
        engine = self.model_wrapped
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        if resume_from_checkpoint:  # Trainer would ask for the frozen parameters, which aren't there
            deepspeed_load_checkpoint(engine, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # pyright: ignore
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)  # pyright: ignore
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin  # Trainer would save the model, frozen or not, beside these
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)  # pyright: ignore
        return os.path.join(run, UNFINISHED) if self._saving else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own, into a folder of its own, which takes its name once it is whole; older ones go after that."""
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish(run / UNFINISHED / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
            raise MoEAdapterError(
                f"the checkpoint of step {self.state.global_step} could not be written into {run} ({error}). Those "
                "before it are whole: see whether the disk is full, and resume."
            ) from error
        finally:
            self._saving = False
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(os.fspath(run), self.args.save_total_limit, best, use_mtime=True)

    def _finish(self, written: Path, folder: Path) -> None:
        if self.state.best_model_checkpoint == os.fspath(written):
            self.state.best_model_checkpoint = os.fspath(folder)
            self.state.save_to_json(os.fspath(written / TRAINER_STATE_NAME))
        _complete(written)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(written, folder)
        written.parent.rmdir()


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a training's output folder; None without one. Names those that it passes over."""
    for path in Path(folder, UNFINISHED).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        logger.warning("%s is no whole checkpoint (saving it was not finished): it is passed over", path)
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) is not None]
    for path in sorted(found, key=_step, reverse=True):  # pyright: ignore
        damage = _damage(path)
        if damage is None:
            return path
        logger.warning("%s is no whole checkpoint (%s): it is passed over", path, damage)
    return None


def remove_checkpoints(folder: str | os.PathLike) -> None:
    """Delete the checkpoints of a training's output folder, whole or not, when the training is done."""
    for path in [Path(folder, UNFINISHED), *Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int | None:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else None


def _complete(folder: Path) -> None:
    """Bring a checkpoint's files to the disk, then the list of them."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            sizes[path.relative_to(folder).as_posix()] = os.fstat(file.fileno()).st_size
    replace_file(folder / COMPLETE, json.dumps(sizes, indent=1).encode())


def _damage(checkpoint: Path) -> str | None:
    """What a checkpoint lacks; None if it is whole."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no {COMPLETE}"
    for name, size in sizes.items():
        path = checkpoint / name
        got = path.stat().st_size if path.is_file() else "no"
        if got != size:
            return f"{name} has {got} bytes, expected {size}"
    return None
