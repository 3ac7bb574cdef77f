"""Examinations and reports become cases: paired, under pseudonyms, split by patient, with their key frames."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.echovlm.cases import Case
from examples.echovlm.corpus.importing.examination import Examination, Report, SourceError
from examples.echovlm.corpus.manifest import MANIFEST, Manifest
from examples.echovlm.corpus.organs import organs_in
from examples.echovlm.corpus.pseudonyms import pseudonym, split_of
from examples.echovlm.corpus.scrub import strike_out
from examples.echovlm.corpus.store import FRAMES, Layout, check_settings, layout_of, new_folder, write_corpus
from examples.echovlm.journal import Journal
from moe_adapter.directory import replace_file
from moe_adapter.errors import MoEAdapterError

CJK = re.compile(r"[\u4e00-\u9fff]")
NO_REPORT, NO_IMAGES = "images without a report", "report without images"
AMBIGUOUS, SEVERAL = "report that names several examinations", "several reports"
NO_FINDINGS, UNREADABLE = "report without findings", "no readable image"


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """`frames`: key frames of a cine. `organ`, `hospital`: of all cases, where no report says otherwise."""

    frames: int = 2
    organ: str = ""
    hospital: str = ""
    test_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise MoEAdapterError(f"--frames: got {self.frames}; expected 1 or more key frames of a cine")
        if not 0 <= self.test_share <= 1:
            raise MoEAdapterError(f"--test-share: got {self.test_share}; expected a share between 0 and 1")


def build_cases(
    examinations: Sequence[Examination],
    reports: Sequence[Report],
    left: Mapping[str, str],
    *,
    out: Path,
    private: Path,
    salt: bytes,
    settings: ImportSettings,
) -> Manifest:
    """Write the cases and key frames of the examinations into `out`, and in `private` which file each comes from.

    Where there is no report at all, every case is of split "show"; otherwise images without one are dropped.
    `left`: the source's files that are of no use, and why. `salt`: that of `private`. A run that was killed goes on.
    Raises MoEAdapterError if `out` holds something else.
    """
    pairs, lone = pair(examinations, reports)
    manifest = Manifest(step="import", given=len(pairs) + len(lone), settings=asdict(settings))
    with _journal(out, private) as journal:
        check_settings(journal, manifest.settings, out)
        journal.append("left", {"left": dict(left)})
        builder = _Builder(out, salt, settings)
        found = []
        for examination, told in pairs:
            id = builder.id(examination)
            if id not in journal:
                journal.append(id, builder.build(examination, told, show=not reports))
            found.append(journal.get(id) or {})
    for report, reason in lone:
        manifest.drop(pseudonym(salt, "report", "\0".join(report.keys)), reason)
    cases, layouts = _gather(found, manifest)
    unread = Counter(why for row in (*found, {"left": left}) for why in row["left"].values())
    struck = sum((Counter(row["struck"]) for row in found), Counter())
    manifest.more = _told(cases) | {
        "frames": len(layouts),
        "files left out": dict(unread.most_common()),
        "struck out of reports": dict(struck),
    }
    write_corpus(out, cases, layouts, manifest)
    return manifest


def pair(
    examinations: Sequence[Examination], reports: Sequence[Report]
) -> tuple[list[tuple[Examination, list[Report]]], list[tuple[Report, str]]]:
    """Each examination with the reports that name it and no other, and the reports that name none or several."""
    by_key: dict[str, set[int]] = {}
    for index, examination in enumerate(examinations):
        for key in examination.keys:
            by_key.setdefault(key, set()).add(index)
    found: list[list[Report]] = [[] for _ in examinations]
    lone = []
    for report in reports:
        named = set().union(*(by_key.get(key, ()) for key in report.keys))
        if len(named) == 1:
            found[named.pop()].append(report)
        else:
            lone.append((report, AMBIGUOUS if named else NO_IMAGES))
    return list(zip(examinations, found, strict=True)), lone


def _journal(out: Path, private: Path) -> Journal:
    """What became of each examination, by its pseudonym: the way back to the originals, and to go on after a kill."""
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
    path = private / f"{out.resolve().name}-{name}.jsonl"
    if not (path.is_file() and (out / FRAMES).is_dir() and not (out / MANIFEST).exists()):
        new_folder(out)
        path.unlink(missing_ok=True)
    (out / FRAMES).mkdir(exist_ok=True)
    return Journal(path)


def _gather(found: Sequence[dict], manifest: Manifest) -> tuple[list[Case], dict[str, Layout]]:
    cases: list[Case] = []
    layouts: dict[str, Layout] = {}
    for row in found:
        if row["case"] is None:
            manifest.drop(row["key"], row["reason"])
            continue
        manifest.keep()
        cases.append(Case(**row["case"] | {"images": tuple(row["layouts"])}))
        layouts |= {image: layout_of(layout) for image, layout in row["layouts"].items()}
    return cases, layouts


def _told(cases: Sequence[Case]) -> dict:
    counts = {f"{name}s": Counter(getattr(c, name) for c in cases) for name in ("split", "organ", "language")}
    return {"patients": len({case.patient for case in cases})} | {n: dict(c.most_common()) for n, c in counts.items()}


class _Builder:
    """Makes cases of examinations, and writes their frames."""

    def __init__(self, out: Path, salt: bytes, settings: ImportSettings) -> None:
        self.out, self.salt, self.settings = out, salt, settings

    def id(self, examination: Examination) -> str:
        return pseudonym(self.salt, "case", f"{examination.source}\0{examination.keys[0]}")

    def build(self, examination: Examination, reports: Sequence[Report], *, show: bool) -> dict:
        """The journal's record of an examination: its case or why there is none, its files, what was struck out."""
        record: dict = {"case": None, "reason": "", "files": [], "left": {}, "layouts": {}, "struck": {}}
        if not show and len(reports) != 1:
            return record | {"reason": SEVERAL if reports else NO_REPORT}
        report = reports[0] if reports else Report(keys=(), findings="", impression=examination.impression)
        if reports and not report.findings:
            return record | {"reason": NO_FINDINGS}
        self._write_frames(examination, record)
        if not record["layouts"]:
            return record | {"reason": UNREADABLE}
        texts, struck = _struck((report.findings, report.impression), (examination.words, report.words))
        return record | {"case": self._case(examination, report, *texts, show=show), "struck": struck}

    def _case(self, examination: Examination, report: Report, findings: str, impression: str, *, show: bool) -> dict:
        patient = pseudonym(self.salt, "patient", report.patient or examination.patient)
        split = split_of(patient, test_share=self.settings.test_share, seed=self.settings.seed)
        return dict(
            id=self.id(examination),
            patient=patient,
            hospital=pseudonym(self.salt, "hospital", report.hospital) if report.hospital else self.settings.hospital,
            organ=self._organ(examination, report),
            language=report.language or ("zh" if CJK.search(findings) else "en"),
            findings=findings,
            impression=impression,
            source=examination.source,
            split="show" if show else split,
            attributes=examination.attributes,
        )

    def _organ(self, examination: Examination, report: Report) -> str:
        if report.organ:
            return next(iter(organs_in(report.organ)), report.organ)
        reported = organs_in(f"{report.findings}\n{report.impression}")
        return self.settings.organ or examination.organ or (reported[0] if len(reported) == 1 else "unknown")

    def _write_frames(self, examination: Examination, record: dict) -> None:
        """Frames by file name, with their layouts, into the record; and the files that cannot be read."""
        for file in examination.files:
            try:
                pictures = file.read(self.settings.frames)
            except SourceError as error:
                record["left"][file.name] = str(error)
                continue
            record["files"].append(file.name)
            for picture in pictures:
                name = f"{FRAMES}/{self.id(examination)}-{len(record['layouts'])}.png"
                content = io.BytesIO()
                picture.image.save(content, "PNG")
                replace_file(self.out / name, content.getvalue())
                record["layouts"][name] = asdict(picture.layout)


def _struck(texts: Sequence[str], known: Sequence[Mapping[str, Sequence[str]]]) -> tuple[list[str], Counter[str]]:
    """The texts without the known words; how many of each kind there were."""
    struck: Counter[str] = Counter()
    cleaned = []
    for text in texts:
        for words in known:
            text, counts = strike_out(text, words)
            struck.update(counts)
        cleaned.append(text)
    return cleaned, struck
