"""Image and text filter: each decision by its reason, on real files one by one, and counts that add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from echovlm.corpus.screens import region, screen, tissue, write_dicom
from PIL import Image
from pydicom.data import get_testdata_file

from examples.echovlm.cases import Case, read_cases, write_cases
from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.image_filter import NONE, SEVERAL, display
from examples.echovlm.corpus.importing.dicom import read_file
from examples.echovlm.corpus.regions import Region, displays
from examples.echovlm.corpus.scan import panels
from examples.echovlm.corpus.text_filter import OTHER, SILENT, UNKNOWN, unrelated
from examples.echovlm.phantom import generate_cases

ONE, TWO = (120, 60, 520, 400), ((40, 60, 300, 400), (320, 60, 580, 400))


def case(**values: object) -> Case:
    usual = dict(id="1", patient="p", hospital="", organ="breast", language="en", images=("1.png",), split="train")
    return Case(**{**usual, "findings": "A cyst is seen in the left breast.", **values})


def verdict(tmp_path: Path, path: Path, frames: int = 1) -> set[tuple[str, str]]:
    found = set()
    for picture in read_file(path, frames, b"salt"):
        picture.image.save(tmp_path / "frame.png")
        found.add(display(case(), picture.layout, tmp_path / "frame.png"))
    return found


@pytest.mark.parametrize(
    ("boxes", "data", "count"),
    [
        ([ONE], [1], 1),
        (TWO, [1, 1], 2),
        ([ONE, (200, 100, 400, 300)], [1, 2], 1),  # a colour box on its tissue
        ([ONE, (120, 410, 520, 470)], [1, 0xA], 1),  # an ECG below
        ([ONE, (600, 60, 620, 400), (620, 60, 630, 400)], [1, 0xD, 0xE], 1),  # grey and colour bars
        ([TWO[0], TWO[1]], [1, 2], 2),  # tissue beside its colour flow
        ([ONE], [0xD], 0),
        ([], [], 0),
    ],
)
def test_displays_that_the_tag_states(boxes: list, data: list, count: int) -> None:
    assert len(displays([Region(1, kind, *box) for box, kind in zip(boxes, data, strict=True)])) == count


def test_a_spectrum_is_no_scan() -> None:
    assert not Region(3, 1, 0, 0, 10, 10).shows_scan and not Region(2, 1, 0, 0, 10, 10).shows_scan


@pytest.mark.parametrize(
    ("boxes", "stated", "expected"),
    [
        ([ONE], [ONE], ("", "tag")),
        (TWO, TWO, (SEVERAL, "tag")),
        ([ONE], None, ("", "pixels")),
        (TWO, None, (SEVERAL, "pixels")),
        (((40, 60, 310, 400), (310, 60, 580, 400)), None, (SEVERAL, "pixels")),  # they touch
        ([ONE], [(120, 60, 800, 500)], ("", "stale tag, pixels")),
        (TWO, [(120, 60, 800, 500)], (SEVERAL, "stale tag, pixels")),
        ([], None, (NONE, "pixels")),
    ],
)
def test_one_scan_by_tag_or_pixels(tmp_path: Path, boxes: list, stated: list | None, expected: tuple) -> None:
    items = {} if stated is None else {"SequenceOfUltrasoundRegions": [region(box) for box in stated]}
    path = write_dicom(tmp_path / "1.dcm", screen(boxes), **items)
    assert verdict(tmp_path, path) == {expected}


@pytest.mark.parametrize("seed", range(4))
def test_dark_findings_are_no_gap_between_panels(seed: int) -> None:
    """A cyst, a shadow down to the bottom, and a colour box with its frame, each in one scan."""
    frame = screen([ONE])
    rows, columns = np.ogrid[:480, :640]
    frame[(rows - 200) ** 2 + (columns - 320 - 20 * seed) ** 2 < 80**2] = 3
    frame[240:400, 280 + 20 * seed : 330 + 20 * seed] = 2
    frame[100:300, [200, 420]] = frame[[100, 300], 200:420] = 255
    assert panels(frame) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("examples_palette.dcm", ("", "stale tag, pixels")),  # tissue and ECG, cropped since
        ("examples_ybr_color.dcm", ("", "stale tag, pixels")),
        ("examples_rgb_color.dcm", (SEVERAL, "pixels")),  # two scans that touch
        ("examples_jpeg2k.dcm", (SEVERAL, "pixels")),  # the same, larger
        ("ExplVR_BigEnd.dcm", ("", "pixels")),
        ("gdcm-US-ALOKA-16.dcm", (SEVERAL, "tag")),  # two scans side by side, and a grey bar
        ("gdcm-US-ALOKA-16_big.dcm", (SEVERAL, "tag")),
        ("OBXXXX1A.dcm", ("", "stale tag, pixels")),  # tissue and ECG; the tissue's box is a pixel too wide
        ("OBXXXX1A_2frame.dcm", ("", "stale tag, pixels")),
        ("OBXXXX1A_expb.dcm", ("", "stale tag, pixels")),
        ("OBXXXX1A_expb_2frame.dcm", ("", "stale tag, pixels")),
        ("OBXXXX1A_rle.dcm", ("", "stale tag, pixels")),
        ("OBXXXX1A_rle_2frame.dcm", ("", "stale tag, pixels")),
        ("JPGLosslessP14SV1_1s_1f_8b.dcm", ("", "tag")),
        ("color3d_jpeg_baseline.dcm", ("", "tag")),
        ("color-pl.dcm", ("", "pixels")),
        ("color-px.dcm", ("", "pixels")),
        ("US1_J2KI.dcm", (SEVERAL, "pixels")),
        ("US1_J2KR.dcm", (SEVERAL, "pixels")),
        ("US1_UNCI.dcm", (SEVERAL, "pixels")),
        ("US1_UNCR.dcm", (SEVERAL, "pixels")),
    ],
)
def test_decisions_on_the_files_of_pydicom(tmp_path: Path, name: str, expected: tuple[str, str]) -> None:
    """pydicom's own, and those of pydicom-data."""
    path = get_testdata_file(name, download=False)
    assert path, f"{name}: neither in pydicom nor in pydicom-data"
    assert verdict(tmp_path, Path(path), frames=2) == {expected}


def test_phantoms_are_single(tmp_path: Path) -> None:
    cases = read_cases(generate_cases(tmp_path, cases_per_organ=3, frames=1, size=224))
    seen = {case.id: panels(np.asarray(Image.open(tmp_path / case.images[0]).convert("RGB"))) for case in cases}
    assert {id for id, count in seen.items() if count != 1} == set()


def steps(tmp_path: Path, cases: list[Case], *arguments: str) -> tuple[list[Case], dict, list[dict]]:
    """Run a step on these cases, whose images exist."""
    for image in {image for case in cases for image in case.images}:
        if not (tmp_path / image).exists():
            Image.fromarray(screen([ONE])).save(tmp_path / image)
    write_cases(tmp_path / "cases.jsonl", cases)
    out = tmp_path / "out"
    assert main([arguments[0], str(tmp_path), "--out", str(out), *arguments[1:]]) == 0
    told = json.loads((out / "manifest.json").read_text())
    assert told["given"] == told["kept"] + sum(told["dropped"].values())
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return (read_cases(out / "cases.jsonl") if (out / "cases.jsonl").read_text() else []), told, dropped


def test_images_are_filtered_one_by_one_and_cases_without_any_go(tmp_path: Path) -> None:
    Image.fromarray(screen(TWO)).save(tmp_path / "dual.png")
    given = [
        case(id="a", images=("1.png", "dual.png", "2.png")),
        case(id="b", images=("dual.png",)),
        case(id="c", findings="The liver and both kidneys are normal."),
        case(id="d", findings="", split="show", patient="q"),
    ]
    kept, told, dropped = steps(tmp_path, given, "filter-images")
    assert [(c.id, len(c.images)) for c in kept] == [("a", 2), ("d", 1)]
    assert told["given"] == 6 and told["dropped"] == {SEVERAL: 2, "several anatomical regions": 1}
    assert told["cases"] == {"given": 4, "kept": 2, "dropped": {"no image left": 2}}
    assert [(d["id"], d["image"]) for d in dropped] == [("a", 1), ("b", 0), ("c", 0)]


def test_each_filter_by_its_name(tmp_path: Path) -> None:
    Image.fromarray(screen(TWO)).save(tmp_path / "dual.png")
    given = [case(id="b", images=("dual.png",)), case(id="c", findings="The liver and both kidneys are normal.")]
    kept, _, _ = steps(tmp_path, given, "filter-images", "--filters", "anatomy")
    assert [c.id for c in kept] == ["b"]


def test_organs_of_the_header_count(tmp_path: Path) -> None:
    row = {"image": "1.png", "regions": None, "burned_in": "unknown", "organs": ["liver"], "frame": 0, "frames": 1}
    (tmp_path / "layouts.jsonl").write_text(json.dumps(row) + "\n")
    kept, told, _ = steps(tmp_path, [case(), case(id="2", images=("2.png",))], "filter-images")
    assert [c.id for c in kept] == ["2"] and told["dropped"] == {"several anatomical regions": 1}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, ""),
        ({"findings": "Normal study."}, ""),
        ({"findings": "No lesion in the liver."}, OTHER),
        ({"findings": "肝内见囊肿。", "language": "zh"}, OTHER),
        ({"findings": "乳腺见囊肿。", "language": "zh"}, ""),
        ({"findings": "Seen.", "impression": "Breast."}, SILENT),
        ({"organ": "unknown"}, UNKNOWN),
        ({"organ": "knee"}, ""),  # not of our words: believed
        ({"findings": "", "split": "show", "organ": "unknown"}, ""),
    ],
)
def test_reports_on_another_region(values: dict, reason: str) -> None:
    assert unrelated(case(**values)) == reason


def test_the_text_filter_adds_up(tmp_path: Path) -> None:
    given = [case(id="a"), case(id="b", findings="No lesion in the liver."), case(id="c", organ="unknown")]
    kept, told, dropped = steps(tmp_path, given, "filter-texts")
    assert [c.id for c in kept] == ["a"] and kept[0].images == ("../1.png",)
    assert told["dropped"] == {OTHER: 1, UNKNOWN: 1} and {d["id"] for d in dropped} == {"b", "c"}


def test_several_inputs_become_one(tmp_path: Path) -> None:
    for name, split in (("x", "train"), ("y", "train"), ("z", "test")):
        (tmp_path / name).mkdir()
        Image.fromarray(screen([ONE])).save(tmp_path / name / "1.png")
        write_cases(tmp_path / name / "cases.jsonl", [case(id=name, split=split)])
    folders = {name: str(tmp_path / name) for name in "xyz"}
    assert main(["filter-texts", folders["x"], folders["y"], "--out", str(tmp_path / "o")]) == 0
    assert [c.images for c in read_cases(tmp_path / "o" / "cases.jsonl")] == [("../x/1.png",), ("../y/1.png",)]


def test_inputs_that_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, split in (("x", "train"), ("z", "test")):
        (tmp_path / name).mkdir()
        Image.fromarray(tissue(30, 30)).save(tmp_path / name / "1.png")
        write_cases(tmp_path / name / "cases.jsonl", [case(id=name, split=split)])
    for second, message in (("x", "case 'x' is in two of the inputs"), ("z", "patient 'p' is of 'train'")):
        assert main(["filter-texts", str(tmp_path / "x"), str(tmp_path / second), "--out", str(tmp_path / "o")]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    Image.fromarray(tissue(30, 30)).save(tmp_path / "1.png")
    write_cases(tmp_path / "cases.jsonl", [case()])
    assert main(["filter-texts", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "it is not empty" in capsys.readouterr().err
