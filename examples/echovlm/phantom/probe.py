"""Probes: where the scan lines run (millimetres), and scan conversion from scan lines to a square image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SAMPLES, LINES = 232, 168  # grid of a frame before scan conversion: depth samples R by scan lines L


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear (`radius_mm` None), curved or phased (small radius) probe.

    The image is a square of `width_mm`, x = 0 in its middle and z = 0 at its top edge; a linear probe's lines
    fill it from side to side, another's fan out over ± `half_angle` degrees from an arc of `radius_mm`.
    """

    width_mm: float
    depth_mm: float
    megahertz: float
    radius_mm: float | None = None
    half_angle: float = 0.0

    @property
    def step_mm(self) -> float:
        """Distance of two samples along a scan line."""
        return self.depth_mm / (SAMPLES - 1)

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """x and z in mm of every sample, each R x L, float32."""
        depth = np.linspace(0, self.depth_mm, SAMPLES, dtype=np.float32)[:, None]
        if self.radius_mm is None:
            x = np.linspace(-self.width_mm / 2, self.width_mm / 2, LINES, dtype=np.float32)[None]
            return np.broadcast_to(x, (SAMPLES, LINES)), np.broadcast_to(depth, (SAMPLES, LINES))
        angle = np.deg2rad(np.linspace(-self.half_angle, self.half_angle, LINES, dtype=np.float32))[None]
        r = self.radius_mm + depth
        return r * np.sin(angle), r * np.cos(angle) - self._arc_top

    @property
    def _arc_top(self) -> float:
        """Distance from the arc's centre to the image's top edge, where the outermost lines start."""
        return (self.radius_mm or 0.0) * float(np.cos(np.deg2rad(self.half_angle)))

    def to_image(self, lines_RL: np.ndarray, size: int, outside: float = 0.0) -> np.ndarray:
        """Scan conversion by bilinear interpolation: R x L to size x size; `outside` fills the rest."""
        index, weights, inside = _conversion(self, size)
        flat = lines_RL.ravel()
        image = np.full(size * size, outside, dtype=np.float32)
        image[inside] = sum(
            w * flat[index + offset] for w, offset in zip(weights, (0, 1, LINES, LINES + 1), strict=True)
        )
        return image.reshape(size, size)


@lru_cache(maxsize=32)
def _conversion(probe: Probe, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the pixels inside the field of view: upper left sample, four bilinear weights, and which they are."""
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size * probe.width_mm
    x, z = np.meshgrid(pixel - probe.width_mm / 2, pixel)
    if probe.radius_mm is None:
        row, column = z / probe.depth_mm, x / probe.width_mm + 0.5
    else:
        z = z + probe._arc_top
        row = (np.hypot(x, z) - probe.radius_mm) / probe.depth_mm
        column = np.rad2deg(np.arctan2(x, z)) / probe.half_angle / 2 + 0.5
    row, column = (row * (SAMPLES - 1)).ravel(), (column * (LINES - 1)).ravel()
    inside = np.flatnonzero((row >= 0) & (row < SAMPLES - 1) & (column >= 0) & (column < LINES - 1))
    row, column = row[inside], column[inside]
    top, left = np.floor(row).astype(np.int32), np.floor(column).astype(np.int32)
    down, right = row - top, column - left
    weights = np.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right])
    return top * LINES + left, weights.astype(np.float32), inside
