"""Import: what comes in, under which case, and that nothing of a header comes out with it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from echovlm.corpus.screens import (
    INSTITUTION,
    NAME,
    SECRETS,
    header,
    region,
    screen,
    tissue,
    write_dicom,
    write_structured_report,
)
from PIL import Image

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.manifest import DROPPED, MANIFEST

OPEN_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
FINDINGS = "A 14 mm cyst is seen in the left breast."


def imported(tmp_path: Path, *arguments: object, code: int = 0) -> tuple[list[Case], dict, list[dict]]:
    out = tmp_path / "raw"
    assert main(["import", *map(str, arguments), "--out", str(out), "--private", str(tmp_path / "private")]) == code
    told = json.loads((out / MANIFEST).read_text())
    dropped = [json.loads(line) for line in (out / DROPPED).read_text().splitlines()]
    assert told["given"] == told["kept"] + sum(told["dropped"].values()) and len(dropped) == sum(
        told["dropped"].values()
    )
    return (read_cases(out / "cases.jsonl") if told["kept"] else []), told, dropped


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leaks(texts: dict[str, bytes], secrets: tuple[str, ...] = SECRETS) -> list[tuple[str, str]]:
    return [(name, s) for name, content in texts.items() for s in secrets if s.encode() in content.lower()]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Two studies of one patient with structured reports, one without, and what is no ultrasound."""
    root = tmp_path / "export"
    cine = np.stack([screen(), screen(((100, 60, 500, 400),)), screen(((80, 60, 480, 400),))])
    boxes = [region((120, 60, 519, 399)), region((620, 100, 629, 299), data=0xD)]
    write_dicom(root / "a" / "1.dcm", cine, header("1"), SequenceOfUltrasoundRegions=boxes, BurnedInAnnotation="NO")
    write_dicom(root / "a" / "2.dcm", screen(), header("1"))
    write_dicom(root / "b" / "1.dcm", screen(), header("2"))
    write_dicom(root / "c" / "1.dcm", screen(), header("3", patient="77"))
    texts = {"121070": f"{FINDINGS} Seen by Okonkwo at {INSTITUTION} with Quentin Zabriskie.", "121072": "Simple cyst."}
    write_structured_report(root / "a" / "report.dcm", texts | {"121060": "History: smoker."}, "1")
    write_structured_report(root / "b" / "report.dcm", {"121070": "左侧乳腺见囊肿。", "121077": "囊肿。"}, "2")
    write_structured_report(root / "d" / "report.dcm", {"121070": FINDINGS}, "4")
    shutil.copy(OPEN_FILES / "CT_small.dcm", root / "c" / "ct.dcm")
    (root / "readme.txt").write_text("Zabriskie")
    return root


def test_dicom_studies_with_their_structured_reports(tmp_path: Path, export: Path) -> None:
    cases, told, _ = imported(tmp_path, "dicom", export, "--frames", 2, "--hospital", "h1")
    assert [len(case.images) for case in cases] == [3, 1]
    first, second = cases
    assert first.findings == f"{FINDINGS} Seen by [name] at [institution] with [name]."
    assert first.impression == "Simple cyst." and "smoker" not in first.findings
    assert (second.findings, second.impression, second.language) == ("左侧乳腺见囊肿。", "囊肿。", "zh")
    assert first.patient == second.patient and first.id != second.id and first.split == second.split
    assert {case.organ for case in cases} == {"breast"} and {case.hospital for case in cases} == {"h1"}
    assert told["dropped"] == {"images without a report": 1, "report without images": 1}
    assert told["files left out"] == {"not DICOM": 1, "not ultrasound": 1}
    layouts = [json.loads(line) for line in (tmp_path / "raw" / "layouts.jsonl").read_text().splitlines()]
    assert [(row["frame"], row["frames"], row["burned_in"]) for row in layouts] == [
        (0, 3, "NO"),
        (2, 3, "NO"),
        (0, 1, "unknown"),
        (0, 1, "unknown"),
    ]
    assert [len(row["regions"] or ()) for row in layouts] == [2, 2, 0, 0]
    with Image.open(tmp_path / "raw" / first.images[1]) as image:
        assert np.array_equal(np.asarray(image), screen(((80, 60, 480, 400),)))


def test_nothing_of_a_header_reaches_an_output_or_a_log(
    tmp_path: Path, export: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    write_structured_report(export / "e" / "report.dcm", {"121070": FINDINGS}, "9")
    write_dicom(export / "e" / "2.dcm", screen(), header("9"), Rows=4096)
    broken = pydicom.dcmread(write_dicom(export / "e" / "1.dcm", screen(), header("9")))
    broken.add_new(0x00280008, "LO", NAME)  # NumberOfFrames
    broken.save_as(export / "e" / "1.dcm")
    with caplog.at_level(logging.DEBUG):
        _, told, _ = imported(tmp_path, "dicom", export)
    assert told["dropped"]["no readable image"] == 1
    assert {"header cannot be read": 1, "pixels cannot be decoded": 1}.items() <= told["files left out"].items()
    said = capfd.readouterr()
    logged = {"stdout": said.out.encode(), "stderr": said.err.encode(), "log": caplog.text.encode()}
    assert leaks(outputs(tmp_path / "raw") | logged) == []
    uids = [str(pydicom.dcmread(p, stop_before_pixels=True).StudyInstanceUID) for p in export.rglob("[12].dcm")]
    assert leaks(outputs(tmp_path / "raw") | logged, tuple(uids)) == []
    [journal] = (tmp_path / "private").glob("raw-*.jsonl")
    key = {row["key"]: row for row in map(json.loads, journal.read_text().splitlines())}
    case = read_cases(tmp_path / "raw" / "cases.jsonl")[0]
    assert key[case.id]["files"] == ["a/1.dcm", "a/2.dcm"], "whoever holds the originals finds them again"


def test_reports_of_a_table_by_accession_number(tmp_path: Path) -> None:
    root = tmp_path / "export"
    for study in ("1", "2", "3"):
        write_dicom(root / f"{study}.dcm", screen(), header(study, patient=study))
    table = tmp_path / "reports.csv"
    table.write_text(
        f'检查号,描述,诊断,部位,医院,患者\nA1,肝内见囊肿，{NAME.split("^")[0]}。,肝囊肿。,肝,某医院,x\nA2,"肝,正常",,,,\nA2,x,,,,\nA9,x,,,,\n',
        encoding="gb18030",
    )
    names = dict(case="检查号", findings="描述", impression="诊断", organ="部位", hospital="医院", patient="患者")
    columns = [argument for pair in names.items() for argument in ("--column", "=".join(pair))]
    cases, told, _ = imported(tmp_path, "dicom", root, "--reports", table, "--encoding", "gb18030", *columns)
    [case] = cases
    assert (case.organ, case.language, case.findings) == ("liver", "zh", "肝内见囊肿，[name]。")
    assert len(case.hospital) == 16 and "某" not in case.hospital
    assert told["dropped"] == {"several reports": 1, "images without a report": 1, "report without images": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case,text\n1,x\n", r"reports.csv:2: got no column 'findings'; .*--column findings="),
        ("case,findings\n,Zabriskie\n", r"reports.csv:2: column 'case' is empty"),
        ("case,findings,language\n1,Zabriskie,fr\n", r"reports.csv:2: column 'language': expected en or zh"),
    ],
)
def test_a_faulty_table_is_one_line_that_quotes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: str, message: str
) -> None:
    (tmp_path / "reports.csv").write_text(content)
    paths = ["--reports", tmp_path / "reports.csv", "--out", tmp_path / "raw", "--private", tmp_path / "private"]
    assert main(["import", "folders", str(tmp_path), *map(str, paths)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "Zabriskie" not in said
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folders", "nowhere"], "no such folder"),
        (["folders", ".", "--column", "findings"], "expected OURS=YOURS"),
        (["folders", ".", "--frames", "0"], "--frames: got 0"),
        (["folders", ".", "--test-share", "2"], "--test-share: got 2.0"),
        (["folders", ".", "--reports", "none.csv"], "No such file"),
        (["folders", ".", "--reports", "none.xlsx"], "ends in .csv or .jsonl"),
        (["busi", "."], "got nothing of BUSI"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", *arguments, "--out", "raw", "--private", "private"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def write_video(path: Path, frames: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30, (112, 112))
    for i in range(frames):
        video.write(np.full((112, 112, 3), (0, 0, 20 * i), np.uint8))  # red, as OpenCV has blue first
    video.release()
    return path


def test_folders_of_images_and_videos(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    exif = Image.Exif()
    exif[0x9C9B] = exif[0x010E] = "Zabriskie"
    for name in ("p1/e1/a.jpg", "p1/e1/b.PNG", "p1/e2/a.png", "p2/e3/a.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tissue(60, 80)).save(root / name, exif=exif, comment="Zabriskie")
    write_video(root / "p2" / "e3" / "cine.avi", 10)
    (root / "p1" / "e2" / "damaged.jpg").write_bytes(b"\xff\xd8 Zabriskie")
    (root / "p1" / "notes.doc").write_text("Zabriskie")
    rows = [{"case": "p1/e1", "findings": FINDINGS}, {"case": "e2", "findings": FINDINGS, "impression": "Cyst."}]
    rows += [{"case": "e3", "findings": "Left breast normal.", "language": "en", "name": "Smith"}]
    (tmp_path / "reports.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cases, told, _ = imported(tmp_path, "folders", root, "--reports", tmp_path / "reports.jsonl", "--frames", 3)
    assert [len(case.images) for case in cases] == [2, 1, 4]
    assert len({case.patient for case in cases}) == 2
    assert told["files left out"] == {"image cannot be decoded": 1, "neither image nor video": 1}
    assert leaks(outputs(tmp_path / "raw")) == []
    shades = [np.asarray(Image.open(tmp_path / "raw" / image))[50, 50] for image in cases[2].images[1:]]
    assert [int(shade[0]) for shade in shades] == pytest.approx([0, 80, 180], abs=6), "first, middle and last, as RGB"
    assert max(int(shade[2]) for shade in shades) < 12


def test_a_report_that_names_two_examinations_is_nobodys(tmp_path: Path) -> None:
    for name in ("p1/e1/a.png", "p2/e1/a.png"):
        (tmp_path / "scans" / name).parent.mkdir(parents=True)
        Image.fromarray(tissue(60, 80)).save(tmp_path / "scans" / name)
    (tmp_path / "r.csv").write_text(f"case,findings\ne1,{FINDINGS}\np2/e1,{FINDINGS}\n")
    cases, told, _ = imported(tmp_path, "folders", tmp_path / "scans", "--reports", tmp_path / "r.csv")
    assert len(cases) == 1
    assert told["dropped"] == {"images without a report": 1, "report that names several examinations": 1}


def test_the_same_private_folder_gives_the_same_names_and_splits(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / "scans" / f"p{i}").mkdir(parents=True)
        Image.fromarray(tissue(32, 32, i)).save(tmp_path / "scans" / f"p{i}" / "a.png")
    rows = [{"case": f"p{i}", "findings": FINDINGS} for i in range(12)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows[:6])))
    arguments = ("folders", tmp_path / "scans", "--reports", tmp_path / "r.jsonl", "--test-share", 0.5)
    before, _, _ = imported(tmp_path, *arguments)
    shutil.move(tmp_path / "raw", tmp_path / "before")
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    after, _, _ = imported(tmp_path, *arguments)
    assert all(case in after for case in before) and len(after) == 12, "twice the patients, and nobody moved"
    assert {case.split for case in after} == {"train", "test"}
    shutil.move(tmp_path / "raw", tmp_path / "second")
    shutil.rmtree(tmp_path / "private")
    other, _, _ = imported(tmp_path, *arguments)
    assert not {case.id for case in other} & {case.id for case in after}, "another salt, other names"


def test_a_killed_import_goes_on(tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.echovlm.corpus.importing import dicom

    shutil.copytree(export, tmp_path / "whole")
    arguments = ["import", "dicom", str(export), "--private", str(tmp_path / "private"), "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 2, "a folder with something in it"
    shutil.rmtree(tmp_path / "whole")
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    read, seen = dicom.read_file, []

    def dies(path: Path, *how: Any) -> list:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(path)
        return read(path, *how)

    monkeypatch.setattr(dicom, "read_file", dies)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, str(tmp_path / "raw")])
    monkeypatch.setattr(dicom, "read_file", lambda path, *how: seen.append(path) or read(path, *how))
    assert main([*arguments, str(tmp_path / "raw"), "--frames", "1"]) == 2, "not with other settings"
    assert main([*arguments, str(tmp_path / "raw")]) == 0 and len(seen) == 3, "no file read twice"
    assert outputs(tmp_path / "raw") == outputs(tmp_path / "whole")
    assert main([*arguments, str(tmp_path / "raw")]) == 2, "a finished one is not overwritten"


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [
        ("examples_palette.dcm", 1, (350, 800)),
        ("examples_rgb_color.dcm", 1, (240, 320)),
        ("examples_ybr_color.dcm", 4, (240, 320)),
        ("examples_jpeg2k.dcm", 1, (480, 640)),
        ("ExplVR_BigEnd.dcm", 1, (60, 80)),
    ],
)
def test_every_coding_comes_in_as_a_case_to_show(tmp_path: Path, name: str, count: int, shape: tuple) -> None:
    (tmp_path / "export").mkdir()
    shutil.copy(OPEN_FILES / name, tmp_path / "export")
    [case], told, _ = imported(tmp_path, "dicom", tmp_path / "export", "--frames", 4)
    assert case.split == "show" and len(case.images) == count == told["frames"]
    with Image.open(tmp_path / "raw" / case.images[0]) as image:
        assert (image.height, image.width, image.mode) == (*shape, "RGB")
    told_header = pydicom.dcmread(OPEN_FILES / name, stop_before_pixels=True)
    values = {str(e.value).lower() for e in told_header if e.VR in ("PN", "LO", "DA", "SH") and len(str(e.value)) > 5}
    assert leaks(outputs(tmp_path / "raw"), tuple(values)) == []
