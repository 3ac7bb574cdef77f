"""What a later batch is compared with, in one file: settings, ids and vocabulary as JSON beside the index's arrays."""

from __future__ import annotations

import json
import os
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from examples.echovlm.corpus.deduplication.blocks import Block
from examples.echovlm.corpus.deduplication.errors import DeduplicationError
from examples.echovlm.corpus.deduplication.ordered import CHUNK, Deduplicator
from examples.echovlm.files import replaced

FORMAT = 1


def save_state(deduplicator: Deduplicator, path: str | os.PathLike[str]) -> Path:
    """Write all that `load_state` needs to go on as if there had been no break; atomic."""
    path = Path(path)
    header = {
        "format": FORMAT,
        "settings": deduplicator.describe(),
        "ids": deduplicator.ids,
        "vocabulary": list(deduplicator.measure.vocabulary),
    }
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    if blocks := deduplicator.index.blocks:
        whole = Block.join(blocks)
        text = "".join(whole.text).encode("utf-8", "surrogatepass")
        arrays |= {"position": whole.position, "size": whole.size, "bits": whole.bits}
        arrays |= {"text": np.frombuffer(text, dtype=np.uint8), "length": np.array([len(t) for t in whole.text])}
    with replaced(path) as file:
        np.savez(file, **arrays)
    return path


def load_state(deduplicator: Deduplicator, path: str | os.PathLike[str]) -> None:
    """Make a fresh deduplicator know what the saved one knew.

    Raises: DeduplicationError on a file that is no such state, or of one with other settings.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(arrays["header"].tobytes())
        known = header["format"] == FORMAT
        settings, ids, vocabulary = header["settings"], header["ids"], header["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DeduplicationError(f"{path}: no saved state, or damaged ({error}); start with a new file") from error
    if not known:
        raise DeduplicationError(f"{path}: got format {header['format']}, expected {FORMAT}; use a newer version")
    if settings != deduplicator.describe():
        wrong = {name: settings.get(name) for name in settings | deduplicator.describe()}
        wrong = {n: v for n, v in wrong.items() if v != deduplicator.describe().get(n)}
        raise DeduplicationError(f"{path}: made with {wrong}; use the same settings, or a new file")
    deduplicator.register(ids)
    deduplicator.measure.vocabulary.update({token: code for code, token in enumerate(vocabulary)})
    if "position" in arrays:
        for block in _blocks(arrays):
            deduplicator.index.add(block)


def _blocks(arrays: dict[str, np.ndarray]) -> list[Block]:
    """The instances in the order of arrival again, in blocks."""
    characters = arrays["text"].tobytes().decode("utf-8", "surrogatepass")
    ends = np.cumsum(arrays["length"]).tolist()
    text = np.empty(len(ends), dtype=object)
    text[:] = [characters[start:end] for start, end in pairwise([0, *ends])]
    whole = Block(arrays["position"], arrays["size"], arrays["bits"], text)
    order = np.argsort(whole.position)
    parts = (order[start : start + CHUNK] for start in range(0, len(order), CHUNK))
    return [Block.join([whole.take(rows)]) for rows in parts]
