"""Write a whole phantom set: PNG frames and cases.jsonl, the same for the same arguments."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from examples.echovlm.cases import Case, write_cases
from examples.echovlm.phantom import breast, gynaecology, heart, kidney, liver, thyroid, vessel
from examples.echovlm.phantom.attributes import ORGANS, draw
from examples.echovlm.phantom.bmode import bmode
from examples.echovlm.phantom.body import Body
from examples.echovlm.phantom.doppler import overlay
from examples.echovlm.phantom.reports import Writer
from examples.echovlm.phantom.screen import HOSPITALS, SCREENS, body_mark, depth_scale, show
from moe_adapter.errors import MoEAdapterError

PAINTERS = {
    "thyroid": thyroid,
    "breast": breast,
    "liver": liver,
    "kidney": kidney,
    "gynaecology": gynaecology,
    "vessel": vessel,
    "heart": heart,
}
CHINESE_SHARE = 1 / 3
CASES = "cases.jsonl"


def render(
    organ: str, attributes: dict[str, str], *, hospital: str, seed: tuple[int, ...], view: int = 0, size: int = 224
) -> np.ndarray:
    """One frame, size x size x 3 uint8. The same seed gives the same patient; `view` numbers the frames."""
    painter, screen = PAINTERS[organ], SCREENS[hospital]
    frame_rng = np.random.default_rng((*seed, 1 + view))
    shift = float(frame_rng.uniform(-0.02, 0.02)) * painter.PROBE.width_mm
    body = Body(painter.PROBE, painter.BACKGROUND, shift)
    painter.paint(body, attributes, view, np.random.default_rng(seed))
    image = show(painter.PROBE.to_image(bmode(body, frame_rng), size), screen)
    if body.colour_box.any():
        image = overlay(image, body, frame_rng)
    depth_scale(image, painter.PROBE, screen)
    if organ == "breast":
        body_mark(image, attributes["side"])
    return image.astype(np.uint8)


def generate_cases(
    out_dir: str | Path,
    *,
    cases_per_organ: int,
    test_share: float = 0.2,
    frames: int = 2,
    size: int = 224,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the frames and the case file of all seven organs; returns the path of cases.jsonl.

    `frames` (1 to 4) key frames a case, `size` pixels a side; `test_share` of each organ's cases, by patient, are
    the test split. `progress(done, total)` is called after every case.
    Raises MoEAdapterError on a number out of its range.
    """
    for name, value, low, high in (
        ("cases_per_organ", cases_per_organ, 1, 9999),
        ("test_share", test_share, 0, 1),
        ("frames", frames, 1, 4),
        ("size", size, 56, 1024),
    ):
        if not low <= value <= high:
            raise MoEAdapterError(f"{name}: got {value}; expected a number from {low} to {high}; choose one")
    out = Path(out_dir)
    (out / "frames").mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    for organ in ORGANS:
        test = _test_patients(organ, cases_per_organ, test_share, seed)
        for number in range(cases_per_organ):
            split = "test" if _patient(number) in test else "train"
            case = describe(organ, number, seed=seed, frames=frames, split=split)
            for view, image in enumerate(case.images):
                patient = _seed(seed, case.id)
                frame = render(organ, case.attributes, hospital=case.hospital, seed=patient, view=view, size=size)
                Image.fromarray(frame).save(out / image, compress_level=1)
            cases.append(case)
            if progress:
                progress(len(cases), cases_per_organ * len(ORGANS))
    return write_cases(out / CASES, cases)


def describe(organ: str, number: int, *, seed: int, frames: int, split: str) -> Case:
    """The organ's case of this number: what its frames will show and its report says, before any is rendered."""
    name = f"{organ}-{number:04d}"
    rng = np.random.default_rng((*_seed(seed, name), 0))
    attributes = draw(organ, number, rng)
    hospital = str(rng.choice(HOSPITALS))
    language = "zh" if rng.random() < CHINESE_SHARE else "en"
    writer = Writer(organ=organ, language=language, hospital=hospital, attributes=attributes)
    return Case(
        id=name,
        patient=f"{organ}-p{_patient(number):04d}",
        hospital=hospital,
        organ=organ,
        language=language,
        images=tuple(f"frames/{name}-{view}.png" for view in range(frames)),
        findings=writer.findings(),
        impression=writer.impression(),
        source="phantom",
        split=split,
        attributes=attributes,
        questions=writer.questions(rng),
    )


def _seed(seed: int, name: str) -> tuple[int, int]:
    return seed, zlib.crc32(name.encode())


def _patient(number: int) -> int:
    """The patient of a case: each has one case and then two, in turn."""
    return number - number // 3 - (number % 3 == 2)


def _test_patients(organ: str, cases: int, share: float, seed: int) -> set[int]:
    """Patients drawn until their cases make up the share."""
    patients = [_patient(number) for number in range(cases)]
    order = np.random.default_rng(_seed(seed, organ)).permutation(len(set(patients)))
    chosen: set[int] = set()
    for patient in order:
        if sum(p in chosen for p in patients) >= round(share * cases):
            break
        chosen.add(int(patient))
    return chosen
