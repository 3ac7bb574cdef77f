"""Headers: what a cleaned one still says, which layer takes what, and files that the tool cannot do."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pydicom
import pytest
from dicognito.anonymizer import Anonymizer
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
)
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from examples.echovlm.cases import read_cases
from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.importing import header as module
from examples.echovlm.corpus.importing.examination import SourceError
from examples.echovlm.corpus.importing.header import guarded, read_header
from examples.echovlm.corpus.organs import organs_in
from examples.echovlm.corpus.regions import regions_of
from moe_adapter.errors import MoEAdapterError

SALT = bytes(range(32))
FREE_TEXT = ("StudyDescription", "PatientComments", "DeviceSerialNumber", "CodeMeaning")
TEXTS = ("PN", "LO", "SH", "ST", "LT", "DA", "DT", "UI")
REAL = [Path(name) for name in get_testdata_files()]
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR DA")


def crafted() -> Dataset:
    """Identifiers where hospitals have them, in form and out of form."""
    dataset = header()
    dataset.file_meta.SourceApplicationEntityTitle = "ELSEWHERE"
    dataset.InstitutionName = f"{INSTITUTION}\\Dept"
    dataset.InstitutionAddress = "1 Elsewhere Road"
    dataset.PatientComments, dataset.DeviceSerialNumber = "Zabriskie, née Okonkwo", "4471182"
    dataset.StationName = "ELSEWHERE1"
    dataset.OtherPatientIDs = ["MRN4471182", "X4471182"]
    dataset.AcquisitionDateTime, dataset.StudyTime = "19590417101112.5", "195917"
    dataset.add_new("SeriesDate", "DA", "17.4.59")
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "T-04000", "SRT", "Breast of Zabriskie"
    dataset.AnatomicRegionSequence = Sequence([code])
    nested, inner = Dataset(), Dataset()
    inner.PatientID, inner.PatientName, inner.StudyDate, inner.InstitutionName = "MRN4471182", NAME, DATE, INSTITUTION
    nested.ReferencedStudySequence = Sequence([inner])
    dataset.ReferencedPatientSequence = Sequence([nested])
    dataset.SequenceOfUltrasoundRegions = Sequence([region((120, 60, 519, 399))])
    dataset.BurnedInAnnotation = "NO"
    return dataset


def cleaned(path: Path, salt: bytes = SALT) -> Dataset:
    with guarded():
        return read_header(path, salt)[1]


def leaks(dataset: Dataset, secrets: tuple[str, ...] = SECRETS) -> list[str]:
    text = f"{dataset.file_meta}\n{dataset}".lower()
    return [secret for secret in secrets if secret in text]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_dicom(tmp_path / "1.dcm", screen(), crafted())


def test_a_cleaned_header_says_what_is_read_and_nothing_else(file: Path) -> None:
    assert leaks(pydicom.dcmread(file)) == list(SECRETS)
    found = cleaned(file)
    assert leaks(found) == [] and not any(element.VR in ("PN", "UI", "DA", "TM", "DT") for element in found.iterall())
    assert (found.BurnedInAnnotation, found.NumberOfFrames, found.Modality, found.Rows) == ("NO", 1, "US", 480)
    assert found.StudyDescription == found.AnatomicRegionSequence[0].CodeMeaning == "Breast"
    assert regions_of(found) == regions_of(pydicom.dcmread(file))


def test_the_identity_is_the_header_s_own(file: Path) -> None:
    with guarded():
        identity, _ = read_header(file, SALT)
    assert (identity.accession, identity.patients) == ("A1", ("MRN4471182", NAME))
    assert identity.study == pydicom.dcmread(file).StudyInstanceUID
    assert {"Zabriskie", "Okonkwo", "Adaeze"} < set(identity.words["name"])
    assert {INSTITUTION, "1 Elsewhere Road"} < set(identity.words["institution"]), "also of a name with a backslash"
    assert set(identity.words["id"]) == {"A1", "MRN4471182", "X4471182"}


@pytest.mark.parametrize("charset", CHINESE)
def test_words_are_the_same_in_every_character_set(file: Path, charset: str) -> None:
    """pydicom leaves the escapes of ISO 2022 IR 58 in them."""
    chinese = header()
    chinese.PatientName, chinese.ReferringPhysicianName = "Wang^XiaoDong=王^小东", "Li^Na=李^娜"
    chinese.PatientID, chinese.InstitutionName = "", "北京远望门诊部"
    recode(write_dicom(file, screen(), chinese), charset)
    assert (b"\x1b$)A" in file.read_bytes()) == (charset == "ISO 2022 IR 58")
    with guarded():
        identity, _ = read_header(file, SALT)
    assert identity.patients == ("Wang^XiaoDong=王^小东",)
    names = {"Wang^XiaoDong", "XiaoDong^Wang", "Wang", "XiaoDong", "王^小东", "小东", "Na^Li", "李^娜"}
    assert names < set(identity.words["name"]) and "小东^王" not in identity.words["name"]
    assert identity.words["institution"] == ("北京远望门诊部",)


def test_chinese_under_a_wrong_character_set_is_known_too(file: Path) -> None:
    wrong = header()
    wrong.SpecificCharacterSet = "ISO_IR 100"
    wrong.PatientName, wrong.InstitutionName, wrong.ReferringPhysicianName = (
        name.encode(code).decode("latin-1")
        for name, code in (("王^小东", "gb18030"), ("北京远望门诊部", "gb18030"), ("Müller^Zoë", "latin-1"))
    )
    write_dicom(file, screen(), wrong)
    with guarded():
        identity, _ = read_header(file, SALT)
    assert {"王^小东", "小东", "Müller", "Zoë"} < set(identity.words["name"])
    assert "北京远望门诊部" in identity.words["institution"]


@pytest.mark.parametrize(
    ("keyword", "kind", "value"),
    [
        ("OperatorsName", "PN", ["Doe^J", ""]),
        ("OperatorsName", "PN", ["", "Doe^J"]),
        ("OperatorsName", "PN", ["Doe^J", "Roe^K"]),
        ("StudyID", "IS", "4471182"),
        ("AccessionNumber", "IS", "4471182"),
        ("AccessionNumber", "DS", "4471182.5"),
        ("PatientID", "LO", ["MRN4471182", "X4471182"]),
        ("StationName", "SH", ["ELSEWHERE1", ""]),
        ("FrameOfReferenceUID", "UI", ["1.2", "1.3"]),
    ],
)
def test_what_dicognito_may_fail_on_goes_before(file: Path, keyword: str, kind: str, value: str | list[str]) -> None:
    dataset = crafted()
    dataset.add_new(keyword, kind, value)
    write_dicom(file, screen(), dataset)
    with guarded():
        identity, found = read_header(file, SALT)
    assert keyword not in found and found.Modality == "US" and leaks(found) == []
    if keyword == "OperatorsName":
        assert "Doe" in identity.words["name"], "of several values too"


def test_dicognito_alone_takes_what_has_a_tag(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our whitelist switched off: left is the free text, and others in place of names, UIDs and numbers."""
    monkeypatch.setattr(module, "_remove_unread", lambda dataset, element: None)
    dataset = crafted()
    dataset.InstitutionName = INSTITUTION  # with a backslash it is removed before
    write_dicom(file, screen(), dataset)
    original, found = pydicom.dcmread(file), cleaned(file)
    assert "PatientName" in found and "ReferencedPatientSequence" in found and not any(e.tag.is_private for e in found)
    uids = (original.StudyInstanceUID, original.SOPInstanceUID)
    assert leaks(found, uids) == []
    for element in found.iterall():
        if element.keyword in FREE_TEXT:
            element.value = ""
    del found.file_meta.SourceApplicationEntityTitle
    assert leaks(found) == []


def test_our_whitelist_alone_takes_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Anonymizer, "anonymize", lambda self, dataset: None)
    assert leaks(cleaned(file)) == []


def test_the_salt_decides_what_stands_in_for_whom(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_remove_unread", lambda dataset, element: None)
    other = write_dicom(tmp_path / "2.dcm", screen(), header("2"))
    first, second, salted = cleaned(file), cleaned(other), cleaned(file, b"x" * 32)
    assert (first.PatientID, first.PatientName) == (second.PatientID, second.PatientName)
    assert first.StudyInstanceUID != second.StudyInstanceUID
    assert first.PatientID != salted.PatientID and first.StudyInstanceUID != salted.StudyInstanceUID


def test_real_files_keep_what_is_read_and_no_identifier() -> None:
    """All DICOM files of pydicom and pydicom-data that can be read."""
    seen = 0
    for path in REAL:
        try:
            with guarded():
                original = pydicom.dcmread(path, stop_before_pixels=True)
                elements = [e for e in original.iterall() if e.VR in TEXTS and e.keyword != "CodeValue"]
                texts = {str(element.value).lower() for element in elements}
        except SourceError:
            continue
        found, seen = cleaned(path), seen + 1
        for name in ("Modality", "Rows", "NumberOfFrames", "BurnedInAnnotation"):
            assert found.get(name) == original.get(name), path.name
        assert regions_of(found) == regions_of(original), path.name
        for name in module.BODY_PART:
            assert organs_in(str(found.get(name))) == organs_in(str(original.get(name))), path.name
        found.pop("ContentSequence", None)  # a report's text is wanted
        assert leaks(found, tuple(text for text in texts if len(text) > 5 and not organs_in(text))) == [], path.name
    assert seen > 150


def test_each_header_of_an_import_goes_through_dicognito(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same patient is the same, reports are found by accession number, and nothing of the headers is written."""
    for study in ("1", "2"):
        dataset = crafted()
        dataset.AccessionNumber, dataset.StudyInstanceUID = f"A{study}", f"1.2.{study}"
        write_dicom(tmp_path / "export" / f"{study}.dcm", screen(), dataset)
    (tmp_path / "reports.csv").write_text(
        f"case,findings\nA1,Cyst seen at {INSTITUTION}.\nA2,Cyst of MRN4471182 or X4471182.\n"
    )
    clean, seen = Anonymizer.anonymize, []
    monkeypatch.setattr(Anonymizer, "anonymize", lambda self, dataset: (seen.append(1), clean(self, dataset)))
    paths = ("--reports", "reports.csv", "--private", "private", "--out", "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["import", "dicom", "export", *paths]) == 0
    assert len(seen) == 4, "at first, and with the frames"
    first, second = read_cases(tmp_path / "raw" / "cases.jsonl")
    assert first.patient == second.patient and first.id != second.id and first.organ == "breast"
    assert (first.findings, second.findings) == ("Cyst seen at [institution].", "Cyst of [id] or [id].")
    written = "".join(path.read_text() for path in Path("raw").iterdir() if path.is_file()).lower()
    assert [secret for secret in (*SECRETS, '"1.2.1"', '"a1"', "road") if secret in written] == []


def test_what_dicognito_fails_on_is_left_out_in_silence(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(self: Anonymizer, dataset: Dataset) -> None:
        logging.getLogger("dicognito").error(NAME)
        raise ValueError(NAME)

    monkeypatch.setattr(Anonymizer, "anonymize", fails)
    (tmp_path / "export").mkdir()
    shutil.move(file, tmp_path / "export")
    with caplog.at_level(logging.DEBUG):
        paths = ("--private", str(tmp_path / "private"), "--out", str(tmp_path / "raw"))
        assert main(["import", "dicom", str(tmp_path / "export"), *paths]) == 0
    said = "".join([*capfd.readouterr(), caplog.text]).lower()
    assert [secret for secret in SECRETS if secret in said] == []
    manifest = json.loads((tmp_path / "raw" / "manifest.json").read_text())
    assert manifest["files left out"] == {"header cannot be read": 1}


def test_without_dicognito_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dicognito.anonymizer", None)
    with pytest.raises(MoEAdapterError, match=r'needs dicognito; .*pip install "moe-adapter\[echovlm\]"'):
        cleaned(file)
