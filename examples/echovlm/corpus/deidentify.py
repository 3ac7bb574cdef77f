"""Takes identifiers out of pictures and reports.

Of a DICOM header nothing is left since the import. What a header says of burned-in text is not believed: every frame is
read by OCR, and text outside the scan is masked, and inside it what looks like an identifier.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from examples.echovlm.cases import Case, Question
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.corpus.ocr import Box, find_text, read_text
from examples.echovlm.corpus.regions import displays
from examples.echovlm.corpus.scan import scan_mask
from examples.echovlm.corpus.scrub import scrub
from examples.echovlm.corpus.store import FRAMES, Corpus, Layout, check_settings, frame_name, write_corpus
from examples.echovlm.journal import Journal
from moe_adapter.directory import replace_file

MARGIN = 2  # pixels around a text's box, for edges smoothed by compression
INSIDE = 0.5  # share of a text's box on tissue from which it counts as inside the scan
UNREADABLE = "image cannot be decoded"
JOURNAL = "masked.jsonl"  # how much was masked in each frame; a run that goes on asks it what is done


def deidentify(corpus: Corpus, out: Path, *, blank: bool = False) -> Manifest:
    """Write the cases into `out`, their frames masked and their texts scrubbed; goes on where a killed run stopped.

    `blank`: paint everything outside the scan, so that nothing hangs on the OCR having found it.
    The manifest counts images, and how much was masked and scrubbed.
    Raises MoEAdapterError if `out` holds a run with another `blank`.
    """
    settings = {"blank": blank}
    given = sum(len(case.images) for case in corpus.cases)
    manifest = Manifest(step="deidentify", given=given, settings=settings)
    (out / FRAMES).mkdir(parents=True, exist_ok=True)
    masked: Counter[str] = Counter()
    scrubbed: Counter[str] = Counter()
    kept = []
    with Journal(out / JOURNAL) as journal:
        check_settings(journal, settings, out)
        for case in corpus.cases:
            images = []
            for number, image in enumerate(case.images):
                name = f"{FRAMES}/{frame_name(case.id)}-{number}.png"
                layout = corpus.layout(image)
                if name not in journal:
                    journal.append(name, _mask_file(corpus.folder / image, out / name, layout, blank=blank))
                counts = (journal.get(name) or {})["texts"]
                if counts is None:
                    manifest.drop(case.id, UNREADABLE, image=number)
                    continue
                images.append(name)
                manifest.keep()
                masked.update(counts, **{f"frames whose header says {layout.burned_in}": 1})
            if images:
                kept.append(_scrubbed(replace(case, images=tuple(images)), scrubbed))
    manifest.more = {"masked": dict(masked), "scrubbed": dict(scrubbed)}
    write_corpus(out, kept, {}, manifest)
    return manifest


def mask(frame: np.ndarray, layout: Layout, *, blank: bool = False) -> tuple[np.ndarray, dict[str, int]]:
    """The frame (H x W x 3, uint8) with text painted black; how many texts that took, outside and inside the scan.

    Text in the scan that `scrub` does not know, such as a measurement's, stays: masking it would take tissue with it.
    """
    within = _within(frame, layout)
    tissue = scan_mask(frame) & within
    texts = find_text(frame)
    outside = [box for box in texts if box.of(tissue).mean() < INSIDE]
    inside = [box for box in texts if box not in outside and scrub(read_text(box.of(frame)))[1]]
    painted = frame.copy()
    if blank:
        painted[~within] = 0
    for box in outside + inside:
        Box(max(box.left - MARGIN, 0), max(box.top - MARGIN, 0), box.right + MARGIN, box.bottom + MARGIN).of(painted)[
            :
        ] = 0
    counts = {"outside the scan": len(outside), "inside the scan": len(inside), "frames": int(bool(outside or inside))}
    return painted, counts


def _within(frame: np.ndarray, layout: Layout) -> np.ndarray:
    """Where the scan can be, H x W: the tag's regions; the box around tissue if there is no tag that fits the frame."""
    height, width = frame.shape[:2]
    shown = displays(layout.regions or ())
    boxes = [Box(region.left, region.top, region.right + 1, region.bottom + 1) for region in shown]
    if not shown or not all(region.fits(width, height) for region in shown):
        rows, columns = (np.flatnonzero(scan_mask(frame).any(axis=axis)) for axis in (1, 0))
        boxes = [Box(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)] if len(rows) else []
    within = np.zeros((height, width), bool)
    for box in boxes:
        box.of(within)[:] = True
    return within


def _mask_file(source: Path, target: Path, layout: Layout, *, blank: bool) -> dict:
    try:
        with Image.open(source) as image:
            frame = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        return {"texts": None}
    painted, counts = mask(frame, layout, blank=blank)
    content = io.BytesIO()
    Image.fromarray(painted).save(content, "PNG")
    replace_file(target, content.getvalue())
    return {"texts": counts}


def _scrubbed(case: Case, counts: Counter[str]) -> Case:
    def clean(text: str) -> str:
        text, found = scrub(text)
        counts.update(found)
        return text

    questions = [
        Question(question=clean(q.question), answer=clean(q.answer), dimension=q.dimension) for q in case.questions
    ]
    return replace(case, findings=clean(case.findings), impression=clean(case.impression), questions=tuple(questions))
