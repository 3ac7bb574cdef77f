"""A folder of PNG, JPEG and videos: one examination a folder, or one a file where they lie side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from examples.echovlm.corpus.importing.examination import Examination, File, Picture, SourceError
from examples.echovlm.corpus.store import Layout
from examples.echovlm.dicom import key_frames

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
VIDEOS = (".avi", ".mp4", ".mov", ".mkv", ".mpg", ".wmv")


def read_folders(root: Path) -> tuple[list[Examination], dict[str, str]]:
    """The examinations below `root`: patient/examination/file, examination/file, or files alone.

    Their names, by which reports call them, are the folder's path or the file's stem; and why a file is left, by name.
    """
    groups: dict[str, list[Path]] = {}
    left: dict[str, str] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        place = path.relative_to(root)
        if path.suffix.lower() not in (*IMAGES, *VIDEOS):
            left[place.as_posix()] = "neither image nor video"
            continue
        groups.setdefault(place.parent.as_posix() if len(place.parts) > 1 else place.stem, []).append(path)
    exams = []
    for key, paths in groups.items():
        patient = key.split("/")[0]
        keys = tuple(dict.fromkeys([key, key.split("/")[-1]]))
        exams.append(Examination(keys=keys, patient=patient, files=files(root, paths), source="folder"))
    return exams, left


def files(root: Path, paths: Iterable[Path]) -> tuple[File, ...]:
    return tuple(_file(root, path) for path in paths)


def read_image(path: Path) -> list[Picture]:
    """An image in RGB, without what else its file says. Raises SourceError."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise SourceError("image cannot be decoded") from None
    return [Picture(image=Image.fromarray(pixels))]


def read_video(path: Path, count: int) -> list[Picture]:
    """At most `count` frames of a video, evenly spread over those that decode. Raises SourceError."""
    total = sum(1 for _ in _frames(path))  # counted: what a container states is often an estimate
    if not total:
        raise SourceError("video cannot be decoded")
    wanted = key_frames(total, count)
    chosen = {i: frame for i, frame in enumerate(_frames(path)) if i in wanted}
    return [
        Picture(image=Image.fromarray(chosen[i]), layout=Layout(frame=i, frames=total)) for i in wanted if i in chosen
    ]


def _frames(path: Path) -> Iterable[np.ndarray]:
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        while (read := video.read())[0]:
            yield np.ascontiguousarray(read[1][..., ::-1])
    finally:
        video.release()


def _file(root: Path, path: Path) -> File:
    name = path.relative_to(root).as_posix()
    if path.suffix.lower() in VIDEOS:
        return File(name=name, read=lambda count: read_video(path, count))
    return File(name=name, read=lambda count: read_image(path))
