"""The recipe's command under a launcher: two processes train and evaluate what one does, and one of them writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from distributed import ProcessesFailed, run_command
from echovlm.recipe_parts import write_inputs
from safetensors.torch import load_file

from examples.echovlm import engines
from examples.echovlm.__main__ import main
from examples.echovlm.config import EngineConfig
from moe_adapter.analysis.record import RoutingRecord

COMMAND = Path(__file__).parent / "command.py"
TORCHRUN = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", "2"]
# Two processes of one example each take a step where one process takes one of two; no dropout, which they draw apart.
PRESET = """
engine: {engine}
precision: fp32
stage1: {{batch_size: 1, accumulation: {accumulation}, epochs: 1}}
stage2: {{batch_size: 1, accumulation: {accumulation}, epochs: 0.05}}
evaluation: {{batch_size: 2}}
"""
ENGINES = [
    *(
        pytest.param(engine, id=name, marks=pytest.mark.slow)
        for name, engine in {
            "ddp": "{deepspeed: null}",
            "zero2": "{deepspeed: zero2}",
            "zero3": "{deepspeed: zero3}",
            "zero3 offload": "{deepspeed: zero3, offload: true}",
            "fsdp2": "{fsdp: true}",
        }.items()
    ),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments for base and cases, and a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = write_inputs(folder, PRESET.format(engine="{deepspeed: null}", accumulation=2))
    assert main([*arguments, "--out", str(folder / "run")]) == 0
    return arguments[2:], folder / "run"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(alone: tuple[list[str], Path], tmp_path: Path, engine: str) -> None:
    arguments, one = alone
    write_inputs(tmp_path, PRESET.format(engine=engine, accumulation=1))
    command = [COMMAND, "--preset", tmp_path / "mine.yaml", *arguments, "--out", tmp_path / "run"]
    said = run_command([*TORCHRUN, *command], timeout=400)
    two = tmp_path / "run"
    for stage in ("stage1", "stage2"):
        found, expected = _weights(two / stage), _weights(one / stage)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert {path.name.split("-")[0] for path in (two / stage).iterdir()} <= {"moe_adapter.json", "weights", "lora"}
    base, loss = (
        [json.loads((run / "evaluation" / "base" / f"{part}.json").read_text()) for run in (one, two)]
        for part in ("report", "general")
    )
    assert base[0] == base[1] and loss[1] == pytest.approx(loss[0], rel=1e-6)
    assert "on 2 processes" in (two / "report.md").read_text()
    assert said.count("== Stage II") == said.count("== Show cases") == 1
    cases = {scored["name"]: scored for scored in json.loads((two / "results.json").read_text())["models"]}
    assert RoutingRecord.open(two / "routing.parquet").facts.cases == len(cases["base"]["tasks"]["report"]["answers"])


@pytest.mark.slow
def test_phantoms_and_base_are_made_once_for_all(tmp_path: Path) -> None:
    write_inputs(tmp_path, "stage1: {epochs: 0.5}\n")
    command = ["-m", "examples.echovlm", "--preset", tmp_path / "mine.yaml", "--out", tmp_path / "run"]
    said = run_command([*TORCHRUN, *command], timeout=400)
    assert said.count("rendered phantoms") == 1 and said.count("the vision tower tells apart") == 1
    assert (tmp_path / "run" / "report.md").is_file()


@pytest.mark.slow
def test_an_error_ends_all_processes(alone: tuple[list[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "cases.jsonl"
    broken.write_text('{"id": "1"}\n')
    command = [*TORCHRUN, "-m", "examples.echovlm", "--preset", "tiny", "--cases", broken, "--out", tmp_path / "run"]
    with pytest.raises(ProcessesFailed, match=f"error: {broken}:1: field 'patient'"):
        run_command(command, timeout=120)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("engine", "keys"),
    [
        (EngineConfig(), set()),
        (EngineConfig(deepspeed="zero2"), {"deepspeed"}),
        (EngineConfig(deepspeed="zero3", offload=True), {"deepspeed"}),
        (EngineConfig(fsdp=True), {"fsdp", "fsdp_config"}),
    ],
)
def test_an_engine_is_for_launched_processes(monkeypatch: pytest.MonkeyPatch, engine: EngineConfig, keys: set) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert engines.engine_arguments(engine) == {}
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert set(engines.engine_arguments(engine)) == keys
    monkeypatch.setattr(engines, "BROUGHT", True)
    assert engines.engine_arguments(engine) == {}, "accelerate's launcher has brought one"
