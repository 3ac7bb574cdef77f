"""Real ultrasound: DICOM stills and cines as key frames, in the case format, with nothing of the header's text.

The files that ship inside pydicom's own package serve as open examples: palette, RGB, YBR, JPEG 2000 and
big-endian. They carry no report, so their cases are of split "show".
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.echovlm.cases import Case, write_cases
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True)
class OpenFile:
    """What a file of pydicom's package shows, and where its scan is: seen by eye, not read from a header.

    `box` is (left, top, right, bottom) in pixels; what is burned in around it (names, dates) stays out.
    """

    patient: str
    organ: str
    box: tuple[int, int, int, int]


OPEN_FILES = {
    "examples_ybr_color.dcm": OpenFile("dicom-a", "heart", (30, 14, 250, 202)),
    "examples_rgb_color.dcm": OpenFile("dicom-b", "lymph node", (20, 54, 296, 168)),
    "examples_palette.dcm": OpenFile("dicom-c", "obstetrics", (320, 60, 790, 350)),
    "examples_jpeg2k.dcm": OpenFile("dicom-b", "lymph node", (40, 108, 592, 336)),
    "ExplVR_BigEnd.dcm": OpenFile("dicom-d", "unknown", (0, 0, 80, 60)),
}
CASES = "dicom.jsonl"
INSTALL = 'pip install "moe-adapter[echovlm]"'


class DicomError(MoEAdapterError):
    """A file that cannot be read as DICOM images: names the file and what to do."""


def frames_of(path: str | os.PathLike[str], *, count: int) -> list[Image.Image]:
    """`count` frames of a DICOM file as RGB images, evenly spread from first to last; fewer if it has fewer.

    Palette, YBR, RGB and grey data in any transfer syntax that pydicom's plugins decode; grey data is windowed
    as the file asks and brought to 8 bits.
    Raises DicomError if the file is missing, not DICOM, without pixels or not decodable, or count is below 1.
    """
    if count < 1:
        raise DicomError(f"count: got {count}; expected 1 or more key frames; ask for at least one")
    pydicom = _pydicom()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote header values
            header = pydicom.dcmread(path)
            if "PixelData" not in header:
                raise DicomError(f"{path}: got DICOM without pixels; expected an image or a cine")
            total = int(header.get("NumberOfFrames") or 1)
            frames = pydicom.pixels.iter_pixels(header, indices=key_frames(total, count))
            return [Image.fromarray(_rgb(frame, header)) for frame in frames]
    except DicomError:
        raise
    except OSError as error:
        raise DicomError(f"{path}: {error.strerror or 'cannot be read'}; check the path") from None
    except pydicom.errors.InvalidDicomError:
        raise DicomError(f"{path}: not a DICOM file; expected a DICOM image or cine") from None
    except Exception as error:  # decoders raise anything on damaged data, and their words may quote the header
        raise DicomError(f"{path}: pixels cannot be decoded ({type(error).__name__}); export the file again") from None


def key_frames(total: int, count: int) -> list[int]:
    """Indices of at most `count` of `total` frames, evenly spread, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def open_dicom_cases(out_dir: str | os.PathLike[str], *, frames: int = 2) -> list[Case]:
    """The open files as "show" cases: writes their key frames and dicom.jsonl to `out_dir`, returns the cases."""
    package = Path(_pydicom().__file__).parent / "data" / "test_files"
    out = Path(out_dir)
    (out / "frames").mkdir(parents=True, exist_ok=True)
    cases = []
    for name, known in OPEN_FILES.items():
        images = []
        for number, frame in enumerate(frames_of(package / name, count=frames)):
            images.append(f"frames/{Path(name).stem}-{number}.png")
            frame.crop(known.box).save(out / images[-1])
        cases.append(
            Case(
                id=Path(name).stem,
                patient=known.patient,
                hospital="open",
                organ=known.organ,
                language="en",
                images=tuple(images),
                findings="",
                source=f"dicom:{name}",
                split="show",
            )
        )
    write_cases(out / CASES, cases)
    return cases


def _rgb(frame: np.ndarray, header: Any) -> np.ndarray:
    """One decoded frame as H x W x 3 uint8. YBR has become RGB in the decoder already."""
    from pydicom.pixels import processing

    if header.PhotometricInterpretation == "PALETTE COLOR":
        coloured, bits = processing.apply_color_lut(frame, header), header.RedPaletteColorLookupTableDescriptor[2]
        if bits == 16 and not header.original_encoding[1]:
            coloured = coloured.byteswap()  # pydicom reads a big-endian file's table as a little-endian one
        return _eight_bits(coloured, 0, 2**bits - 1)
    if header.SamplesPerPixel == 3:
        return _eight_bits(frame, 0, 2**header.BitsStored - 1)
    grey = processing.apply_voi_lut(processing.apply_modality_lut(frame, header), header)
    limits = (0, 255) if header.BitsStored == 8 else (float(grey.min()), float(grey.max()))
    grey = _eight_bits(grey, *limits)
    if header.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, axis=-1)


def _eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (values.astype(np.float32) - low) / max(high - low, 1)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise DicomError(f"reading DICOM needs pydicom; got {error}; install it: {INSTALL}") from error
    return pydicom
