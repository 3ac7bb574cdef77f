"""Data-parallel engines, on two real processes: after 20 steps they hold what one process has that accumulates."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from engines import ENGINES, RANKS, RATE, STEPS, train, train_all

CASES = ("uneven", "disjoint", "padding")
SAMPLE = [dict(stage=1, case="uneven"), dict(stage=2, case="disjoint"), dict(stage=1, case="padding")]
MATRIX = [dict(stage=stage, case=case, accumulation=2) for stage in (1, 2) for case in CASES]
OWN_LOSS = dict(stage=1, case="uneven", mixin=True, arguments=dict(label_smoothing_factor=0.1))
BF16 = [dict(stage=stage, case="uneven", bf16=True) for stage in (1, 2)]


def errors(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], least: float = 0) -> dict[str, float]:
    """Of each parameter's movement, by norm, over the reference's, or over `least` an element where that is larger."""
    assert found.keys() == reference.keys()
    sizes = {name: max(value.norm(), least * value.numel() ** 0.5) for name, value in reference.items()}
    return {name: float((found[name] - value).norm() / sizes[name]) for name, value in reference.items()}


def check(engine: str, runs: list[dict], tolerance: float) -> None:
    """Each rank's movement of each parameter against that of one process."""
    expected = [train(engine, **run) for run in runs]
    found = run_ranks(RANKS, train_all, timeout=400, engine=engine, runs=runs)
    for rank, movements in enumerate(found):
        for run, movement, reference in zip(runs, movements, expected, strict=True):
            for name, error in errors(movement, reference).items():
                assert error < tolerance, f"{run}, rank {rank}, {name}: relative error {error:.1e}"


@pytest.mark.parametrize("engine", [pytest.param(e, marks=pytest.mark.slow) if e == "zero3" else e for e in ENGINES])
def test_equals_one_process(engine):
    check(engine, [*SAMPLE, OWN_LOSS] if engine == "ddp" else SAMPLE, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_equals_one_process_in_every_case(engine):
    """Label smoothing not under FSDP2: transformers knows by a class's name, which FSDP2 changes, to shift labels."""
    check(engine, MATRIX if engine == "fsdp2" else [*MATRIX, OWN_LOSS], 1e-3)


@pytest.mark.slow
def test_bf16_of_autocast_equals_one_process():
    check("ddp", BF16, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "ddp"])
def test_bf16_with_float32_masters(engine):
    """DeepSpeed and FSDP2 cast what the passes read, autocast the products alone, and FSDP2 sums gradients in bf16.

    So they are held against float32: no further off than 0.3, or than twice what autocast costs one process where that
    is more, as it is for the first of a LoRA's maps, whose gradient begins at zero. A scalar that goes to and fro ends
    near its start, where rounding is all there is: there a tenth of the way that it could have gone counts.
    """
    least = 0.1 * RATE * STEPS / 2
    exact, alone = ([train(engine, **{**run, "bf16": bf16}) for run in BF16] for bf16 in (False, True))
    found = run_ranks(RANKS, train_all, timeout=400, engine=engine, runs=BF16)
    for rank, movements in enumerate(found):
        for run, movement, reference, one in zip(BF16, movements, exact, alone, strict=True):
            own = errors(one, reference, least)
            for name, error in errors(movement, reference, least).items():
                assert error < max(0.3, 2 * own[name]), (
                    f"{run}, rank {rank}, {name}: {error:.2f}, alone {own[name]:.2f}"
                )
