"""Burned-in text, by RapidOCR: its models lie inside its wheel, so that nothing is downloaded and nothing sent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from examples.echovlm.dicom import INSTALL
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True)
class Box:
    """Where text stands, in pixels, right and bottom excluded."""

    left: int
    top: int
    right: int
    bottom: int

    def of(self, frame: np.ndarray) -> np.ndarray:
        """The part of a frame, or of a mask, H x W x …."""
        return frame[self.top : self.bottom, self.left : self.right]


def find_text(frame: np.ndarray) -> list[Box]:
    """Where text stands in a frame (H x W x 3, uint8). Raises MoEAdapterError without rapidocr."""
    found = _engine()(_bgr(frame), use_det=True, use_cls=False, use_rec=False)
    corners = [np.asarray(box) for box in (() if found.boxes is None else found.boxes)]
    ends = [(*np.floor(c.min(axis=0)).astype(int), *np.ceil(c.max(axis=0)).astype(int)) for c in corners]
    return [Box(*map(int, end)) for end in ends if end[2] > end[0] and end[3] > end[1]]


def read_text(part: np.ndarray) -> str:
    """What a part of a frame says, one line, Chinese or Latin. Not to be logged."""
    found = _engine()(_bgr(part), use_det=False, use_cls=False, use_rec=True)
    return " ".join(found.txts or ())


def _bgr(frame: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(frame[..., ::-1])


@cache
def _engine() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise MoEAdapterError(f"finding burned-in text needs rapidocr; got {error}; install it: {INSTALL}") from error
    engine = RapidOCR()
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    return engine
