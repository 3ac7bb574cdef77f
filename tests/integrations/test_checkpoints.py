"""Checkpoints of what trains: a resumed training equals one that ran through, to the bit; only whole ones are used."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import zoo
from cpu_fsdp import shard_on_cpus
from distributed import run_ranks
from engines import without_compiling
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_adapter import MoEAdapterError, inject_dual_path_moe, load_adapter, set_stage
from moe_adapter.integrations.checkpoints import (
    COMPLETE,
    UNFINISHED,
    AdapterCheckpoints,
    latest_checkpoint,
    remove_checkpoints,
)
from moe_adapter.integrations.deepspeed import zero_config
from moe_adapter.integrations.fsdp import fsdp_arguments
from moe_adapter.integrations.trainer import SUMS, DualPathMixin
from moe_adapter.sharding import whole

ROWS, EPOCHS, LOGGED = 12, 2, 4


class CheckpointTrainer(DualPathMixin, AdapterCheckpoints, Trainer):
    pass


def trainer(folder: Path, stage: int = 2, *, seed: int = 0, also="", callbacks=(), **arguments) -> CheckpointTrainer:
    """Two epochs, with dropout in the LoRA; `also` names base parameters to train; on as many ranks as there are."""
    torch.manual_seed(seed)
    model = inject_dual_path_moe(zoo.build("qwen2"), num_experts=4, expert_dim=16, shared_expert_dim=24)
    if stage == 2:
        lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, lora)
    set_stage(model, stage)
    for name, parameter in model.named_parameters():
        if also and also in name:
            parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": (ids := torch.randint(3, 100, (8,), generator=generator)), "labels": ids} for _ in range(ROWS)
    ]
    settings = dict(num_train_epochs=EPOCHS, per_device_train_batch_size=1, gradient_accumulation_steps=2, save_steps=1)
    settings |= dict(learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, use_cpu=True, report_to=[])
    settings |= dict(disable_tqdm=True, logging_steps=LOGGED)
    args = TrainingArguments(folder, **settings | arguments)
    return CheckpointTrainer(model, args, train_dataset=data, eval_dataset=data[:2], callbacks=list(callbacks))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert found.keys() == expected.keys() and not different


def routing_log(training: CheckpointTrainer) -> dict[int, list[float]]:
    entries = [entry for entry in training.state.log_history if "max_load" in entry]
    return {entry["step"]: [entry["balance_loss"], entry["max_load"]] for entry in entries}


def resume_everywhere(folder: Path, stage: int, steps: list[int], **arguments) -> None:
    """Resume from each of these checkpoints of one training, in a model that was born otherwise."""
    reference = trainer(folder, stage, **arguments)
    reference.train()
    engine = [name for name in ("deepspeed", "fsdp") if getattr(reference, f"is_{name}_enabled")]
    assert engine == [name for name in ("deepspeed", "fsdp") if name in arguments]
    expected, random, logged = weights(reference.model), torch.get_rng_state(), routing_log(reference)
    assert list(logged) == list(range(LOGGED, reference.state.global_step + 1, LOGGED))
    for step in steps:
        again = trainer(folder, stage, seed=1, **arguments | {"save_strategy": "no"})
        again.train(resume_from_checkpoint=folder / f"checkpoint-{step}")
        assert_equal(weights(again.model), expected)
        assert torch.equal(torch.get_rng_state(), random)
        found = routing_log(again)  # of the steps before it too, where a log entry spans the checkpoint
        assert found.keys() == logged.keys()
        assert all(found[at] == pytest.approx(logged[at], rel=1e-6) for at in logged)


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_equals_run_through(tmp_path: Path, stage: int) -> None:
    """From the middle of an epoch, the end of one, the middle of the next, and the end of all."""
    resume_everywhere(tmp_path, stage, [2, 6, 9, 12])


def test_base_parameters_that_train_too_are_resumed(tmp_path: Path) -> None:
    """With a LoRA beside them, whose loading would freeze them."""
    resume_everywhere(tmp_path, 2, [2], also="norm")


def job(folder: Path, stage: int, steps: list[int], arguments: dict) -> None:
    shard_on_cpus()
    without_compiling()
    resume_everywhere(folder, stage, steps, **arguments)
    trained = {name for name, p in trainer(folder, stage, **arguments).model.named_parameters() if p.requires_grad}
    for file in folder.rglob("*mp_rank_00_model_states.pt"):
        assert set(torch.load(file, weights_only=False)["module"]) == trained, "deepspeed has saved frozen parameters"


ENGINES = {"ddp": {}, "zero2": dict(deepspeed=zero_config(2)), "zero3": dict(deepspeed=zero_config(3))}
ENGINES["fsdp2"] = fsdp_arguments()
RUNS = [
    *(
        pytest.param(
            engine, stage, precision, id=f"{engine} {stage} {'bf16' if precision else ''}", marks=pytest.mark.slow
        )
        for engine in ENGINES
        for stage in (1, 2)
        for precision in ({}, {"bf16": True})
    ),
]


@pytest.mark.parametrize(("engine", "stage", "precision"), RUNS)
def test_resumed_equals_run_through_on_two_ranks(tmp_path: Path, engine: str, stage: int, precision: dict) -> None:
    arguments = {**ENGINES[engine], **precision}
    run_ranks(2, job, timeout=240, folder=tmp_path, stage=stage, steps=[2, 4, 5], arguments=arguments)


def test_a_checkpoint_holds_what_trains_and_no_base(tmp_path: Path) -> None:
    training = trainer(tmp_path, num_train_epochs=1)
    training.train()
    checkpoint = tmp_path / "checkpoint-6"
    names = {path.relative_to(checkpoint).as_posix().split("-")[0] for path in checkpoint.glob("*")}
    own = {"moe_adapter.json", "weights", "lora", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names == own | {COMPLETE, SUMS}
    trained = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    moments = torch.load(checkpoint / "optimizer.pt")["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == trained
    kept = [tensor for file in checkpoint.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert sum(tensor.numel() for tensor in kept) == trained
    fresh = zoo.build("qwen2")
    assert_equal(weights(load_adapter(fresh, checkpoint)), weights(training.model))


def test_resume_true_takes_the_newest_or_starts_afresh(tmp_path: Path) -> None:
    training = trainer(tmp_path, num_train_epochs=1)
    training.train(resume_from_checkpoint=True)
    assert training.state.global_step == 6 and latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    again = trainer(tmp_path, num_train_epochs=1)
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 6
    remove_checkpoints(tmp_path)
    assert latest_checkpoint(tmp_path) is None and not list(tmp_path.iterdir())


class Die(TrainerCallback):
    """Raises after a step, as a signal would end the training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Die(3)]).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "optimizer.pt has": lambda checkpoint: truncate(checkpoint / "optimizer.pt"),
    "rng_state.pth has no bytes": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "moe_adapter.json has no bytes": lambda checkpoint: (checkpoint / "moe_adapter.json").unlink(),
    f"it has no {COMPLETE}": lambda checkpoint: (checkpoint / COMPLETE).unlink(),
    "it has no": lambda checkpoint: truncate(checkpoint / COMPLETE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(two_checkpoints: Path, caplog, damage: str) -> None:
    damaged = two_checkpoints / "checkpoint-2"
    DAMAGES[damage](damaged)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(two_checkpoints) == two_checkpoints / "checkpoint-1"
    [message] = caplog.messages
    assert str(damaged) in message and damage in message
    with pytest.raises(MoEAdapterError, match="is no whole checkpoint"):
        trainer(two_checkpoints).train(resume_from_checkpoint=damaged)


class DieSaving(CheckpointTrainer):
    """Ends, as by a signal, when all but the last file of a checkpoint is written."""

    def _finish(self, written: Path, folder: Path) -> None:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        super()._finish(written, folder)


def test_one_that_was_being_written_is_named_and_passed_over(tmp_path: Path, caplog) -> None:
    training = trainer(tmp_path)
    training.__class__ = DieSaving
    with pytest.raises(KeyboardInterrupt):
        training.train()
    half = tmp_path / UNFINISHED / "checkpoint-3"
    assert (half / "optimizer.pt").is_file() and not (tmp_path / "checkpoint-3").exists()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert str(half) in caplog.text
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert not (tmp_path / UNFINISHED).exists() and (tmp_path / "checkpoint-3" / COMPLETE).is_file()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write more than so many bytes into a file, with an error as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["weights", "optimizer", "trainer_state"])
def test_a_write_that_fails_costs_no_earlier_checkpoint(two_checkpoints: Path, file: str) -> None:
    """Not even where one alone is kept; what was written of the new one is taken away."""
    sizes = {
        path.name.split("-")[0].split(".")[0]: path.stat().st_size
        for path in (two_checkpoints / "checkpoint-2").iterdir()
    }
    training = trainer(two_checkpoints, save_total_limit=1)
    with (
        files_up_to(sizes[file] // 2),
        pytest.raises(MoEAdapterError, match=r"checkpoint of step 3 could not be written"),
    ):
        training.train(resume_from_checkpoint=True)
    assert latest_checkpoint(two_checkpoints) == two_checkpoints / "checkpoint-2"
    assert not (two_checkpoints / UNFINISHED).exists()
    trainer(two_checkpoints, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in two_checkpoints.iterdir()] == ["checkpoint-12"]


def test_older_ones_go_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    finish = CheckpointTrainer._finish
    monkeypatch.setattr(
        CheckpointTrainer,
        "_finish",
        lambda self, *args: seen.append(sorted(p.name for p in tmp_path.glob("checkpoint-*"))) or finish(self, *args),
    )
    trainer(tmp_path, save_total_limit=1, max_steps=3).train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    training = trainer(tmp_path, stage=1, save_total_limit=1, learning_rate=1.0, max_steps=6, **best)
    training.train()
    checkpoint = Path(training.state.best_model_checkpoint)
    assert checkpoint.parent == tmp_path and checkpoint.name != "checkpoint-6", "the rate is so high that it gets worse"
    kept = json.loads((checkpoint / "trainer_state.json").read_text())
    assert kept["best_model_checkpoint"] == str(checkpoint)
    model = load_adapter(zoo.build("qwen2"), checkpoint)
    assert_equal(weights(training.model), weights(model))
