"""The insonified body as maps over the scan lines: how strongly each point scatters, how much it attenuates.

Attenuation in dB/(cm MHz), one way, after Culjat et al., "A review of tissue substitutes for ultrasound
imaging", Ultrasound Med. Biol. 36(6), 2010 (water 0.002, blood 0.2, fat 0.48, liver 0.5, cortical bone 6.9);
muscle is set lower than there (1.09), as its overlying layers would otherwise only darken the whole frame.
Scatter levels are our choice, in dB on the display, 0 being mid-grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.echovlm.phantom.probe import Probe


@dataclass(frozen=True)
class Tissue:
    """Mean scatter level in dB and attenuation in dB/(cm MHz), one way."""

    level: float
    attenuation: float = 0.54

    def at(self, offset: float) -> Tissue:
        """The same tissue, `offset` dB brighter."""
        return replace(self, level=self.level + offset)


FLUID = Tissue(-60.0, 0.002)
BLOOD = Tissue(-45.0, 0.2)
FAT = Tissue(-8.0, 0.48)
PARENCHYMA = Tissue(0.0, 0.5)
MUSCLE = Tissue(-9.0, 0.75)
BONE = Tissue(-22.0, 6.9)
AIR = Tissue(-18.0, 6.0)


class Body:
    """Maps of R samples x L lines that the organs paint on, in mm of the probe's image."""

    def __init__(self, probe: Probe, background: Tissue, shift_mm: float = 0.0) -> None:
        self.probe = probe
        x, self.z = probe.grid()
        self.x = x + np.float32(shift_mm)
        self.level = np.full(self.x.shape, background.level, dtype=np.float32)
        self.attenuation = np.full(self.x.shape, background.attenuation, dtype=np.float32)
        self.velocity = np.zeros(self.x.shape, dtype=np.float32)  # m/s towards the probe
        self.colour_box = np.zeros(self.x.shape, dtype=bool)

    def fill(self, mask: np.ndarray, tissue: Tissue) -> None:
        """Make the masked samples this tissue."""
        self.level[mask] = tissue.level
        self.attenuation[mask] = tissue.attenuation

    def line(self, distance_mm: np.ndarray, width_mm: float, level: float) -> None:
        """A specular interface: brightens towards `level` dB where |distance| is within the width."""
        width_mm = max(width_mm, 1.2 * self.probe.step_mm)
        peak = level - 12.0 * (distance_mm / width_mm) ** 2
        np.maximum(self.level, peak, out=self.level)

    def shade(self, mask: np.ndarray, shadow_db: float, thickness_mm: float) -> None:
        """Let the masked samples attenuate so much that `thickness_mm` of them leave a shadow of `shadow_db`."""
        per_cm = shadow_db / (thickness_mm / 10)
        self.attenuation[mask] += np.float32(per_cm / (2 * self.probe.megahertz))

    def ellipse(self, cx: float, cz: float, a: float, b: float, tilt: float = 0.0) -> np.ndarray:
        """Radius in units of the ellipse's own (below 1 is inside); `tilt` in degrees, right end down."""
        cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
        dx, dz = self.x - np.float32(cx), self.z - np.float32(cz)
        return distance((dx * cos + dz * sin) / a, (dz * cos - dx * sin) / b).astype(np.float32)

    def texture(
        self, rng: np.random.Generator, scale_mm: float, depth_db: float, mask: np.ndarray | None = None
    ) -> None:
        """Slow unevenness of the scatter level: a few plane waves of about `scale_mm`, ± `depth_db`."""
        total = np.zeros_like(self.level)
        for angle in rng.uniform(0, np.pi, 3):
            wave = 2 * np.pi / (scale_mm * rng.uniform(0.7, 1.4))
            total += np.sin(
                self.x * np.float32(wave * np.cos(angle))
                + self.z * np.float32(wave * np.sin(angle))
                + np.float32(rng.uniform(0, 2 * np.pi))
            )
        where = slice(None) if mask is None else mask
        self.level[where] += total[where] * np.float32(depth_db / 1.7)

    def stripes(self, mask: np.ndarray, spacing_mm: float, level_db: float, slope: float = 0.0) -> None:
        """Fibres: bright layers in `mask`, `slope` mm down per mm to the right."""
        wave = np.sin((self.z - slope * self.x) * np.float32(2 * np.pi / spacing_mm) + np.sin(self.x / 3))
        self.level[mask] += np.maximum(wave[mask], 0) * np.float32(level_db)

    @property
    def depth(self) -> np.ndarray:
        """Depth in mm along the scan line, R x 1."""
        return (np.arange(len(self.z), dtype=np.float32) * np.float32(self.probe.step_mm))[:, None]

    def layer(self, top_mm: float, bottom_mm: float) -> np.ndarray:
        """Mask of the layer between two depths under the probe."""
        inside = (self.depth >= top_mm) & (self.depth < bottom_mm)
        return np.broadcast_to(inside, self.x.shape)

    def tube(self, start: Sequence[float], end: Sequence[float], width_mm: float) -> np.ndarray:
        """Distance in mm from the wall of a straight tube from one (x, z) to another; below 0 is its lumen."""
        (x0, z0), (x1, z1) = start, end
        dx, dz = x1 - x0, z1 - z0
        along = np.clip(((self.x - x0) * dx + (self.z - z0) * dz) / (dx * dx + dz * dz), 0, 1)
        return distance(self.x - x0 - along * dx, self.z - z0 - along * dz) - np.float32(width_mm / 2)


def distance(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """√(x² + z²), several times faster than numpy's hypot, which also guards against overflow."""
    return np.sqrt(x * x + z * z)
