"""Cases and their frames in one Parquet file, by Hugging Face datasets, and back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from examples.echovlm.cases import Case, Question, write_cases
from examples.echovlm.corpus.store import CASES, FRAMES, Corpus, frame_name
from examples.echovlm.dicom import INSTALL
from moe_adapter.directory import replace_file
from moe_adapter.errors import MoEAdapterError


def write_parquet(corpus: Corpus, path: Path) -> None:
    """Write the cases with their frames into a Parquet file, which `datasets.load_dataset` reads as well.

    Frames are of the feature Image; attributes, whose names differ from case to case, are JSON in a string.
    """
    datasets = _datasets()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        rows = datasets.Dataset.from_generator(
            _rows, gen_kwargs={"corpus": corpus}, features=_features(datasets), cache_dir=folder
        )
        rows.to_parquet(Path(folder) / path.name)
        os.replace(Path(folder) / path.name, path)


def read_parquet(path: Path, out: Path) -> list[Case]:
    """Write the cases and frames of such a file into `out`, as a case file. Raises MoEAdapterError if it is none."""
    datasets = _datasets()
    with tempfile.TemporaryDirectory(dir=out) as folder:
        try:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=folder)
            rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
        except Exception as error:  # of pyarrow or of datasets
            told = f"{path}: got no cases in Parquet ({type(error).__name__}); expected a file of pack"
            raise MoEAdapterError(told) from None
        cases = [_case(row, out) for row in rows]
    write_cases(out / CASES, cases)
    return cases


def _features(datasets: Any) -> Any:
    text = datasets.Value("string")
    question = {"question": text, "answer": text, "dimension": text}
    strings = [name for name in Case.__dataclass_fields__ if name not in ("images", "questions")]
    return datasets.Features({name: text for name in strings} | {"images": [datasets.Image()], "questions": [question]})


def _rows(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for case in corpus.cases:
        frames = [
            {"bytes": (corpus.folder / image).read_bytes(), "path": f"{number}{PurePosixPath(image).suffix}"}
            for number, image in enumerate(case.images)
        ]
        yield asdict(case) | {"images": frames, "attributes": json.dumps(case.attributes, ensure_ascii=False)}


def _case(row: dict[str, Any], out: Path) -> Case:
    (out / FRAMES).mkdir(exist_ok=True)
    images = []
    for frame in row["images"]:
        images.append(f"{FRAMES}/{frame_name(row['id'])}-{frame['path']}")
        replace_file(out / images[-1], frame["bytes"])
    questions = tuple(Question(**question) for question in row["questions"])
    return Case(**row | {"images": tuple(images), "questions": questions, "attributes": json.loads(row["attributes"])})


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MoEAdapterError(f"Parquet needs datasets; got {error}; install it: {INSTALL}") from error
    return datasets
