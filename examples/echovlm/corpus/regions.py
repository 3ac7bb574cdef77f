"""A screen's regions as DICOM states them, (0018,6011): where the scan is, and whether the frame bears it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BOX = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
NUMBERS = ("RegionSpatialFormat", "RegionDataType", *BOX)  # those of Region, in its order
TWO_D = 1  # Region Spatial Format (0018,6012)
TISSUE, COLOUR_FLOW = 1, 2  # Region Data Type (0018,6014); an ECG is 0xA, a grey bar 0xD, a colour bar 0xE
SAME_DISPLAY = 0.5  # share of the smaller box: a colour box lies on the tissue that it belongs to


@dataclass(frozen=True)
class Region:
    """One region: Region Spatial Format, Region Data Type, and its box in pixels, right and bottom included."""

    format: int
    data: int
    left: int
    top: int
    right: int
    bottom: int

    @property
    def shows_scan(self) -> bool:
        return self.format == TWO_D and self.data in (TISSUE, COLOUR_FLOW)

    def fits(self, width: int, height: int) -> bool:
        """Whether the box lies in a frame of that size; if not, the frame was resized or cropped after the scan."""
        return 0 <= self.left < self.right < width and 0 <= self.top < self.bottom < height


def regions_of(header: Any) -> tuple[Region, ...] | None:
    """The regions of a DICOM header, numbers only; None without the tag."""
    if "SequenceOfUltrasoundRegions" not in header:
        return None
    items = header.SequenceOfUltrasoundRegions or ()
    return tuple(Region(*(int(item.get(name) or 0) for name in NUMBERS)) for item in items)


def displays(regions: Sequence[Region]) -> list[Region]:
    """The regions that show a scan, those that lie on one another as one: the larger."""
    found: list[Region] = []
    for region in sorted((r for r in regions if r.shows_scan), key=_area, reverse=True):
        if not any(_overlap(region, other) > SAME_DISPLAY * _area(region) for other in found):
            found.append(region)
    return found


def _area(region: Region) -> int:
    return max(region.right - region.left, 0) * max(region.bottom - region.top, 0)


def _overlap(a: Region, b: Region) -> int:
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    return max(width, 0) * max(height, 0)
