"""Open ultrasound sets as a user downloads and unpacks them: pictures and labels, no reports.

What they label becomes an impression, and attributes where docs/cases.md has a word for it. Masks are left out. Where a
set does not say whose an image is, every image counts as a patient.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from examples.echovlm.corpus.importing.examination import Examination, File, Picture, SourceError
from examples.echovlm.corpus.importing.folders import files
from examples.echovlm.corpus.store import Layout
from examples.echovlm.dicom import INSTALL, key_frames
from moe_adapter.errors import MoEAdapterError


def busi(root: Path) -> list[Examination]:
    """BUSI, Dataset_BUSI_with_GT: benign|malignant|normal/"benign (1).png" beside its masks."""
    told = {
        "benign": ("Benign breast mass.", "mass"),
        "malignant": ("Malignant breast mass.", "mass"),
        "normal": ("Normal breast.", "none"),
    }
    found = []
    for path in _images(root, "*/*.png"):
        if path.parent.name in told and "_mask" not in path.stem:
            impression, lesion = told[path.parent.name]
            found.append(_still(root, path, "busi", "breast", impression, {"lesion": lesion}))
    return found


def tn3k(root: Path) -> list[Examination]:
    """TN3K: trainval-image/0000.jpg and test-image/0000.jpg, beside folders of masks; a nodule in each."""
    paths = [p for part in ("trainval", "test") for p in _images(root, f"{part}-image/*.jpg")]
    return [_still(root, path, "tn3k", "thyroid", "Thyroid nodule.", {"lesion": "nodule"}) for path in paths]


def camus(root: Path) -> list[Examination]:
    """CAMUS in NIfTI: patient0001/patient0001_2CH_half_sequence.nii.gz, the same of 4CH, and Info_2CH.cfg."""
    found = []
    for folder in sorted(p for p in root.glob("patient*") if p.is_dir()):
        cines = [folder / f"{folder.name}_{view}_half_sequence.nii.gz" for view in ("2CH", "4CH")]
        info = folder / "Info_2CH.cfg"
        lines = info.read_text().splitlines() if info.is_file() else []
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        found.append(
            Examination(
                keys=(folder.name,),
                patient=folder.name,
                files=tuple(_nifti(root, path) for path in cines if path.is_file()),
                source="camus",
                organ="heart",
                impression=_ejection(told.get("EF", "")),
            )
        )
    return found


def echonet(root: Path) -> list[Examination]:
    """EchoNet-Dynamic: Videos/*.avi, and FileList.csv with a video's name and ejection fraction a line."""
    listed = root / "FileList.csv"
    if not listed.is_file():
        return []
    with listed.open(newline="", encoding="utf-8-sig") as file:
        rows = [(Path(row["FileName"]).stem, row["EF"]) for row in csv.DictReader(file)]
    return [
        Examination(
            keys=(name,),
            patient=name,
            files=files(root, [root / "Videos" / f"{name}.avi"]),
            source="echonet-dynamic",
            organ="heart",
            impression=_ejection(fraction),
        )
        for name, fraction in rows
    ]


def breastmnist(root: Path) -> list[Examination]:
    """BreastMNIST: breastmnist.npz or a larger one such as breastmnist_224.npz; 0 is malignant, 1 normal or benign."""
    paths = sorted(root.glob("breastmnist*.npz"), key=lambda path: path.stat().st_size)
    if not paths:
        return []
    told = {0: "Malignant breast lesion.", 1: "Normal breast or benign lesion."}
    with np.load(paths[-1]) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    return [
        Examination(
            keys=(f"{part}-{i}",),
            patient=f"{part}-{i}",
            files=(_array(f"{paths[-1].name}:{part}:{i}", image),),
            source="breastmnist",
            organ="breast",
            impression=told[int(label)],
        )
        for part in ("train", "val", "test")
        for i, (image, label) in enumerate(
            zip(content[f"{part}_images"], content[f"{part}_labels"].ravel(), strict=True)
        )
    ]


OPEN_SETS: dict[str, Callable[[Path], list[Examination]]] = {
    "busi": busi,
    "tn3k": tn3k,
    "camus": camus,
    "echonet": echonet,
    "breastmnist": breastmnist,
}


def read_open_set(name: str, root: Path) -> list[Examination]:
    """The examinations of a set of OPEN_SETS. Raises MoEAdapterError if its folder is not laid out as it should be."""
    reader = OPEN_SETS[name]
    try:
        found = reader(root)
    except (ValueError, KeyError) as error:  # of a table or an archive that is another's, or cut off
        raise MoEAdapterError(f"{root}: cannot be read ({error!r}); expected {reader.__doc__}") from None
    if found:
        return found
    raise MoEAdapterError(f"{root}: got nothing of {reader.__doc__} Name the folder that holds these.")


def _images(root: Path, pattern: str) -> Iterator[Path]:
    return iter(sorted(root.glob(pattern)))


def _still(root: Path, path: Path, source: str, organ: str, impression: str, attributes: dict[str, str]) -> Examination:
    key = path.relative_to(root).with_suffix("").as_posix()
    return Examination(
        keys=tuple(dict.fromkeys([key, path.stem])),
        patient=key,
        files=files(root, [path]),
        source=source,
        organ=organ,
        impression=impression,
        attributes=attributes,
    )


def _ejection(fraction: str) -> str:
    try:
        return f"Left ventricular ejection fraction {float(fraction):.0f} %."
    except ValueError:
        return ""


def _nifti(root: Path, path: Path) -> File:
    def read(count: int) -> list[Picture]:
        try:
            import nibabel
        except ImportError as error:
            raise MoEAdapterError(f"reading CAMUS needs nibabel; got {error}; install it: {INSTALL}") from error
        try:
            volume = np.asarray(nibabel.load(path).dataobj)
        except Exception:  # nibabel raises what its decompressors do
            raise SourceError("NIfTI cannot be decoded") from None
        frames = np.clip(volume.reshape(*volume.shape[:2], -1), 0, 255).astype(np.uint8)
        indices = key_frames(frames.shape[-1], count)
        return [_picture(frames[..., i].T, i, frames.shape[-1]) for i in indices]  # stored column by column

    return File(name=path.relative_to(root).as_posix(), read=read)


def _array(name: str, image: np.ndarray) -> File:
    return File(name=name, read=lambda count: [_picture(image)])


def _picture(grey: np.ndarray, frame: int = 0, frames: int = 1) -> Picture:
    return Picture(image=Image.fromarray(grey).convert("RGB"), layout=Layout(frame=frame, frames=frames))
