"""Deduplication's command line: lines pass through, the account adds up, batches go on from a saved state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.deduplication import main as benchmark
from benchmarks.instances import generated_instances
from examples.echovlm.corpus.__main__ import main

ROW = {"id": "1", "question": "有无异常?", "answer": "未见异常。", "language": "zh"}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(number: int) -> list[dict]:
    instances = generated_instances(number)
    names = ("id", "question", "answer", "language")
    return [{**{name: getattr(i, name) for name in names}, "template": n % 21} for n, i in enumerate(instances)]


def deduplicate(source: Path, out: Path, *options: object) -> int:
    return main(["deduplicate", str(source), "--out", str(out), *map(str, options)])


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def dropped_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]


def kept_of(folder: Path) -> str:
    return (folder / "instances.jsonl").read_text(encoding="utf-8")


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert deduplicate(*arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("options", [["--method", "rouge-l"], ["--method", "simhash", "--distance", "9"]], ids=str)
def test_what_is_kept_is_untouched_and_what_is_dropped_is_accounted_for(tmp_path: Path, options, capsys) -> None:
    rows = rows_of(500)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    assert deduplicate(source, out, *options, "--against", "kept") == 0
    manifest, dropped = manifest_of(out), {drop["id"]: drop for drop in dropped_of(out)}
    assert 0 < len(dropped) < len(rows)
    lines = source.read_text(encoding="utf-8").splitlines()
    assert kept_of(out).splitlines() == [
        line for line, row in zip(lines, rows, strict=True) if row["id"] not in dropped
    ]
    assert manifest["given"] == len(rows) == manifest["kept"] + sum(manifest["dropped"].values())
    order = {row["id"]: n for n, row in enumerate(rows)}
    for name, drop in dropped.items():
        assert order[drop["duplicate_of"]] < order[name] and drop["duplicate_of"] not in dropped
        assert 0.7 < drop["score"] <= 1 if "rouge-l" in options else drop["score"] in range(10)
        assert drop["reason"] in manifest["dropped"] and drop["language"] == rows[order[name]]["language"]
    settings = manifest["settings"]
    assert settings["against"] == "any kept instance" and settings["tokenizer"] == "character"
    assert ("above", 0.7) in settings.items() if "rouge-l" in options else settings["features"] == "word-2"
    assert f"500 given, {500 - len(dropped)} kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [[], ["--against", "kept"], ["--method", "simhash", "--distance", "9"], ["--tokenizer", "jieba"]]
)
def test_batches_with_a_state_give_what_one_run_gives(tmp_path: Path, options: list[str]) -> None:
    rows = rows_of(600)
    deduplicate(write(tmp_path / "in.jsonl", rows), tmp_path / "whole", *options)
    state, kept, dropped = tmp_path / "seen.npz", "", []
    for n, part in enumerate((rows[:250], rows[250:251], rows[251:])):
        out = tmp_path / str(n)
        assert deduplicate(write(tmp_path / f"{n}.jsonl", part), out, "--state", state, *options) == 0
        assert manifest_of(out)["earlier instances"] == (0, 250, 251)[n]
        kept += kept_of(out)
        dropped += dropped_of(out)
    assert kept == kept_of(tmp_path / "whole")
    assert dropped == dropped_of(tmp_path / "whole")


def test_an_instance_without_tokens_is_kept_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{**ROW, "id": name, "question": "?", "answer": ""} for name in "ab"])
    assert deduplicate(source, tmp_path / "out") == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["kept without tokens"] == manifest["kept"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", ":1: got [1]; expected an object with id, question, answer, language"),
        (b'\n{"id": "1"', ":2: not JSON: "),
        (b"\xff\xfe", ":1: not UTF-8"),
        (b"1" * 5000, ":1: not JSON: "),
        (json.dumps({**ROW, "answer": 7}).encode(), ":1: field 'answer': got 7; expected a string"),
        (json.dumps({"id": "1"}).encode(), ":1: field 'question': got nothing; expected a string"),
        (json.dumps({**ROW, "language": "de"}).encode(), ":1: field 'language': got 'de'; expected one of en, zh"),
        ((json.dumps(ROW) + "\n" + json.dumps(ROW)).encode(), ":2: field 'id': got '1', which came before"),
    ],
)
def test_a_faulty_line_is_named_and_nothing_is_written(tmp_path: Path, content: bytes, message: str, capsys) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    state = tmp_path / "seen.npz"
    assert f"error: {source}{message}" in error_of(capsys, source, tmp_path / "out", "--state", state)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["in.jsonl"]


def test_a_byte_order_mark_and_a_surrogate_pass(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    line = '{"id": "\\ud800", "question": "a\\ud800", "answer": "b", "language": "en"}'
    source.write_text(line, encoding="utf-8-sig")
    for method in ("rouge-l", "simhash"):
        assert deduplicate(source, tmp_path / method, "--method", method, "--state", f"{source}.{method}") == 0
        assert kept_of(tmp_path / method) == line + "\n"


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys) -> None:
    source, out, state = write(tmp_path / "instances.jsonl", [ROW]), tmp_path / "out", tmp_path / "seen.npz"
    assert "name another folder" in error_of(capsys, source, tmp_path)
    assert "nowhere.jsonl: No such file" in error_of(capsys, tmp_path / "nowhere.jsonl", out)
    assert "--distance: it means nothing to --method rouge-l" in error_of(capsys, source, out, "--distance", 3)
    assert "threshold: got 7.0" in error_of(capsys, source, out, "--threshold", 7)
    assert "exists" in error_of(capsys, source, source)
    assert deduplicate(source, out, "--state", state) == 0
    capsys.readouterr()
    other = error_of(capsys, source, out, "--state", state, "--against", "kept")
    assert "made with {'against': 'any prior instance'}" in other
    assert "field 'id': got '1', which came before" in error_of(capsys, source, out, "--state", state)
    whole = state.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no state"):
        state.write_bytes(damaged)
        assert "no saved state, or damaged" in error_of(capsys, source, out, "--state", state)


def test_the_benchmark_writes_its_page(tmp_path: Path) -> None:
    assert benchmark(["--sizes", "200", "400", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "deduplication.md").read_text(encoding="utf-8")
    assert "ROUGE-L > 0.7, any kept" in page and "| 400 |" in page and " h, " in page
