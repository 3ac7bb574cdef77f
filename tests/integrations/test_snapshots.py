"""`RoutingSnapshots`: each evaluation's record and statistics, in a training that goes on as without them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as tf
import zoo
from distributed import run_ranks
from engines import Ordered, collate, micro_batches
from reference import perturb, reference_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe
from moe_adapter.analysis.record import RoutingRecord, record_routing
from moe_adapter.analysis.saturation import saturation
from moe_adapter.analysis.snapshots import open_snapshots
from moe_adapter.integrations.snapshots import RoutingSnapshots

SIZES = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
ROUTES = ["case", "group", "modality", "position", "token_id", "layer", "slot", "expert"]
STEPS = 4
HELD_OUT = [row for batch in micro_batches("uneven", 4)[1:] for row in batch][:5]  # an odd number, of uneven lengths
CASES = [f"case {number}" for number in range(5)]
GROUPS = dict(zip(CASES, ["liver", "heart", "liver", "heart", "liver"], strict=True))


def make_model() -> torch.nn.Module:
    """With dropout, so that a random number drawn elsewhere changes the training."""
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), **SIZES))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


def make_trainer(out: Path | str, model=None, **settings) -> Trainer:
    held_out = settings.pop("held_out", HELD_OUT)
    defaults = dict(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    data = [row for batch in micro_batches("uneven", 2 * STEPS) for row in batch]
    arguments = TrainingArguments(str(out), **{**defaults, **settings})
    return Ordered(
        model if model is not None else make_model(),
        arguments,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=collate,
    )


def with_snapshots(trainer: Trainer, folder: Path | str, **names) -> Trainer:
    trainer.add_callback(RoutingSnapshots(trainer, folder, **names))
    return trainer


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_training_goes_on_as_without_it(tmp_path, checkpointing):
    settings = dict(eval_on_start=True, gradient_accumulation_steps=2)
    if checkpointing is not None:
        kwargs = dict(use_reentrant=checkpointing)
        settings |= dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    alone = make_trainer(tmp_path / "alone", **settings)
    alone.train()
    watched = with_snapshots(make_trainer(tmp_path / "watched", **settings), tmp_path / "routing")
    watched.train()
    assert files(tmp_path / "routing") == [f"step-00000{step}.parquet" for step in (0, 2, 4)]
    ours, theirs = watched.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (alone, watched)]
    assert losses[0] == losses[1] and hooks(watched.model) == hooks(alone.model)
    assert "generate" not in vars(watched.model) and watched.model.training == alone.model.training


def test_ids_for_another_number_of_rows_are_refused_as_training_begins(tmp_path):
    trainer = with_snapshots(make_trainer(tmp_path), tmp_path / "routing", cases=CASES[:3], groups=GROUPS)
    with pytest.raises(MoEAdapterError, match="got 3 case ids for an evaluation set of 5 rows"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_snapshot_is_the_record_of_the_evaluation(tmp_path):
    trainer = with_snapshots(make_trainer(tmp_path), tmp_path / "routing", cases=CASES, groups=GROUPS)
    trainer.train()
    with record_routing(trainer.model, tmp_path / "by_hand.parquet", cases=CASES, groups=GROUPS), torch.no_grad():
        for start in range(0, 5, 2):
            trainer.model.eval()(**collate(HELD_OUT[start : start + 2]))
    records = open_snapshots(tmp_path / "routing")
    by_hand = RoutingRecord.open(tmp_path / "by_hand.parquet").table(ROUTES)
    assert list(records) == ["2", "4"]
    assert records["4"].table(ROUTES).to_pylist() == by_hand.to_pylist() != records["2"].table(ROUTES).to_pylist()
    assert records["2"].facts.cases == 5 and set(records["2"].facts.groups) == {"liver", "heart"}
    assert len({record.facts.layers[0].alpha for record in records.values()}) == 2
    found = saturation(records)
    assert found.checkpoints == ("2",) and (found.saturation_SL.value > 0.5).all()


def test_tensorboard_holds_the_evaluations_routing(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(tmp_path, report_to=["tensorboard"], learning_rate=0.0, per_device_eval_batch_size=3)
    by_hand = reference_model(trainer.model)
    with_snapshots(trainer, tmp_path / "routing").train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    found = {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}

    counts_LE, losses_L, tokens = np.zeros((2, 4)), np.zeros(2), 0
    for rows in (HELD_OUT[:3], HELD_OUT[3:]):
        batch = collate(rows)
        by_hand(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        real = batch["attention_mask"].double().reshape(-1, 1)
        tokens += int(real.sum())
        for i, name in enumerate(dual_path_layers(trainer.model)):
            layer = by_hand.get_submodule(name)
            routed_E = (layer.chosen.pop().reshape(len(real), -1) * real).sum(0)
            mean_E = (layer.logits.pop().softmax(-1).reshape(len(real), -1) * real).sum(0) / real.sum()
            counts_LE[i] += routed_E.numpy()
            losses_L[i] += (routed_E / real.sum() * mean_E).sum().item() / 2
    for i in range(2):
        p = counts_LE[i] / counts_LE[i].sum()
        assert found[f"eval/balance_loss/{i}"] == pytest.approx([losses_L[i]] * 2, rel=1e-5)
        assert found[f"eval/evenness/{i}"] == pytest.approx([-(p * np.log(p)).sum() / np.log(4)] * 2, rel=1e-5)
        layer = trainer.model.model.layers[i].mlp
        assert found[f"eval/alpha/{i}"] == pytest.approx([layer.alpha.item()] * 2)
        assert found[f"eval/lambda/{i}"] == pytest.approx([layer.lam.item()] * 2)
        for e in range(4):
            assert found[f"eval/expert_load/{i}/{e}"] == pytest.approx([counts_LE[i, e] / tokens] * 2)
    assert [e.step for e in board.Scalars("eval/evenness/0")] == [2, 4]
    entry = next(entry for entry in trainer.state.log_history if "eval_max_load" in entry)
    assert entry["eval_balance_loss"] == pytest.approx(losses_L.mean(), rel=1e-5) and entry["step"] == 2
    assert entry["eval_max_load"] == pytest.approx(counts_LE.max() / tokens)


def test_a_mixture_of_transformers_own(tmp_path):
    config = tf.MixtralConfig(**zoo.TEXT, num_local_experts=4, num_experts_per_tok=2)
    trainer = with_snapshots(make_trainer(tmp_path, tf.MixtralForCausalLM(config)), tmp_path / "routing")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_max_load" in entry]
    assert [entry["step"] for entry in logged] == [2, 4] and "eval_balance_loss" not in logged[0]
    assert list(open_snapshots(tmp_path / "routing")) == ["2", "4"]


def test_evaluation_sets_with_names(tmp_path):
    held_out = dict(near=HELD_OUT, far=HELD_OUT[:2])
    trainer = with_snapshots(make_trainer(tmp_path, held_out=held_out), tmp_path / "routing")
    trainer.train()
    assert files(tmp_path / "routing") == [f"{n}/step-00000{step}.parquet" for n in ("far", "near") for step in (2, 4)]
    cases = {name: open_snapshots(tmp_path / "routing" / name)["4"].facts.cases for name in held_out}
    assert cases == dict(near=5, far=2)
    assert {"eval_near_max_load", "eval_far_max_load"} <= set().union(*trainer.state.log_history)


def test_by_epochs_and_by_hand(tmp_path):
    settings = dict(eval_strategy="epoch", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8)
    trainer = with_snapshots(make_trainer(tmp_path, **settings), tmp_path / "routing")
    trainer.evaluate()  # outside train(): the user's own
    assert not (tmp_path / "routing").exists()
    trainer.train()
    trainer.evaluate()
    trainer.predict(HELD_OUT)
    assert files(tmp_path / "routing") == ["step-000002.parquet", "step-000004.parquet"]


def test_a_resumed_training_replaces_its_steps(tmp_path):
    settings = dict(save_strategy="steps", save_steps=2)
    with_snapshots(make_trainer(tmp_path / "out", **settings), tmp_path / "routing").train()
    before = {step: record.table() for step, record in open_snapshots(tmp_path / "routing").items()}
    replaced = tmp_path / "routing" / "step-000004.parquet"
    inode = os.stat(replaced).st_ino
    stale = replaced.with_name("step-000004.0-of-2.parquet")  # of a training that had two processes
    stale.write_bytes(b"")
    resumed = with_snapshots(make_trainer(tmp_path / "out", **settings), tmp_path / "routing")
    with pytest.warns(UserWarning, match="steps 4 to 4 of an earlier training"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert os.stat(replaced).st_ino != inode and not stale.exists()
    after = open_snapshots(tmp_path / "routing")
    assert all(after[step].table().equals(table) for step, table in before.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_snapshots(make_trainer(tmp_path / "other"), tmp_path / "fresh").train()


def ranks_train(folder: str) -> tuple[dict, dict, list[dict]]:
    """The weights after training with the callback and without it, and the log with it."""
    watched, alone = (make_trainer(f"{folder}/{name}", ddp_find_unused_parameters=False) for name in ("out", "alone"))
    with_snapshots(watched, f"{folder}/routing", cases=CASES, groups=GROUPS)
    weights = []
    for trainer in (watched, alone):
        torch.manual_seed(0)
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert dist.get_world_size() == 2
    return (*weights, watched.state.log_history)


@pytest.mark.slow
def test_two_processes(tmp_path):
    (ours, theirs, logs), (_, _, logs_1) = run_ranks(2, ranks_train, folder=str(tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert files(tmp_path / "routing") == [
        f"step-00000{step}.{rank}-of-2.parquet" for step in (2, 4) for rank in (0, 1)
    ]
    # Of rows 0 1 | 2 3 | 4 the second round is filled up from the start: 4 0 | 1 2.
    record = open_snapshots(tmp_path / "routing")["4"]
    first = [set(RoutingRecord.open(path).table(["case"])["case"].to_pylist()) for path in record.paths]
    assert first == [{CASES[number] for number in own} for own in ((0, 1, 4), (1, 2, 3))]
    model = make_model()
    model.load_state_dict(ours)
    with record_routing(model, tmp_path / "alone.parquet", cases=CASES, groups=GROUPS), torch.no_grad():
        for row in HELD_OUT:
            model.eval()(**collate([row]))
    alone = RoutingRecord.open(tmp_path / "alone.parquet")
    assert {tuple(row.values()) for row in record.table(ROUTES).to_pylist()} == {
        tuple(row.values()) for row in alone.table(ROUTES).to_pylist()
    }
    counted = record.count(["layer", "expert"])
    entry, entry_1 = ([e for e in each if "eval_max_load" in e][-1] for each in (logs, logs_1))
    assert entry["eval_max_load"] == pytest.approx(max(counted["count"].to_pylist()) / record.facts.tokens)
    assert entry["eval_max_load"] == entry_1["eval_max_load"]
    assert entry["eval_balance_loss"] == entry_1["eval_balance_loss"]
