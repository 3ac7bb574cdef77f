"""Screens of an ultrasound machine drawn here, and DICOM files that show them, with planted identifiers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage

Box = tuple[int, int, int, int]
NAME, INSTITUTION, DATE, NUMBER = "Zabriskie^Quentin", "Elsewhere Memorial Hospital", "19590417", "MRN4471182"
CHINESE = ("ISO_IR 192", "ISO 2022 IR 58", "GB18030")  # character sets
SECRETS = ("zabriskie", "quentin", "elsewhere", "19590417", "4471182", "okonkwo", "1959")


def tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Speckle, height x width."""
    noise = np.random.default_rng(seed).rayleigh(size=(height, width))
    return np.clip(ndimage.gaussian_filter(noise, 1.5) * 70, 20, 250).astype(np.uint8)


def screen(boxes: Sequence[Box] = ((120, 60, 520, 400),), *, height: int = 480, width: int = 640) -> np.ndarray:
    """A black screen with tissue in the boxes (left, top, right, bottom), and a grey bar at its right edge."""
    frame = np.zeros((height, width), np.uint8)
    for seed, (left, top, right, bottom) in enumerate(boxes):
        frame[top:bottom, left:right] = tissue(bottom - top, right - left, seed)
    frame[100:300, width - 20 : width - 10] = np.linspace(255, 0, 200).astype(np.uint8)[:, None]
    return np.repeat(frame[..., None], 3, axis=-1)


def write_on(frame: np.ndarray, place: tuple[int, int], words: str, size: int = 20) -> np.ndarray:
    """The frame with words burned in, their left upper corner at (x, y)."""
    image = Image.fromarray(frame)
    ImageDraw.Draw(image).text(place, words, fill="white", font=ImageFont.load_default(size))
    return np.array(image)


def header(study: str = "1", patient: str = NUMBER) -> Dataset:
    """A header full of what must not get out, in its sequences and private elements too."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.6.1")
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study", study])
    dataset.AccessionNumber = f"A{study}"
    dataset.Modality, dataset.SpecificCharacterSet = "US", "ISO_IR 192"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = NAME, patient, DATE
    dataset.InstitutionName, dataset.ReferringPhysicianName = INSTITUTION, "Okonkwo^Adaeze"
    dataset.StudyDate, dataset.StudyDescription = DATE, f"Breast of {NAME}"
    nested = Dataset()
    nested.PhysiciansOfRecord = "Okonkwo^Adaeze"
    dataset.RequestAttributesSequence = Items([nested])
    dataset.private_block(0x0011, "Elsewhere", create=True).add_new(1, "LO", NAME)
    return dataset


def write_dicom(path: Path, frames: np.ndarray, dataset: Dataset | None = None, **elements: object) -> Path:
    """An ultrasound file with these frames, N x H x W x 3, or one of H x W x 3."""
    frames = frames[None] if frames.ndim == 3 else frames
    dataset = header() if dataset is None else dataset
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape[:3]
    dataset.SamplesPerPixel, dataset.PlanarConfiguration, dataset.PixelRepresentation = 3, 0, 0
    dataset.PhotometricInterpretation = "RGB"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = frames.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def region(box: Box, data: int = 1, format: int = 1) -> Dataset:
    """An item of (0018,6011)."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = format, data
    item.RegionLocationMinX0, item.RegionLocationMinY0, item.RegionLocationMaxX1, item.RegionLocationMaxY1 = box
    return item


def write_structured_report(path: Path, texts: Mapping[str, str], study: str = "1") -> Path:
    """An SR of the study with a text for each code: TEXT in a CONTAINER, as in TID 2000."""
    dataset = header(study)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.88.11")
    dataset.Modality = "SR"
    dataset.ContentSequence = Items(
        [_item("CONTAINER", code, _item("TEXT", "121071", text=t)) for code, t in texts.items()]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def recode(path: Path, charset: str) -> Path:
    """The file with its texts in GB18030, or in ISO 2022 IR 58 with the escapes that pydicom does not write."""

    def escape(_: Dataset, element: DataElement) -> None:
        if element.VR in ("PN", "LO", "UT"):
            coded = re.sub(r"[^\x00-\x7f]+", lambda run: f"\x1b$)A{run[0]}", str(element.value)).encode("gb2312")
            element.value = coded.decode("latin-1")

    dataset = pydicom.dcmread(path)
    dataset.decode()
    escaped = charset == "ISO 2022 IR 58"
    dataset.SpecificCharacterSet = "ISO_IR 100" if escaped else charset
    if escaped:
        dataset.walk(escape)
    dataset.save_as(path)
    if escaped:
        named = path.read_bytes().replace(b"CS\x0a\x00ISO_IR 100", b"CS\x10\x00\\ISO 2022 IR 58 ")
        path.write_bytes(named)
    return path


def _item(kind: str, code: str, *content: Dataset, text: str = "") -> Dataset:
    item, name = Dataset(), Dataset()
    name.CodeValue, name.CodingSchemeDesignator, name.CodeMeaning = code, "DCM", "heading"
    item.ValueType, item.ConceptNameCodeSequence = kind, Items([name])
    if content:
        item.ContentSequence = Items(content)
    if text:
        item.TextValue = text
    return item
