"""Parquet: what comes back is what went in, and datasets reads it by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from echovlm.corpus.screens import tissue
from PIL import Image

from examples.echovlm.cases import Case, Question, read_cases, write_cases
from examples.echovlm.corpus.__main__ import main


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    for name in ("1.png", "2.jpg"):
        Image.fromarray(tissue(30, 40)).save(tmp_path / name)
    usual = dict(patient="p", hospital="", organ="liver", language="zh", findings="肝内见囊肿。", split="train")
    question = Question(question="?", answer="!", dimension="surveillance")
    return [
        Case(**usual, id="a/b", images=("1.png", "2.jpg"), attributes={"lesion": "cyst"}, questions=(question,)),
        Case(**usual, id="b", images=("1.png",), attributes={"size_mm": "14"}),
    ]


def test_there_and_back(tmp_path: Path, cases: list[Case]) -> None:
    write_cases(tmp_path / "cases.jsonl", cases)
    assert main(["pack", str(tmp_path), "--out", str(tmp_path / "c.parquet")]) == 0
    assert main(["unpack", str(tmp_path / "c.parquet"), "--out", str(tmp_path / "back")]) == 0
    back = read_cases(tmp_path / "back" / "cases.jsonl")
    assert [replace(case, images=()) for case in back] == [replace(case, images=()) for case in cases]
    for one, other in zip(back, cases, strict=True):
        for image, original in zip(one.images, other.images, strict=True):
            assert (tmp_path / "back" / image).read_bytes() == (tmp_path / original).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.png", "2.jpg", "back", "c.parquet", "cases.jsonl"]


def test_datasets_reads_frames_as_images(tmp_path: Path, cases: list[Case]) -> None:
    write_cases(tmp_path / "cases.jsonl", cases)
    assert main(["pack", str(tmp_path), "--out", str(tmp_path / "c.parquet")]) == 0
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "c.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows[0]["images"][0].size == (40, 30) and np.asarray(rows[0]["images"][0]).any()
    assert rows[1]["organ"] == "liver" and rows[0]["questions"][0]["dimension"] == "surveillance"


def test_another_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    assert main(["unpack", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "back")]) == 2
    assert "got no cases in Parquet" in capsys.readouterr().err
