"""B-mode: from tissue maps to a log-compressed image with speckle, shadow and enhancement.

Scatterers too many to resolve make a complex Gaussian field; convolved with the probe's point spread its
envelope is Rayleigh distributed: fully developed speckle (Wagner et al., "Statistics of speckle in ultrasound
B-scans", IEEE Trans. Sonics Ultrason. 30(3), 1983). The scanner's time-gain compensation assumes soft tissue
all the way down, so what attenuates more leaves a shadow and fluid leaves enhancement.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from examples.echovlm.phantom.body import Body

DYNAMIC_RANGE_DB = 58.0
MID_GREY_DB = 33.0  # the display's black lies so far below scatter level 0
NOISE_DB = -42.0  # electronic noise at the surface; the time-gain lifts it with depth
SPREAD_AXIAL, SPREAD_LATERAL = 0.9, 1.5  # the point spread's standard deviations, in samples and lines
ASSUMED_ATTENUATION = 0.54  # dB/(cm MHz), soft tissue on average (Culjat et al. 2010)
TRANSMIT_LIMITS_DB = (-38.0, 14.0)


def transmission_db(body: Body) -> np.ndarray:
    """Echo strength lost (-) or gained (+) against the time-gain's assumption, R x L, there and back."""
    excess = body.attenuation - np.float32(ASSUMED_ATTENUATION)
    path_cm = np.float32(body.probe.step_mm / 10)
    lost = np.cumsum(excess, axis=0) * path_cm * np.float32(2 * body.probe.megahertz)
    return np.clip(-lost, *TRANSMIT_LIMITS_DB)


def bmode(body: Body, rng: np.random.Generator) -> np.ndarray:
    """Grey levels in [0, 1] on the scan lines, R x L."""
    amplitude = np.exp(body.level * np.float32(np.log(10) / 20))
    scatterers = rng.standard_normal((2, *body.level.shape), dtype=np.float32) * amplitude
    spread = (0, SPREAD_AXIAL, SPREAD_LATERAL)
    echo = ndimage.gaussian_filter(scatterers, spread, truncate=2.5, mode="nearest")
    unit_power = 4 * np.pi * SPREAD_AXIAL * SPREAD_LATERAL / 2  # undoes the filter's loss of variance
    power = (echo[0] ** 2 + echo[1] ** 2) * np.float32(unit_power)
    power *= np.exp(transmission_db(body) * np.float32(np.log(10) / 10))
    gain = np.linspace(0, 8, len(power), dtype=np.float32)[:, None]
    power += np.exp((NOISE_DB + gain) * np.float32(np.log(10) / 10))
    level = np.log(power) * np.float32(10 / np.log(10))
    return np.clip((level + np.float32(MID_GREY_DB)) / np.float32(DYNAMIC_RANGE_DB), 0, 1)
