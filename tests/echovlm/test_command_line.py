"""What the user got wrong costs one clear line and exit code 2, before anything is trained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.echovlm.__main__ import main


def _arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["--preset", "tiny", "--out", str(tmp_path / "out"), *more]


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    streams = capsys.readouterr()
    lines = streams.err.splitlines()
    assert len(lines) == 1, streams.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cases", "nowhere.jsonl"], "--cases nowhere.jsonl: no such file"),
        (["--base", "nowhere"], "--base nowhere: got no checkpoint directory"),
        (["--preset", "huge"], "unknown preset 'huge': use one of grid, paper, small, tiny"),
        (["--preset", "paper"], "this preset renders no cases: give your own with --cases"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, capsys, more: list[str], message: str) -> None:
    assert main(_arguments(tmp_path, *more)) == 2
    assert message in _one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    assert main(_arguments(tmp_path)) == 2
    assert "it is not empty" in _one_line(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_faulty_case_file_is_named_with_its_line(tmp_path, capsys) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"id": "1"}\n')
    assert main(_arguments(tmp_path, "--cases", str(cases))) == 2
    assert f"{cases}:1: field 'patient'" in _one_line(capsys)


def test_a_directory_that_is_no_vision_language_checkpoint_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main(_arguments(tmp_path, "--base", str(tmp_path))) == 2
    assert f"--base {tmp_path}: got no vision-language checkpoint" in _one_line(capsys)


LOADS_ALL = """
from examples.echovlm.__main__ import main
from examples.echovlm.command_line import load_recipe
load_recipe()
import bitsandbytes, torchao, deepspeed.accelerator
deepspeed.accelerator.get_accelerator()
"""


def test_other_libraries_keep_quiet() -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOADS_ALL], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout + run.stderr == ""
