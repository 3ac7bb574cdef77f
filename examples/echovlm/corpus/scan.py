"""Where a screen shows tissue, by its pixels: for frames without the tag (0018,6011), or with one that is stale.

Tissue is large, lit and never flat: text is thin, a banner flat, a grey bar narrow. Thresholds are set by eye on the
ultrasound files of pydicom and pydicom-data.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

LIT, DARK = 12, 6  # of 255
FLAT = 2  # a neighbourhood that spans no more is drawn, not scanned
GREYS, SHADES = (15, 200), 0.35  # between black and white, and the share of a neighbourhood that is: text has few
TEXT = 1 / 24  # of the frame's shorter side: what is thinner is no tissue
THIN = 0.1  # of the shorter side: what is thinner is a bar
LARGE = 0.2  # of the largest part
SATURATED = 0.2  # share of what is lit that has shades, below which shades tell nothing
PANEL = 0.2  # share of the scan that a panel has at least
GAP = 0.1  # share of the scan's height that is lit in the columns between two panels, at most
SEAM, ALONG = 1.6, 0.7  # jump over a seam against those beside it, and the share of the height that shows it


def scan_mask(frame: np.ndarray) -> np.ndarray:
    """Where the frame (H x W x 3, uint8) shows tissue, H x W: its large lit parts, filled."""
    grey = frame.max(axis=-1)
    spread = ndimage.maximum_filter(grey, 5).astype(int) - ndimage.minimum_filter(grey, 5)
    lit = (ndimage.uniform_filter(grey.astype(np.float32), 5) > LIT) & ((spread > FLAT) | (grey > 250))
    shaded = ndimage.uniform_filter(((grey > GREYS[0]) & (grey < GREYS[1])).astype(np.float32), 11) > SHADES
    bright, mask = _large_parts(lit), _large_parts(lit & shaded)
    return mask if mask.sum() > SATURATED * bright.sum() else bright


def panels(frame: np.ndarray) -> int:
    """How many scans lie side by side in the frame (H x W x 3, uint8): 0, 1, or 2 for two and more."""
    mask = scan_mask(frame)
    if not mask.any():
        return 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    mask, grey = mask[box], frame.max(axis=-1)[box].astype(np.float32)
    left = np.cumsum(mask.sum(axis=0)) / mask.sum()
    inner = (left > PANEL) & (left < 1 - PANEL)
    gap = (ndimage.uniform_filter(grey, 3) > DARK).mean(axis=0) < GAP
    return 2 if (inner & (gap | _seams(grey, mask))).any() else 1


def _large_parts(lit: np.ndarray) -> np.ndarray:
    size = max(3, round(min(lit.shape) * TEXT))
    parts, count = ndimage.label(ndimage.binary_opening(lit, np.ones((size, size))))
    areas = np.bincount(parts.ravel())[1:]
    thick = [
        min(part.stop - part.start for part in place) >= THIN * min(lit.shape) for place in ndimage.find_objects(parts)
    ]
    large = 1 + np.flatnonzero((areas >= LARGE * areas.max(initial=1)) & np.array(thick, bool))
    return ndimage.binary_fill_holes(np.isin(parts, large)) if count else np.zeros_like(lit)


def _seams(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Columns over whose right edge the picture jumps, nearly from top to bottom: two scans that touch."""
    height, width = grey.shape
    if width < 32:
        return np.zeros(width, bool)
    jumps = np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    bands = [slice(top, top + 8) for top in range(0, height - 7, 8)]
    jump = np.stack([jumps[band].mean(axis=0) for band in bands])
    usual = ndimage.median_filter(jump, size=(1, 15)) + 1
    within = np.stack([mask[band].mean(axis=0) > 0.5 for band in bands])
    seen = (jump > SEAM * usual) & within
    return (seen.sum(axis=0) >= ALONG * np.maximum(within.sum(axis=0), 1)) & (within.sum(axis=0) >= len(bands) / 4)
