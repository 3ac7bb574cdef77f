"""What the steps hand to each other: a folder with the cases, the layout of their frames, and a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from examples.echovlm.cases import Case, read_cases, write_cases
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.corpus.regions import Region
from examples.echovlm.journal import Journal
from moe_adapter.directory import replace_file
from moe_adapter.errors import MoEAdapterError

CASES, LAYOUTS, FRAMES = "cases.jsonl", "layouts.jsonl", "frames"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All that is kept of the header of a frame's file: numbers, and words of ours.

    `regions` is None without the tag (0018,6011). `burned_in` is "YES", "NO" or "unknown", which an absent tag is.
    `organs`: those that the header names. `frame` of `frames`: which one of a cine.
    """

    regions: tuple[Region, ...] | None = None
    burned_in: str = "unknown"
    organs: tuple[str, ...] = ()
    frame: int = 0
    frames: int = 1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Cases whose images are paths from `folder`, and the layout of each image; the bare one where none is known."""

    folder: Path
    cases: tuple[Case, ...]
    layouts: Mapping[str, Layout]

    def layout(self, image: str) -> Layout:
        return self.layouts.get(image, Layout())


def frame_name(id: str) -> str:
    """The start of a frame's file name, for a case whose id may hold anything."""
    return hashlib.sha256(id.encode()).hexdigest()[:16]


def new_folder(path: Path) -> Path:
    """An empty folder for a step's output. Raises MoEAdapterError if something is in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MoEAdapterError(f"--out {path}: it is not empty; name a new folder, so that nothing is overwritten")
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_settings(journal: Journal, settings: dict[str, Any], out: Path) -> None:
    """That a journal was begun with these settings, which it notes. Raises MoEAdapterError if it was not."""
    begun = journal.get("settings")
    if begun is None:
        journal.append("settings", settings)
    elif {name: begun.get(name) for name in settings} != settings:
        raise MoEAdapterError(f"--out {out}: holds a run begun with other settings; name a new folder")


def layout_of(row: Mapping[str, Any]) -> Layout:
    """A layout as JSON has it."""
    regions = row["regions"]
    regions = None if regions is None else tuple(Region(**region) for region in regions)
    return Layout(**{**row, "regions": regions, "organs": tuple(row["organs"])})


def read_corpus(paths: Iterable[Path], *, seen_from: Path) -> Corpus:
    """The cases of one or more steps, each a folder or its cases.jsonl, with image paths as seen from a folder.

    Raises MoEAdapterError on a faulty case file, or an id or a patient that two of them hold differently.
    """
    cases: list[Case] = []
    layouts: dict[str, Layout] = {}
    for path in paths:
        file = path / CASES if path.is_dir() else path
        moved = Path(os.path.relpath(file.parent.resolve(), seen_from.resolve()))
        for case in read_cases(file):
            cases.append(replace(case, images=tuple((moved / image).as_posix() for image in case.images)))
        for image, layout in _read_layouts(file.parent / LAYOUTS).items():
            layouts[(moved / image).as_posix()] = layout
    _check_together(cases)
    return Corpus(folder=seen_from, cases=tuple(cases), layouts=layouts)


def write_corpus(folder: Path, cases: Iterable[Case], layouts: Mapping[str, Layout], manifest: Manifest) -> None:
    """Write the cases, the layouts of their images, and the manifest, which is last: with it the step is whole."""
    cases = list(cases)
    write_cases(folder / CASES, cases)
    known = [(image, layouts[image]) for case in cases for image in case.images if image in layouts]
    lines = (json.dumps({"image": image} | asdict(layout)) + "\n" for image, layout in known)
    replace_file(folder / LAYOUTS, "".join(lines).encode())
    manifest.write(folder)


def _read_layouts(path: Path) -> dict[str, Layout]:
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            image = row.pop("image")
            found[image] = layout_of(row)
        except (ValueError, TypeError, KeyError) as error:
            raise MoEAdapterError(
                f"{path}:{number}: got no layout ({type(error).__name__}); expected the import's output"
            ) from error
    return found


def _check_together(cases: list[Case]) -> None:
    ids: set[str] = set()
    splits: dict[str, str] = {}
    for case in cases:
        if case.id in ids:
            raise MoEAdapterError(f"case {case.id!r} is in two of the inputs; expected each case once; leave one out")
        ids.add(case.id)
        if splits.setdefault(case.patient, case.split) != case.split:
            raise MoEAdapterError(
                f"patient {case.patient!r} is of {splits[case.patient]!r} in one input, of {case.split!r} in another; "
                "import both with the same --private folder, --seed and --test-share"
            )
