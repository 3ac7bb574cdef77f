"""A run that is killed and resumed ends where one that ran through ends, to the bit."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from distributed import ProcessesFailed, run_command
from echovlm.recipe_parts import write_inputs

from examples.echovlm.__main__ import main
from examples.echovlm.config import ACCOUNT

# Two passes through stage I, so that a run may be killed in its second, and dropout in stage II.
PRESET = """
engine: {engine}
precision: fp32
lora: {{dropout: 0.2}}
stage1: {{batching: {batching}, batch_size: 1, epochs: 2, save_steps: 2}}
stage2: {{batching: packed, batch_size: 2, epochs: 0.2, save_steps: 2}}
"""
ALONE = [sys.executable]
TORCHRUN = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", "2"]
COMMAND = Path(__file__).parent / "command.py"


def _run(launcher: list, arguments: list[str], out: Path, *more: str) -> str:
    return run_command([*launcher, COMMAND, *arguments, "--out", out, *more], timeout=400)


def _die(launcher: list, arguments: list[str], out: Path, stage: str, step: int, *more: str) -> None:
    with pytest.raises(ProcessesFailed, match=r"SIGKILL|: -9"):
        run_command([*launcher, COMMAND, *arguments, "--out", out, *more], timeout=400, DIE_IN=f"{stage}:{step}")
    assert list((out / stage).glob("checkpoint-*")) and not (out / stage / "moe_adapter.json").exists()


def _weights(out: Path) -> dict[str, bytes]:
    """The files of both stages' adapters, which are all that is left in their folders."""
    files = [path for stage in ("stage1", "stage2") for path in (out / stage).rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files if path.suffix == ".safetensors"}


def _kill_in_both_stages(tmp_path: Path, launcher: list, engine: str, batching: str, steps: tuple[int, int]) -> None:
    """One run that is killed in stage I, resumed, killed in stage II and resumed, beside one that runs through."""
    arguments = write_inputs(tmp_path, PRESET.format(engine=engine, batching=batching))
    rng = random.Random(f"{engine} {batching}")
    first, second = (rng.randrange(2, last) for last in steps)
    print(f"killed in step {first} of stage I and in step {second} of stage II")
    _die(launcher, arguments, tmp_path / "killed", "stage1", first)
    _die(launcher, arguments, tmp_path / "killed", "stage2", second, "--resume")
    _run(launcher, arguments, tmp_path / "killed", "--resume")
    if launcher == ALONE:
        assert main([*arguments, "--out", str(tmp_path / "through")]) == 0
    else:
        _run(launcher, arguments, tmp_path / "through")
    found, expected = _weights(tmp_path / "killed"), _weights(tmp_path / "through")
    assert len(expected) == 3 and found == expected
    assert _found(tmp_path / "killed") == _found(tmp_path / "through")


def _found(out: Path) -> dict:
    """What the run found, and in which steps it told of it."""
    results = json.loads((out / "results.json").read_text())
    return results | {"seconds": None, "steps": list(json.loads((out / ACCOUNT).read_text())["lines"])}


def test_one_process(tmp_path: Path) -> None:
    _kill_in_both_stages(tmp_path, ALONE, "{deepspeed: null}", "plain", (24, 12))


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["plain", "grouped"])
@pytest.mark.parametrize("engine", ["{deepspeed: null}", "{deepspeed: zero2}", "{deepspeed: zero3}", "{fsdp: true}"])
def test_two_processes(tmp_path: Path, engine: str, batching: str) -> None:
    _kill_in_both_stages(tmp_path, TORCHRUN, engine, batching, (12, 6))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("finished")
    arguments = write_inputs(folder, "stage1: {epochs: 0.2}\nstage2: {epochs: 0.02}\n")
    assert main([*arguments, "--out", str(folder / "run")]) == 0
    return arguments, folder / "run"


def test_a_finished_run_resumes_to_the_same_report(finished, capsys) -> None:
    arguments, out = finished
    report, weights = (out / "report.md").read_text(), _weights(out)
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out.count("finished before") == 10
    assert (out / "report.md").read_text() == report and _weights(out) == weights


def test_another_preset_does_not_go_on_with_a_run(finished, capsys) -> None:
    arguments, out = finished
    preset = Path(arguments[1])
    other = preset.with_name("other.yaml")
    other.write_text(preset.read_text() + "seed: 7\n")
    assert main(["--preset", str(other), *arguments[2:], "--out", str(out), "--resume"]) == 2
    [line] = capsys.readouterr().err.splitlines()  # before anything is loaded
    assert "was started otherwise: seed: got 7, before 0" in line


def test_resume_begins_a_run_where_there_is_none_and_spares_other_folders(finished, tmp_path: Path, capsys) -> None:
    arguments, _ = finished
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("keep")
    assert main([*arguments, "--out", str(tmp_path / "other"), "--resume"]) == 2
    assert "it is not empty" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "new"), "--resume"]) == 0


def test_stage_2_starts_from_a_stage_1_of_another_run(finished, tmp_path: Path, capsys) -> None:
    arguments, out = finished
    given = ["--stage1", str(out / "stage1"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *given]) == 0
    assert f"taken over from {out / 'stage1'}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "stage1").exists()
    evaluated = [
        json.loads((run / "evaluation" / "stage I" / "report.json").read_text()) for run in (out, tmp_path / "run")
    ]
    assert evaluated[0] == evaluated[1]
    assert main([*arguments, "--stage1", str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    assert "--stage1" in capsys.readouterr().err
