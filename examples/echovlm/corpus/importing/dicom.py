"""A folder of DICOM: stills and cines by study, and the structured reports (SR) among them.

Identifiers are read for three ends: salted pseudonyms, the pairing of images and reports, and to strike them out of the
reports. All else comes from a header that has been cleaned of them: the organ, and the layout's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.importing.examination import Examination, File, Picture, Report, SourceError
from examples.echovlm.corpus.importing.header import BODY_PART, KINDS, Identity, guarded, read_header, text_of
from examples.echovlm.corpus.organs import organs_in
from examples.echovlm.corpus.regions import regions_of
from examples.echovlm.corpus.store import Layout
from examples.echovlm.dicom import DicomError, frames_of, key_frames

FINDING, IMPRESSION = ("121070", "121071"), ("121072", "121073", "121076", "121077")  # codes of headings and texts


@dataclass(frozen=True)
class _Stated:
    """What is read of a file's header at first, so that no header is held in memory."""

    path: Path
    keys: tuple[str, ...]
    identity: Identity
    organs: tuple[str, ...]


def read_dicom(root: Path, salt: bytes) -> tuple[list[Examination], list[Report], dict[str, str]]:
    """The examinations and reports of the DICOM files below `root`, and why a file is neither, by its name.

    `salt`: the secret that the headers' cleaning is seeded by.
    """
    studies: dict[str, list[_Stated]] = {}
    reports: list[Report] = []
    left: dict[str, str] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        try:
            found = _read(path, name, salt)
        except SourceError as error:
            left[name] = str(error)
            continue
        if isinstance(found, Report):
            reports.append(found)
        else:
            studies.setdefault(found.keys[0], []).append(found)
    return [_examination(root, found, salt) for found in studies.values()], reports, left


def read_file(path: Path, count: int, salt: bytes) -> list[Picture]:
    """At most `count` key frames of a DICOM file with their layouts. Raises SourceError."""
    with guarded():
        _, header = read_header(path, salt)
        layout = _layout(header)
        try:
            images = frames_of(path, count=count)
        except DicomError:
            raise SourceError("pixels cannot be decoded") from None
        frames = zip(key_frames(layout.frames, count), images, strict=True)
        return [Picture(image=image, layout=replace(layout, frame=i)) for i, image in frames]


def _read(path: Path, name: str, salt: bytes) -> _Stated | Report:
    with guarded():
        identity, header = read_header(path, salt)
        if "ContentSequence" in header:
            return _report(identity, header)
        if "Rows" in header and header.get("Modality") in ("US", "IVUS"):
            study = identity.study or f"folder:{Path(name).parent.as_posix()}"
            return _Stated(path, (study, *filter(None, [identity.accession])), identity, _organs(header))
    raise SourceError("not ultrasound")


def _layout(header: Any) -> Layout:
    stated = str(header.get("BurnedInAnnotation") or "").upper()
    return Layout(
        regions=regions_of(header),
        burned_in=stated if stated in ("YES", "NO") else "unknown",
        organs=_organs(header),
        frames=int(header.get("NumberOfFrames") or 1),
    )


def _examination(root: Path, found: Sequence[_Stated], salt: bytes) -> Examination:
    organs = {organ for stated in found for organ in stated.organs}
    patients = [patient for stated in found for patient in stated.identity.patients]
    return Examination(
        keys=tuple(dict.fromkeys(key for stated in found for key in stated.keys)),
        patient=patients[0] if patients else found[0].keys[0],
        files=tuple(_file(root, stated.path, salt) for stated in found),
        source="dicom",
        organ=organs.pop() if len(organs) == 1 else "",
        words={kind: tuple({word for stated in found for word in stated.identity.words[kind]}) for kind in KINDS},
    )


def _file(root: Path, path: Path, salt: bytes) -> File:
    return File(name=path.relative_to(root).as_posix(), read=lambda count: read_file(path, count, salt))


def _organs(header: Any) -> tuple[str, ...]:
    regions = header.get("AnatomicRegionSequence") or ()
    texts = [*(header.get(name) or "" for name in BODY_PART), *(item.get("CodeMeaning") or "" for item in regions)]
    return organs_in(" ".join(map(str, texts)))


def _report(identity: Identity, header: Any) -> Report:
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
                texts[part or coded].append(text_of(item.get("TextValue")).strip())

    walk(header.ContentSequence, "")
    return Report(
        keys=tuple(filter(None, (identity.study, identity.accession))),
        findings="\n".join(texts["findings"]),
        impression="\n".join(texts["impression"]),
        words=identity.words,
    )
