"""What every kind of source is read into: examinations with pictures, and reports that name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from examples.echovlm.corpus.store import Layout
from moe_adapter.errors import MoEAdapterError


class SourceError(MoEAdapterError):
    """A file that cannot be read: says what is wrong with it, and quotes nothing that it holds."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A frame in RGB, and the layout that its file states."""

    image: Image.Image
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report as it was exported; `keys` are the examinations' names that it can be meant for.

    `words`: what must not stay in its text, by kind ("name", "institution", "id").
    """

    keys: tuple[str, ...]
    findings: str
    impression: str = ""
    organ: str = ""
    language: str = ""
    patient: str = ""
    hospital: str = ""
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File:
    """A source file: `read(count)` gives its key frames, evenly spread, and raises SourceError.

    `name` goes into the private key alone.
    """

    name: str
    read: Callable[[int], Sequence[Picture]]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The files of one examination. `keys` are names by which a report may call it, the first its own.

    `keys`, `patient` and `words` are the hospital's, and only their pseudonyms are written. `impression` and
    `attributes` hold the labels of an open set.
    """

    keys: tuple[str, ...]
    patient: str
    files: tuple[File, ...]
    source: str
    organ: str = ""
    impression: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
