"""The scanner's screen: each hospital's machine has its own chroma map and its own side for the depth scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.echovlm.phantom.probe import Probe


@dataclass(frozen=True)
class Screen:
    """Tint as the RGB of mid-grey relative to it, contrast exponent, and the depth scale's side."""

    tint: tuple[float, float, float]
    gamma: float
    scale_on_left: bool


SCREENS = {
    "north": Screen((1.0, 1.0, 1.0), 1.0, False),
    "harbour": Screen((1.08, 0.98, 0.78), 1.1, True),
    "hill": Screen((0.86, 0.98, 1.16), 0.9, False),
}
HOSPITALS = tuple(SCREENS)


def show(grey: np.ndarray, screen: Screen) -> np.ndarray:
    """Grey levels in [0, 1] (size x size) as RGB, 0 to 255, float32."""
    grey = grey**screen.gamma
    return np.clip(grey[..., None] * np.array(screen.tint, dtype=np.float32) * 255, 0, 255).astype(np.float32)


def depth_scale(image: np.ndarray, probe: Probe, screen: Screen) -> None:
    """Draw a tick every 10 mm of depth at the image's edge, a long one every 50 mm; in place."""
    size = len(image)
    for mm in range(10, int(probe.depth_mm), 10):
        row, length = round(mm / probe.width_mm * size), size // 28 if mm % 50 else size // 14
        columns = slice(0, length) if screen.scale_on_left else slice(size - length, size)
        image[row, columns] = 200


def body_mark(image: np.ndarray, side: str) -> None:
    """Draw the breast pictogram below the scan, the examined side filled; in place."""
    size = len(image)
    y, x = np.mgrid[:size, :size] / size
    for name, centre in (("right", 0.44), ("left", 0.56)):
        radius = np.hypot(x - centre, y - 0.93)
        image[(radius < 0.05) & ((radius > 0.038) | (side == name))] = 235
