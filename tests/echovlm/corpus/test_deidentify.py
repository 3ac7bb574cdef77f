"""De-identification, read back: no institution, date or name in the pixels, the reports or any file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from echovlm.corpus.screens import (
    CHINESE,
    DATE,
    INSTITUTION,
    NAME,
    SECRETS,
    header,
    recode,
    region,
    screen,
    write_dicom,
    write_on,
    write_structured_report,
)
from PIL import Image

from examples.echovlm.cases import Case, Question, read_cases, write_cases
from examples.echovlm.corpus import deidentify
from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.deidentify import mask
from examples.echovlm.corpus.ocr import Box, find_text, read_text
from examples.echovlm.corpus.regions import Region
from examples.echovlm.corpus.store import Layout

SCAN = (120, 60, 520, 400)


def burned_in() -> np.ndarray:
    """One scan with name, institution and date around it, a measurement inside, and a date inside."""
    frame = write_on(screen([SCAN]), (8, 6), f"{NAME.replace('^', ' ').upper()}  17/04/1959")
    frame = write_on(frame, (330, 430), INSTITUTION)
    frame[300:335, 200:330] = 0
    frame = write_on(frame, (205, 305), "17/04/1959")
    frame[200:235, 300:420] = 0
    return write_on(frame, (305, 205), "D 14.2 mm")


def words(frame: np.ndarray) -> str:
    return " ".join(read_text(box.of(frame)) for box in find_text(frame)).lower()


def test_text_around_the_scan_is_masked_and_tissue_is_left() -> None:
    frame = burned_in()
    before = words(frame)
    assert all(secret in before for secret in ("zabriskie", "quentin", "elsewhere", "1959", "14.2")), "it can be read"
    painted, counts = mask(frame, Layout())
    said = words(painted)
    assert not [secret for secret in SECRETS if secret in said] and "14.2" in said
    assert counts["outside the scan"] >= 2 and counts["inside the scan"] == 1
    left, top, right, bottom = SCAN
    changed = (painted != frame).any(axis=-1)[top:bottom, left:right]
    assert changed.mean() < 0.05, "the date inside, and nothing else of the tissue"


def test_blank_paints_all_but_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deidentify, "find_text", lambda frame: [])
    frame = burned_in()
    painted, _ = mask(frame, Layout(), blank=True)
    kept = np.zeros((480, 640), bool)
    kept[57:403, 117:523] = True
    assert painted[~kept].max() == 0 and (painted[60:400, 120:520] == frame[60:400, 120:520]).all()


def test_the_tag_bounds_the_scan() -> None:
    """Text on something lit that the tag says is no scan, such as a banner, is masked."""
    frame = screen([SCAN, (120, 410, 520, 470)])
    frame[425:460, 130:420] = 90
    frame = write_on(frame, (135, 428), "Quentin Zabriskie")
    tag = Layout(regions=(Region(1, 1, 120, 60, 519, 399),))
    assert "quentin" not in words(mask(frame, tag)[0])


@pytest.mark.parametrize("stated", [None, "NO"])
def test_from_dicom_to_a_corpus_nothing_gets_out(
    tmp_path: Path, stated: str | None, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the header says of burned-in text."""
    elements = {"SequenceOfUltrasoundRegions": [region((120, 60, 519, 399))]}
    if stated:
        elements["BurnedInAnnotation"] = stated
    write_dicom(tmp_path / "export" / "1.dcm", burned_in(), header("1"), **elements)
    report = f"Cyst of the left breast, 14 mm, on 17/04/1959 at {INSTITUTION}. Quentin Zabriskie; Dr. Okonkwo."
    write_structured_report(tmp_path / "export" / "2.dcm", {"121070": report, "121072": "Tel: 555-123-4567"}, "1")
    raw, clean = str(tmp_path / "raw"), str(tmp_path / "clean")
    with caplog.at_level(logging.DEBUG):
        source = [str(tmp_path / "export"), "--private", str(tmp_path / "private")]
        assert main(["import", "dicom", *source, "--out", raw]) == 0
        assert main(["deidentify", raw, "--out", clean]) == 0
    [case] = read_cases(Path(clean) / "cases.jsonl")
    assert case.findings == "Cyst of the left breast, 14 mm, on [date] at [institution]. [name]; Dr. [name]."
    assert case.impression == "Tel: [telephone]"
    said = capfd.readouterr()
    texts = [said.out, said.err, caplog.text]
    for path in Path(clean).rglob("*"):
        if path.suffix == ".png":
            texts.append(words(np.asarray(Image.open(path))))
        elif path.is_file():
            texts.append(path.read_text())
    assert [secret for secret in (*SECRETS, DATE, "555-123") for text in texts if secret in text.lower()] == []
    told = json.loads((Path(clean) / "manifest.json").read_text())
    assert told["masked"][f"frames whose header says {stated or 'unknown'}"] == 1
    assert told["masked"]["frames"] == 1 and told["scrubbed"] == {"date": 1, "telephone": 1}


@pytest.mark.parametrize("charset", CHINESE)
def test_a_chinese_name_in_parts_does_not_get_out_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charset: str
) -> None:
    """By the header's words alone: nothing in the report announces the names or the institution."""
    monkeypatch.setattr(deidentify, "find_text", lambda frame: [])
    chinese = header("1")
    chinese.PatientName, chinese.InstitutionName = "Wang^XiaoDong=王^小东", "北京远望门诊部"
    chinese.OperatorsName, chinese.StudyDescription = "李^雷", "乳腺，王小东"
    recode(write_dicom(tmp_path / "export" / "1.dcm", screen([SCAN]), chinese), charset)
    texts = {
        "121070": "王小东左侧乳腺见囊肿，李雷在北京远望门诊部复查。",
        "121072": "XiaoDong Wang，WANG XIAODONG：囊肿。",
    }
    recode(write_structured_report(tmp_path / "export" / "2.dcm", texts, "1"), charset)
    raw, clean = str(tmp_path / "raw"), str(tmp_path / "clean")
    source = [str(tmp_path / "export"), "--private", str(tmp_path / "private")]
    assert main(["import", "dicom", *source, "--out", raw]) == 0
    assert main(["deidentify", raw, "--out", clean]) == 0
    [case] = read_cases(Path(clean) / "cases.jsonl")
    assert case.findings == "[name]左侧乳腺见囊肿，[name]在[institution]复查。" and case.organ == "breast"
    assert case.impression == "[name]，[name]：囊肿。"
    secrets = ("王", "小东", "李", "雷", "远望", "wang", "xiaodong", "\x1b", "u001b")
    written = [path for folder in (raw, clean) for path in Path(folder).rglob("*.json*")]
    said = "".join(path.read_text().lower() for path in written)
    assert len(written) > 4 and "囊肿" in said and [secret for secret in secrets if secret in said] == []


def test_questions_are_scrubbed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deidentify, "find_text", lambda frame: [])
    Image.fromarray(screen([SCAN])).save(tmp_path / "1.png")
    question = Question(question="What did Dr. Okonkwo see?", answer="A cyst, on 2023-04-17.")
    usual = dict(id="1", patient="p", hospital="", organ="breast", language="en", images=("1.png",), split="train")
    write_cases(tmp_path / "cases.jsonl", [Case(**usual, findings="A cyst.", questions=(question,))])
    assert main(["deidentify", str(tmp_path), "--out", str(tmp_path / "clean")]) == 0
    [case] = read_cases(tmp_path / "clean" / "cases.jsonl")
    assert case.questions == (Question(question="What did Dr. [name] see?", answer="A cyst, on [date]."),)


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    usual = dict(hospital="", organ="breast", language="en", split="train", findings="A cyst is seen.")
    for i in range(3):
        Image.fromarray(screen([SCAN])).save(tmp_path / f"{i}.png")
    cases = [Case(**usual, id=f"{i}", patient=f"{i}", images=(f"{i}.png",)) for i in range(3)]
    write_cases(tmp_path / "cases.jsonl", cases)
    arguments = ["deidentify", str(tmp_path), "--out", str(tmp_path / "clean")]
    seen: list[Box] = []

    def read(frame: np.ndarray, dies: bool = True) -> list[Box]:
        if dies and len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(Box(8, 6, 100, 30))
        return seen[-1:]

    monkeypatch.setattr(deidentify, "find_text", read)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert not (tmp_path / "clean" / "manifest.json").exists()
    monkeypatch.setattr(deidentify, "find_text", lambda frame: read(frame, dies=False))
    assert main([*arguments, "--blank"]) == 2, "not with other settings"
    assert "other settings" in capsys.readouterr().err
    assert main(arguments) == 0 and len(seen) == 3, "nothing read twice"
    told = json.loads((tmp_path / "clean" / "manifest.json").read_text())
    assert told["kept"] == 3 and told["masked"]["frames"] == 3


def test_a_damaged_frame_is_dropped(tmp_path: Path) -> None:
    usual = dict(hospital="", organ="breast", language="en", split="train", findings="A cyst is seen.")
    (tmp_path / "0.png").write_bytes(b"damaged")
    write_cases(tmp_path / "cases.jsonl", [Case(**usual, id="a", patient="p", images=("0.png",))])
    assert main(["deidentify", str(tmp_path), "--out", str(tmp_path / "clean")]) == 0
    told = json.loads((tmp_path / "clean" / "manifest.json").read_text())
    assert told["dropped"] == {"image cannot be decoded": 1} and told["kept"] == 0
