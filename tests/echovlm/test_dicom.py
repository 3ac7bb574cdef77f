"""DICOM: the real files inside pydicom, files written here, and damaged ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from examples.echovlm.cases import read_cases
from examples.echovlm.dicom import OPEN_FILES, DicomError, frames_of, key_frames, open_dicom_cases

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid  # noqa: E402

FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def pixels(name: str, count: int = 1) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames_of(FILES / name, count=count)]).astype(int)


def grey_file(path: Path, values: np.ndarray, photometric: str, bits: int, **elements: object) -> Path:
    """A one-frame ultrasound file with these grey values."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.6.1")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=["test"])
    dataset.Modality, dataset.PatientName = "US", "Secret^Name"
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 if bits <= 8 else 16
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelData = values.astype(np.uint8 if bits <= 8 else np.uint16).tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("examples_ybr_color.dcm", (240, 320, 3)),
        ("examples_rgb_color.dcm", (240, 320, 3)),
        ("examples_palette.dcm", (350, 800, 3)),
        ("examples_jpeg2k.dcm", (480, 640, 3)),
        ("ExplVR_BigEnd.dcm", (60, 80, 3)),
    ],
)
def test_every_open_file_decodes(name: str, shape: tuple[int, int, int]) -> None:
    [frame] = frames_of(FILES / name, count=1)
    assert (frame.height, frame.width, len(frame.getbands())) == shape and name in OPEN_FILES


def test_tissue_of_a_ybr_cine_is_grey() -> None:
    """Left as YBR, chrominance 128 would make tissue magenta and green."""
    scan = pixels("examples_ybr_color.dcm")[0, 40:190, 60:240]
    assert scan.max() > 150 and np.ptp(scan, axis=-1).mean() < 6


def test_power_doppler_is_yellow_to_red_in_both_codings() -> None:
    """The same picture as RGB and, twice as large, as JPEG 2000 with YBR_RCT: the colours agree."""
    rgb, jpeg = pixels("examples_rgb_color.dcm")[0], pixels("examples_jpeg2k.dcm")[0]
    for scan in (rgb[54:168], jpeg[108:336]):
        flow = scan[np.ptp(scan, axis=-1) > 120]
        assert len(flow) > 500 and (flow[:, 0] > flow[:, 1]).mean() > 0.9 and (flow[:, 1] > flow[:, 2]).mean() > 0.8
    halved = jpeg.reshape(240, 2, 320, 2, 3).mean(axis=(1, 3))
    assert np.corrcoef(halved[54:168].ravel(), rgb[54:168].ravel())[0, 1] > 0.9


def test_a_palette_file_is_looked_up() -> None:
    frame = pixels("examples_palette.dcm")[0]
    banner = frame[10, 2]
    assert banner[2] > banner[0] + 40, "the screen's blue banner; as indices it would be grey"
    assert np.ptp(frame[75:110, 480:560], axis=-1).mean() < 8 < frame[75:110, 480:560].mean()


def test_a_big_endian_file_keeps_its_colour_planes() -> None:
    frame = pixels("ExplVR_BigEnd.dcm")[0]
    assert np.median(frame[20:40], axis=(0, 1)).tolist() == [255, 255, 0], "saturated power Doppler"
    assert np.ptp(frame[0, :6], axis=-1).max() == 0, "grey tissue beside the colour box"


@pytest.mark.parametrize("frames", ["", "_2frame"])
def test_a_big_endian_palette_is_the_little_endian_one(frames: str) -> None:
    found, expected = (
        np.asarray(frames_of(get_testdata_file(f"OBXXXX1A{coding}{frames}.dcm", download=False), count=1)[0])
        for coding in ("_expb", "")
    )
    assert expected.any() and (found == expected).all()


def test_key_frames_of_a_cine_are_spread_and_differ() -> None:
    frames = pixels("examples_ybr_color.dcm", count=4)
    assert len(frames) == 4 and all(not np.array_equal(frames[0], later) for later in frames[1:])


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(30, 2, [0, 29]), (30, 4, [0, 10, 19, 29]), (30, 1, [0]), (2, 5, [0, 1]), (1, 3, [0])],
)
def test_key_frames(total: int, count: int, expected: list[int]) -> None:
    assert key_frames(total, count) == expected


def test_grey_values_of_eight_bits_are_kept(tmp_path: Path) -> None:
    values = np.array([[0, 50], [100, 200]])
    for photometric, shown in (("MONOCHROME2", values), ("MONOCHROME1", 255 - values)):
        [frame] = frames_of(grey_file(tmp_path / "grey.dcm", values, photometric, 8), count=2)
        assert np.array_equal(np.asarray(frame), np.repeat(shown[..., None], 3, axis=-1))


def test_sixteen_bits_are_windowed(tmp_path: Path) -> None:
    values = np.array([[0, 1000], [1500, 4000]])
    path = grey_file(tmp_path / "grey.dcm", values, "MONOCHROME2", 12, WindowCenter=1500, WindowWidth=1001)
    [frame] = frames_of(path, count=1)
    assert np.asarray(frame)[..., 0].tolist() == [[0, 0], [128, 255]]


def test_open_cases_carry_no_header_text(tmp_path: Path) -> None:
    cases = open_dicom_cases(tmp_path, frames=2)
    assert read_cases(tmp_path / "dicom.jsonl") == cases
    assert {c.split for c in cases} == {"show"} and {c.findings for c in cases} == {""}
    assert [len(c.images) for c in cases] == [2, 1, 1, 1, 1]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for name in OPEN_FILES:
        for element in pydicom.dcmread(FILES / name):
            if element.VR in ("PN", "LO", "UI", "DA") and len(str(element.value)) > 4:
                assert str(element.value).encode() not in written, element.tag


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not dicom", "not a DICOM file"),
        (None, "No such file"),
        (b"\0" * 128 + b"DICM" + b"\1" * 40, "without pixels"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.dcm"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DicomError, match=message):
        frames_of(path, count=1)


def test_damaged_pixels_are_an_error_that_quotes_nothing(tmp_path: Path) -> None:
    path = grey_file(tmp_path / "short.dcm", np.zeros((8, 8)), "MONOCHROME2", 8, Rows=4096)
    with pytest.raises(DicomError, match="pixels cannot be decoded") as caught:
        frames_of(path, count=1)
    assert "Secret" not in str(caught.value)


def test_a_report_without_pixels(tmp_path: Path) -> None:
    path = grey_file(tmp_path / "report.dcm", np.zeros((8, 8)), "MONOCHROME2", 8)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    with pytest.raises(DicomError, match="without pixels"):
        frames_of(path, count=1)


def test_count_below_one() -> None:
    with pytest.raises(DicomError, match="count: got 0"):
        frames_of(FILES / "ExplVR_BigEnd.dcm", count=0)


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DicomError, match=r'pip install "moe-adapter\[echovlm\]"'):
        frames_of("any.dcm", count=1)
