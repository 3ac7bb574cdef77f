"""Open sets, as tiny trees in the layout that a user downloads."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from echovlm.corpus.screens import tissue
from PIL import Image

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.importing.open_sets import read_open_set
from moe_adapter import MoEAdapterError


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tissue(40, 50, seed)).save(path)


def busi(root: Path) -> None:
    for kind, number in (("benign", 1), ("malignant", 1), ("normal", 1), ("benign", 2)):
        image(root / kind / f"{kind} ({number}).png")
        image(root / kind / f"{kind} ({number})_mask.png")
    image(root / "benign" / "benign (2)_mask_1.png")


def tn3k(root: Path) -> None:
    for part, count in (("trainval", 3), ("test", 2)):
        for i in range(count):
            image(root / f"{part}-image" / f"{i:04}.jpg")
            image(root / f"{part}-mask" / f"{i:04}.jpg")


def camus(root: Path) -> None:
    for number in (1, 2):
        name = f"patient{number:04}"
        (root / name).mkdir(parents=True)
        for view in ("2CH", "4CH"):
            cine = np.zeros((50, 40, 6), np.uint8)  # columns, rows, frames
            cine[:, 10] = 10 * np.arange(6)
            for content in ("half_sequence", "half_sequence_gt", "ED"):
                nibabel.Nifti1Image(cine, np.eye(4)).to_filename(root / name / f"{name}_{view}_{content}.nii.gz")
            (root / name / f"Info_{view}.cfg").write_text("ED: 1\nES: 6\nSex: F\nAge: 56\nEF: 55.5\n")


def echonet(root: Path) -> None:
    (root / "Videos").mkdir(parents=True)
    lines = ["FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split"]
    for i in range(2):
        video = cv2.VideoWriter(str(root / "Videos" / f"0X{i}.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 50, (112, 112))
        for seed in range(5):
            video.write(np.repeat(tissue(112, 112, seed)[..., None], 3, axis=-1))
        video.release()
        lines.append(f"0X{i},{60.4 + i},20,50,112,112,50,5,TRAIN")
    lines.append("0X9,50,20,50,112,112,50,5,TEST")  # listed, and not downloaded
    (root / "FileList.csv").write_text("\n".join(lines))


def breastmnist(root: Path) -> None:
    root.mkdir(parents=True)
    for name, size in (("breastmnist", 28), ("breastmnist_64", 64)):
        parts = {"train": 3, "val": 1, "test": 2}
        arrays = {f"{part}_images": np.full((n, size, size), 90, np.uint8) for part, n in parts.items()}
        arrays |= {f"{part}_labels": np.arange(n).reshape(-1, 1) % 2 for part, n in parts.items()}
        np.savez(root / f"{name}.npz", **arrays)


SETS = {f.__name__: f for f in (busi, tn3k, camus, echonet, breastmnist)}


def imported(tmp_path: Path, name: str) -> tuple[list[Case], dict]:
    SETS[name](tmp_path / name)
    out = tmp_path / "raw"
    arguments = ["import", name, tmp_path / name, "--out", out, "--private", tmp_path / "private", "--frames", "3"]
    assert main(list(map(str, arguments))) == 0
    return read_cases(out / "cases.jsonl"), json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("name", "cases", "frames", "organ"),
    [
        ("busi", 4, 4, "breast"),
        ("tn3k", 5, 5, "thyroid"),
        ("camus", 2, 12, "heart"),
        ("echonet", 2, 6, "heart"),
        ("breastmnist", 6, 6, "breast"),
    ],
)
def test_a_set_comes_in_as_cases_to_show(tmp_path: Path, name: str, cases: int, frames: int, organ: str) -> None:
    found, told = imported(tmp_path, name)
    assert len(found) == cases == len({case.patient for case in found})
    assert sum(len(case.images) for case in found) == frames == told["frames"]
    assert {(case.organ, case.split, case.findings) for case in found} == {(organ, "show", "")}


def test_labels(tmp_path: Path) -> None:
    found, _ = imported(tmp_path, "busi")
    assert [(c.impression, c.attributes["lesion"]) for c in found] == [
        ("Benign breast mass.", "mass"),
        ("Benign breast mass.", "mass"),
        ("Malignant breast mass.", "mass"),
        ("Normal breast.", "none"),
    ]


def test_the_larger_breastmnist(tmp_path: Path) -> None:
    found, _ = imported(tmp_path, "breastmnist")
    assert Image.open(tmp_path / "raw" / found[0].images[0]).size == (64, 64)
    assert [case.impression[:6] for case in found] == ["Malign", "Normal", "Malign", "Malign", "Malign", "Normal"]


def test_camus_lies_upright_and_keeps_no_age(tmp_path: Path) -> None:
    found, _ = imported(tmp_path, "camus")
    frames = [np.asarray(Image.open(tmp_path / "raw" / image)) for image in found[0].images[:3]]
    assert [frame.shape for frame in frames] == [(40, 50, 3)] * 3
    assert [int(frame[10, 5, 0]) for frame in frames] == [0, 20, 50] and frames[2][9].max() == 0
    assert found[0].impression == "Left ventricular ejection fraction 56 %."
    written = b"".join(p.read_bytes() for p in (tmp_path / "raw").glob("*.json*"))
    assert b"patient0001" not in written and b"Sex" not in written


def test_a_listed_video_that_is_missing_is_a_case_dropped(tmp_path: Path) -> None:
    found, told = imported(tmp_path, "echonet")
    assert told["dropped"] == {"no readable image": 1}
    assert told["files left out"] == {"video cannot be decoded": 1}
    assert [case.impression for case in found] == [
        "Left ventricular ejection fraction 60 %.",
        "Left ventricular ejection fraction 61 %.",
    ]


def test_reports_that_a_user_has_for_a_set(tmp_path: Path) -> None:
    busi(tmp_path / "busi")
    (tmp_path / "r.csv").write_text("case,findings\nbenign (1),An oval mass is seen in the breast.\n")
    paths = ["--out", tmp_path / "raw", "--private", tmp_path / "private", "--reports", tmp_path / "r.csv"]
    assert main(["import", "busi", str(tmp_path / "busi"), *map(str, paths)]) == 0
    [case] = read_cases(tmp_path / "raw" / "cases.jsonl")
    assert case.split in ("train", "test") and case.attributes == {"lesion": "mass"}


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("camus", "patient0001/Info_2CH.cfg", b"EF: \xff\xfe"),
        ("echonet", "FileList.csv", b"Name,EF\na,55\n"),
        ("breastmnist", "breastmnist.npz", b"no archive"),
    ],
)
def test_a_set_that_cannot_be_read_is_named(tmp_path: Path, kind: str, name: str, content: bytes) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoEAdapterError, match=r"cannot be read .*; expected"):
        read_open_set(kind, tmp_path)
