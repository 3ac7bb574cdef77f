"""The case file: what is read is what was written, and every fault is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.echovlm.cases import Case, CaseError, Question, read_cases, write_cases

ROW = {
    "id": "1",
    "patient": "p1",
    "hospital": "a",
    "organ": "liver",
    "language": "zh",
    "images": ["frames/1.png"],
    "findings": "肝内见囊肿。",
    "split": "train",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.png").write_bytes(b"")
    return tmp_path


def write_rows(folder: Path, *rows: object) -> Path:
    path = folder / "cases.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def test_round_trip(folder: Path) -> None:
    full = Case(
        **{**ROW, "images": ("frames/1.png",)},
        impression="肝囊肿。",
        source="export",
        attributes={"lesion": "cyst", "size_mm": "14"},
        questions=(Question(question="有无异常?", answer="有。", dimension="diagnostic interpretation"),),
    )
    show = Case(**{**ROW, "id": "2", "patient": "p2", "images": ("frames/1.png",), "findings": "", "split": "show"})
    assert read_cases(write_cases(folder / "cases.jsonl", [full, show])) == [full, show]


def test_optional_fields_blank_lines_and_byte_order_mark(folder: Path) -> None:
    path = folder / "cases.jsonl"
    path.write_text(f"\n{json.dumps(ROW)}\n\n", encoding="utf-8-sig")
    [case] = read_cases(path)
    assert (case.impression, case.attributes, case.questions) == ("", {}, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["frames/2.png"]}, r":1: field 'images\[0\]': got 'frames/2.png', which is not there"),
        ({"images": []}, r"field 'images': got \[\]; expected at least one key frame"),
        ({"images": "frames/1.png"}, r"field 'images': got \"frames/1.png\"; expected a list"),
        ({"images": ["/frames/1.png"]}, r"expected a path relative to the case file's folder"),
        ({"language": "de"}, r"field 'language': got 'de'; expected one of en, zh"),
        ({"split": "validation"}, r"field 'split': got 'validation'; expected one of train, test, show"),
        ({"findings": " "}, r"field 'findings': .*set split to \"show\""),
        ({"patient": ""}, r"field 'patient': got ''; expected a name that is not empty"),
        ({"id": 7}, r"field 'id': got 7; expected a string"),
        ({"attributes": {"size_mm": 14}}, r"field 'attributes.size_mm': got 14; expected a string"),
        ({"findngs": "x"}, r"field 'findngs': not a field of a case; did you mean 'findings'\?"),
        ({"questions": [{"question": "?"}]}, r"field 'questions\[0\].answer': got nothing; expected a string"),
        ({"questions": ["?"]}, r"field 'questions\[0\]': got \"\?\"; expected an object"),
    ],
)
def test_a_faulty_line_names_line_and_field(folder: Path, change: dict, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        read_cases(write_rows(folder, {**ROW, **change}))


@pytest.mark.parametrize("name", ["id", "patient", "hospital", "organ", "language", "images", "findings", "split"])
def test_a_missing_field_is_named(folder: Path, name: str) -> None:
    row = {k: v for k, v in ROW.items() if k != name}
    with pytest.raises(CaseError, match=f":1: field '{name}': got nothing"):
        read_cases(write_rows(folder, row))


def test_the_same_id_twice(folder: Path) -> None:
    with pytest.raises(CaseError, match=r":2: field 'id': got '1', already used on line 1"):
        read_cases(write_rows(folder, ROW, ROW))


def test_a_patient_in_two_splits(folder: Path) -> None:
    with pytest.raises(CaseError, match=r":2: field 'split': got 'test' for patient 'p1', who is in 'train' on line 1"):
        read_cases(write_rows(folder, ROW, {**ROW, "id": "2", "split": "test"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no cases"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"id": "1"', "cases.jsonl:1: not JSON"),
        (b"[1]", r"field '\(line\)': got \[1\]; expected an object"),
    ],
)
def test_a_file_that_is_no_case_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    with pytest.raises(CaseError, match=message):
        read_cases(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="No such file"):
        read_cases(tmp_path / "cases.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder: Path) -> None:
    path = write_cases(folder / "cases.jsonl", [Case(**{**ROW, "images": ("frames/1.png",)})])
    before = path.read_bytes()

    def cases():
        yield from read_cases(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cases(path, cases())
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["cases.jsonl", "frames"]


def test_the_documented_example_is_a_case(folder: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "cases.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    row = json.loads(example)
    for image in row["images"]:
        (folder / image).write_bytes(b"")
    [case] = read_cases(write_rows(folder, row))
    assert case.questions[0].answer == "The left side."
