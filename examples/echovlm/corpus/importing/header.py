"""A DICOM header without identifiers: what must be read of it first is, then dicognito cleans it, then we do.

dicognito puts others, drawn from a secret seed, in place of names, UIDs, numbers, institutions and addresses, in
sequences too. It leaves private elements and free text, and fails on values out of form. So behind it, all that nobody
reads is removed, and before it, what it may fail on.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.importing.examination import SourceError
from examples.echovlm.corpus.organs import WORDS, organs_in
from examples.echovlm.corpus.regions import NUMBERS
from examples.echovlm.dicom import INSTALL, _pydicom
from moe_adapter.errors import MoEAdapterError

BODY_PART = ("BodyPartExamined", "StudyDescription", "SeriesDescription", "ProtocolName")
DESCRIPTIONS = (*BODY_PART, "CodeMeaning")
REPORT = ("ContentSequence", "ConceptNameCodeSequence", "CodeValue", "ValueType", "TextValue")
LAYOUT = ("Modality", "Rows", "NumberOfFrames", "BurnedInAnnotation", "SequenceOfUltrasoundRegions", *NUMBERS)
READ = {*DESCRIPTIONS, "AnatomicRegionSequence", *REPORT, *LAYOUT}
DATES = ("DA", "DT", "TM")
KINDS = ("name", "institution", "id")
_ESCAPE = re.compile(r"\x1b(?:[ -/]{1,2}[0-~])?")  # of ISO 2022, as in "ESC $ ) A" for GB2312


@dataclass(frozen=True)
class Identity:
    """What a header tells of who and where, as it stands there: to find what belongs together, never to be written.

    `words`: what must not stay in a report, by kind.
    """

    study: str
    accession: str
    patients: tuple[str, ...]
    words: dict[str, tuple[str, ...]]


def read_header(path: Path, salt: bytes) -> tuple[Identity, Any]:
    """The identity that a DICOM file's header states, and the header without it, pixels not read.

    Left is what READ names: of descriptions the words for organs alone, of a structured report the text, out of which
    the identity's words must still be struck. The same salt has dicognito put the same in place of the same.
    Raises SourceError if the file is not DICOM, and MoEAdapterError without dicognito.
    """
    pydicom = _pydicom()
    try:
        from dicognito.anonymizer import Anonymizer
    except ImportError as error:
        raise MoEAdapterError(f"reading DICOM needs dicognito; got {error}; install it: {INSTALL}") from error
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except pydicom.errors.InvalidDicomError:
        raise SourceError("not DICOM") from None
    identity = _identity(header)
    header.walk(_remove_odd)
    Anonymizer(seed=salt.hex()).anonymize(header)
    for part in (header.file_meta, header):
        part.walk(_remove_unread)
    return identity, header


@contextmanager
def guarded() -> Iterator[None]:
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


def text_of(value: Any) -> str:
    """A value without the escape sequences that pydicom leaves in some character sets' texts (ISO 2022 IR 58)."""
    return _ESCAPE.sub("", str(value or ""))


def _identity(header: Any) -> Identity:
    study, accession, *patients = (
        text_of(header.get(name)) for name in ("StudyInstanceUID", "AccessionNumber", "PatientID", "PatientName")
    )
    return Identity(study, accession, tuple(filter(None, patients)), _words(header))


def _words(header: Any) -> dict[str, tuple[str, ...]]:
    """What identifies a person or a place in a header, sequences included, by kind."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def note(_: Any, element: Any) -> None:
        if element.VR in ("SQ", "OB", "OW", "UN"):
            return
        values = [text_of(value) for value in (element.value if element.VM > 1 else [element.value])]
        values += filter(None, map(_read_as_latin, values))
        if element.VR == "PN":
            found["name"] += [part for value in values for part in _parts(value)]
        elif element.keyword.startswith(("Institution", "Issuer", "StationName")):
            found["institution"] += values
        elif element.keyword in ("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "PatientAddress"):
            found["id"] += values

    header.walk(note)
    return {kind: tuple(dict.fromkeys(filter(None, map(str.strip, words)))) for kind, words in found.items()}


def _read_as_latin(value: str) -> str:
    """The Chinese (GB18030) that a header which names another character set has had read as Latin; "" of other text."""
    try:
        again = value.encode("latin-1").decode("gb18030")
    except UnicodeError:
        return ""
    return again if re.search(r"[\u4e00-\u9fff]", again) else ""


def _parts(name: str) -> Iterator[str]:
    """A name in each of its scripts, as a whole and by components; in Latin also the given name first ("Na Li")."""
    for group in name.split("="):
        family, *others = group.split("^")
        yield from (group, family, *others)
        if others and group.isascii():
            yield f"{others[0]}^{family}"


def _remove_odd(dataset: Any, element: Any) -> None:
    """What dicognito may fail on: private elements, a date that is none, several values, a number for an identifier."""
    usual = isinstance(element.value, str) or (element.VR in ("PN", "SQ") and element.VM < 2)
    if element.tag.is_private or element.VR in DATES or not (usual or element.keyword in READ):
        del dataset[element.tag]


def _remove_unread(dataset: Any, element: Any) -> None:
    if element.keyword not in READ:
        del dataset[element.tag]
    elif element.keyword in DESCRIPTIONS:
        element.value = _organ_words(str(element.value or ""))


def _organ_words(description: str) -> str:
    """The words by which `organs_in` knows the description's organs, and nothing else of it."""
    found = (re.search(WORDS[organ], description, re.IGNORECASE) for organ in organs_in(description))
    return " ".join(match[0] for match in found if match)
