"""A folder of DICOM: stills and cines by study, and the structured reports (SR) among them.

Of a header, the code below reads identifiers, which leave as salted pseudonyms; the names of persons and
institutions, to strike them out of the report; the body part, which leaves as an organ of ours; and the layout's
numbers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.importing.examination import Examination, File, Picture, Report, SourceError
from examples.echovlm.corpus.organs import organs_in
from examples.echovlm.corpus.regions import regions_of
from examples.echovlm.corpus.store import Layout
from examples.echovlm.dicom import DicomError, _pydicom, frames_of, key_frames
from moe_adapter.errors import MoEAdapterError

BODY_PART = ("BodyPartExamined", "StudyDescription", "SeriesDescription", "ProtocolName")
FINDING, IMPRESSION = ("121070", "121071"), ("121072", "121073", "121076", "121077")  # codes of headings and texts
KINDS = ("name", "institution", "id")


@dataclass(frozen=True)
class _Stated:
    """What is read of a file's header at first, so that no header is held in memory."""

    path: Path
    keys: tuple[str, ...]
    patients: tuple[str, ...]
    organs: tuple[str, ...]
    words: dict[str, tuple[str, ...]]


def read_dicom(root: Path) -> tuple[list[Examination], list[Report], dict[str, str]]:
    """The examinations and reports of the DICOM files below `root`, and why a file is neither, by its name."""
    studies: dict[str, list[_Stated]] = {}
    reports: list[Report] = []
    left: dict[str, str] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        try:
            found = _read(path, name)
        except SourceError as error:
            left[name] = str(error)
            continue
        if isinstance(found, Report):
            reports.append(found)
        else:
            studies.setdefault(found.keys[0], []).append(found)
    return [_examination(root, found) for found in studies.values()], reports, left


def read_file(path: Path, count: int) -> list[Picture]:
    """At most `count` key frames of a DICOM file with their layouts. Raises SourceError."""
    with _guarded():
        header = _header(path)
        layout = _layout(header)
    try:
        images = frames_of(path, count=count)
    except DicomError:
        raise SourceError("pixels cannot be decoded") from None
    indices = key_frames(layout.frames, count)
    return [Picture(image=image, layout=replace(layout, frame=i)) for i, image in zip(indices, images, strict=True)]


def _read(path: Path, name: str) -> _Stated | Report:
    with _guarded():
        header = _header(path)
        if "ContentSequence" in header:
            return _report(header)
        if "Rows" in header and header.get("Modality") in ("US", "IVUS"):
            return _stated(path, header, name)
    raise SourceError("not ultrasound")


@contextmanager
def _guarded() -> Iterator[None]:
    """pydicom's warnings and errors quote the header, and its log repeats them: here nothing of that gets out."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MoEAdapterError:
        raise
    except Exception:  # whatever it is, its message may hold a name
        raise SourceError("header cannot be read") from None
    finally:
        logging.disable(before)


def _header(path: Path) -> Any:
    pydicom = _pydicom()
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except pydicom.errors.InvalidDicomError:
        raise SourceError("not DICOM") from None


def _layout(header: Any) -> Layout:
    stated = str(header.get("BurnedInAnnotation") or "").upper()
    return Layout(
        regions=regions_of(header),
        burned_in=stated if stated in ("YES", "NO") else "unknown",
        organs=_organs(header),
        frames=int(header.get("NumberOfFrames") or 1),
    )


def _stated(path: Path, header: Any, name: str) -> _Stated:
    study = str(header.get("StudyInstanceUID") or f"folder:{Path(name).parent.as_posix()}")
    return _Stated(
        path=path,
        keys=(study, *filter(None, [str(header.get("AccessionNumber") or "")])),
        patients=tuple(filter(None, (str(header.get(name) or "") for name in ("PatientID", "PatientName")))),
        organs=_organs(header),
        words=_words(header),
    )


def _examination(root: Path, found: Sequence[_Stated]) -> Examination:
    organs = {organ for stated in found for organ in stated.organs}
    patients = [patient for stated in found for patient in stated.patients]
    return Examination(
        keys=tuple(dict.fromkeys(key for stated in found for key in stated.keys)),
        patient=patients[0] if patients else found[0].keys[0],
        files=tuple(_file(root, stated.path) for stated in found),
        source="dicom",
        organ=organs.pop() if len(organs) == 1 else "",
        words={kind: tuple({word for stated in found for word in stated.words[kind]}) for kind in KINDS},
    )


def _file(root: Path, path: Path) -> File:
    return File(name=path.relative_to(root).as_posix(), read=lambda count: read_file(path, count))


def _organs(header: Any) -> tuple[str, ...]:
    regions = header.get("AnatomicRegionSequence") or ()
    texts = [*(header.get(name) or "" for name in BODY_PART), *(item.get("CodeMeaning") or "" for item in regions)]
    return organs_in(" ".join(map(str, texts)))


def _words(header: Any) -> dict[str, tuple[str, ...]]:
    """What identifies a person or a place in a header, sequences included, by kind."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def note(_: Any, element: Any) -> None:
        if element.VR in ("SQ", "OB", "OW", "UN"):
            return
        value = str(element.value or "")
        if element.VR == "PN":
            found["name"] += [value, *value.replace("=", "^").split("^")]
        elif element.keyword.startswith(("Institution", "Issuer", "StationName")):
            found["institution"].append(value)
        elif element.keyword in ("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "PatientAddress"):
            found["id"].append(value)

    header.walk(note)
    return {kind: tuple(dict.fromkeys(filter(None, map(str.strip, words)))) for kind, words in found.items()}


def _report(header: Any) -> Report:
    """A structured report's text under findings, and under impression or conclusion (TID 2000); the rest is left."""
    texts: dict[str, list[str]] = {"findings": [], "impression": []}

    def walk(items: Any, part: str) -> None:
        for item in items or ():
            names = item.get("ConceptNameCodeSequence") or ()
            code = str(names[0].get("CodeValue") or "") if names else ""
            coded = "findings" if code in FINDING else "impression" if code in IMPRESSION else ""
            if item.get("ValueType") == "CONTAINER":
                walk(item.get("ContentSequence"), coded or part or "other")
            elif item.get("ValueType") == "TEXT" and (part or coded) in texts:
                texts[part or coded].append(str(item.get("TextValue") or "").strip())

    walk(header.ContentSequence, "")
    keys = [str(header.get(name) or "") for name in ("StudyInstanceUID", "AccessionNumber")]
    return Report(
        keys=tuple(filter(None, keys)),
        findings="\n".join(texts["findings"]),
        impression="\n".join(texts["impression"]),
        words=_words(header),
    )
