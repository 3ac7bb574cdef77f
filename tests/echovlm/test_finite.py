"""A loss that is not finite: the run stops, or leaves the step out as if it never was; its cases are written down."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from cpu_fsdp import shard_on_cpus
from distributed import run_ranks
from echovlm.recipe_parts import collator, example, small_config, tokenizer

from examples.echovlm import training
from examples.echovlm.config import EngineConfig
from examples.echovlm.engines import forget_engine
from examples.echovlm.families import build_model
from examples.echovlm.finite import PATIENCE
from moe_adapter import MoEAdapterError, inject_dual_path_moe, set_stage
from moe_adapter.sharding import whole

BAD = "bad"  # the case whose pixels are NaN
CASES = ["a", "b", "c", "d", BAD, "e", "f", "g"]


class NaNPixels:
    """The collator; a batch with the bad case has NaN among its pixels."""

    def __call__(self, items):
        batch = collator()(items)
        if any(item.case_id == BAD for item in items):
            batch["pixel_values"][0, 0] = float("nan")
        return batch


def run(folder: Path, on_nan: str, engine: dict, accumulation: int, cases: list[str] = CASES) -> list[dict]:
    """Each step's weights, optimizer state and learning rate, in a training on the cases in their order."""
    config = small_config(run={"learning_rate": 1e-2, "accumulation": accumulation, "epochs": 1}, on_nan=on_nan)
    config = dataclasses.replace(config, engine=EngineConfig(**engine))
    forget_engine()  # of a run before this one
    torch.manual_seed(0)
    model = inject_dual_path_moe(build_model(config, tokenizer()), **config.moe)
    set_stage(model, 1)
    data = [dataclasses.replace(example(), case_id=name) for name in cases]
    trainer = training._trainer(model, data, NaNPixels(), config.stage1, config, folder)
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(data)
    steps: list[dict] = []
    note = trainer._maybe_log_save_evaluate

    def keep(*args, **kwargs):
        weights = {name: whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}
        steps.append({"weights": weights, "optimizer": optimizer_state(trainer), "rate": trainer._get_learning_rate()})
        note(*args, **kwargs)

    trainer._maybe_log_save_evaluate = keep
    trainer.train()
    return steps[:-1]  # the last call is the epoch's


def optimizer_state(trainer) -> list[torch.Tensor]:
    states = trainer.optimizer.state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return [whole(tensor).clone() for tensor in tensors]


def same(before: dict, after: dict) -> bool:
    pairs = [*zip(before["weights"].values(), after["weights"].values(), strict=True)]
    pairs += zip(before["optimizer"], after["optimizer"], strict=True)
    return before["rate"] == after["rate"] and all(torch.equal(a, b) for a, b in pairs)


def check(steps: list[dict], bad: int) -> None:
    """That the step at index `bad`, and no other, has left everything as it was."""
    unchanged = [i for i in range(1, len(steps)) if same(steps[i - 1], steps[i])]
    assert unchanged == [bad]
    assert all(torch.isfinite(value).all() for value in steps[-1]["weights"].values())


def notes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / training.NOTES).read_text().splitlines()]


@pytest.mark.parametrize(("accumulation", "bad"), [(1, 4), (2, 2)])
def test_a_step_is_left_out_whole(tmp_path: Path, accumulation: int, bad: int) -> None:
    check(run(tmp_path, "skip", {}, accumulation), bad)
    assert notes(tmp_path) == [{"step": bad + 1, "losses": ["nan"], "cases": [BAD]}]


def test_a_run_stops(tmp_path: Path) -> None:
    with pytest.raises(MoEAdapterError, match=r"loss of step 5 is not finite.* on cases bad, see .*on_nan: skip"):
        run(tmp_path, "stop", {}, 1)
    assert notes(tmp_path) == [{"step": 5, "losses": ["nan"], "cases": [BAD]}]


def test_it_does_not_skip_for_ever(tmp_path: Path) -> None:
    with pytest.raises(MoEAdapterError, match=f"loss of step {PATIENCE + 1} is not finite"):
        run(tmp_path, "skip", {}, 1, [BAD] * (PATIENCE + 5))


def job(folder: Path, engine: dict, accumulation: int) -> tuple[int, str]:
    """On rank 1 alone the loss is not finite, in step 5 of 8, or 3 of 4: left out, and then to stop at."""
    cases = [name for number in range(8) for name in (f"even{number}", BAD if number == 4 else f"odd{number}")]
    shard_on_cpus()
    steps = run(folder / "skip", "skip", engine, accumulation, cases)
    check(steps, 4 // accumulation)
    with pytest.raises(MoEAdapterError) as stopped:
        run(folder / "stop", "stop", engine, accumulation, cases)
    return len(steps), str(stopped.value)


ENGINES = [
    pytest.param({}, 1, id="ddp", marks=pytest.mark.slow),
    *(
        pytest.param(engine, accumulation, id=f"{name} {accumulation}", marks=pytest.mark.slow)
        for name, engine in {
            "zero2": {"deepspeed": "zero2"},
            "zero3": {"deepspeed": "zero3"},
            "fsdp2": {"fsdp": True},
        }.items()
        for accumulation in (1, 2)
    ),
    pytest.param({}, 2, id="ddp 2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "accumulation"), ENGINES)
def test_ranks_stay_in_step(tmp_path: Path, engine: dict, accumulation: int) -> None:
    done = run_ranks(2, job, timeout=240, folder=tmp_path, engine=engine, accumulation=accumulation)
    assert done[0] == done[1] and done[0][0] == 8 // accumulation and "on cases bad" in done[0][1]
    for name in ("skip", "stop"):
        [note] = notes(tmp_path / name)
        assert note["step"] == 4 // accumulation + 1 and note["losses"][1] == "nan" and note["cases"] == [BAD]
        assert math.isfinite(float(note["losses"][0]))
