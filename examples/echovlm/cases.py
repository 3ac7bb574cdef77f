"""The case file: one ultrasound examination a line, as JSON (JSONL); docs/cases.md describes it for users."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from examples.echovlm.files import replaced
from moe_adapter.errors import MoEAdapterError

LANGUAGES = ("en", "zh")
SPLITS = ("train", "test", "show")
_JSON_NAMES = {str: "a string", list: "a list", dict: "an object"}


class CaseError(MoEAdapterError):
    """A case file that cannot be used: names the file, the line and the field."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about a case's frames with its answer; `dimension` is the kind of question, free text."""

    question: str
    answer: str
    dimension: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One examination: key frames, its report, and the patient it belongs to.

    `images` are paths relative to the case file's folder. `findings` describes what the frames show and
    `impression` concludes; both are in `language`. `split` is "train", "test", or "show": frames without a
    report, for which the trained model answers. `attributes` is the structured truth where it is known.
    """

    id: str
    patient: str
    hospital: str
    organ: str
    language: str
    images: tuple[str, ...]
    findings: str
    split: str
    impression: str = ""
    source: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()


def read_cases(path: str | os.PathLike[str]) -> list[Case]:
    """Read and check a whole case file.

    Raises CaseError, with file, line and field, on a line that is not a case, a missing image file, an id that
    occurs twice, or a patient in both "train" and "test".
    """
    path = Path(path)
    cases: list[Case] = []
    line_of_id: dict[str, int] = {}
    split_of_patient: dict[str, tuple[str, int]] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        case = _case(row, where)
        _check_images(case, path.parent, where)
        if case.id in line_of_id:
            raise CaseError(
                f"{where}: field 'id': got {case.id!r}, already used on line {line_of_id[case.id]}; "
                "expected ids that occur once; rename one of them"
            )
        line_of_id[case.id] = number
        split, first = split_of_patient.setdefault(case.patient, (case.split, number))
        if split != case.split:
            raise CaseError(
                f"{where}: field 'split': got {case.split!r} for patient {case.patient!r}, who is in {split!r} on "
                f"line {first}; expected all cases of a patient in one split; move them together"
            )
        cases.append(case)
    if not cases:
        raise CaseError(f"{path}: got no cases; expected one JSON object a line; see docs/cases.md")
    return cases


def write_cases(path: str | os.PathLike[str], cases: Iterable[Case]) -> Path:
    """Write cases as JSONL in UTF-8; atomic: a kill in the middle leaves the old file whole."""
    path = Path(path)
    with replaced(path) as file:
        file.writelines((json.dumps(asdict(case), ensure_ascii=False) + "\n").encode() for case in cases)
    return path


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        file = path.open(encoding="utf-8-sig")
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror}; expected a JSONL case file; check the path") from error
    with file:
        try:
            lines = file.readlines()
        except UnicodeDecodeError as error:
            raise CaseError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _json(line, f"{path}:{number}")


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CaseError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; expected one JSON object a line; correct it"
        ) from error


def _case(row: Any, where: str) -> Case:
    values = _record(Case, row, where, "")
    questions = [_record(Question, item, where, f"questions[{i}].") for i, item in enumerate(values["questions"])]
    case = Case(**{**values, "images": tuple(values["images"]), "questions": tuple(Question(**q) for q in questions)})
    for name in ("id", "patient", "organ"):
        if not getattr(case, name).strip():
            raise _field_error(where, name, "''", "a name that is not empty")
    for name, allowed in (("language", LANGUAGES), ("split", SPLITS)):
        if getattr(case, name) not in allowed:
            raise _field_error(where, name, repr(getattr(case, name)), f"one of {', '.join(allowed)}")
    for name, value in case.attributes.items():
        if not isinstance(value, str):
            raise _field_error(where, f"attributes.{name}", _shown(value), "a string", "write it in quotes")
    if case.split != "show" and not case.findings.strip():
        raise _field_error(where, "findings", "''", f"a report for split {case.split!r}", 'or set split to "show"')
    return case


def _record(kind: type, row: Any, where: str, prefix: str) -> dict[str, Any]:
    """The row's values by field name, defaults filled in, each of the JSON type that the field wants."""
    if not isinstance(row, dict):
        raise _field_error(where, prefix.rstrip(".") or "(line)", _shown(row), "an object")
    known = {f.name: f for f in fields(kind)}
    for name in row.keys() - known.keys():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
        raise CaseError(f"{where}: field '{prefix}{name}': not a field of a {kind.__name__.lower()}; {hint}")
    values: dict[str, Any] = {}
    for name, spec in known.items():
        wanted = {"images": list, "questions": list, "attributes": dict}.get(name, str)
        if name not in row and (spec.default, spec.default_factory) == (MISSING, MISSING):
            raise _field_error(where, prefix + name, "nothing", _JSON_NAMES[wanted], "add the field")
        values[name] = row.get(name, wanted())
        if not isinstance(values[name], wanted):
            raise _field_error(where, prefix + name, _shown(values[name]), _JSON_NAMES[wanted])
    return values


def _check_images(case: Case, folder: Path, where: str) -> None:
    if not case.images:
        raise _field_error(where, "images", "[]", "at least one key frame")
    for i, image in enumerate(case.images):
        if not isinstance(image, str) or not image:
            raise _field_error(where, f"images[{i}]", _shown(image), "a path")
        if PurePosixPath(image).is_absolute() or PureWindowsPath(image).is_absolute():
            raise _field_error(where, f"images[{i}]", repr(image), "a path relative to the case file's folder")
        if not (folder / image).is_file():
            raise _field_error(where, f"images[{i}]", f"{image!r}, which is not there", f"a file under {folder}")


def _field_error(where: str, name: str, got: str, expected: str, cure: str = "correct the line") -> CaseError:
    return CaseError(f"{where}: field '{name}': got {got}; expected {expected}; {cure}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
