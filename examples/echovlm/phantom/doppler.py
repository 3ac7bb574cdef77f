"""Colour Doppler: mean velocity towards the probe as red, away as blue, wrapped at the Nyquist velocity.

The autocorrelation estimate of Kasai et al., "Real-time two-dimensional blood flow imaging using an
autocorrelation technique", IEEE Trans. Sonics Ultrason. 32(3), 1985, knows the phase only within ± pi: a jet
faster than the Nyquist velocity wraps round to the other colour (aliasing).
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from examples.echovlm.phantom.body import Body

NYQUIST = 0.6  # m/s
LEAST_VELOCITY = 0.05  # m/s: the wall filter drops what is slower
_NODES = (-1.0, -0.35, 0.0, 0.35, 1.0)
_COLOURS = np.array([[90, 225, 255], [10, 50, 235], [0, 0, 0], [225, 20, 10], [255, 225, 60]], dtype=np.float32)


def wrapped(velocity: np.ndarray) -> np.ndarray:
    """The velocity as the scanner sees it, in [-1, 1) of the Nyquist velocity."""
    return (velocity / NYQUIST + 1) % 2 - 1


def colours(share: np.ndarray) -> np.ndarray:
    """RGB of velocities in [-1, 1]: red to yellow towards the probe, blue to cyan away from it."""
    return np.stack([np.interp(share, _NODES, _COLOURS[:, c]) for c in range(3)], axis=-1)


def overlay(image: np.ndarray, body: Body, rng: np.random.Generator) -> np.ndarray:
    """The RGB image (size x size x 3, 0 to 255) with the body's flow in its colour box, and the box's outline."""
    size = len(image)
    noise = ndimage.gaussian_filter(rng.standard_normal(body.velocity.shape, dtype=np.float32), 1.0)
    spread = 0.05 + 0.35 * np.maximum(np.abs(body.velocity) - NYQUIST, 0)  # turbulence broadens the spectrum
    moving = np.abs(body.velocity) > LEAST_VELOCITY
    share = wrapped(body.velocity + noise * 3.5 * spread * moving)
    coloured = body.probe.to_image((moving & body.colour_box).astype(np.float32), size) > 0.5
    red, blue = (body.probe.to_image(np.maximum(sign * share, 0), size) for sign in (1, -1))
    image = image.copy()
    image[coloured] = colours((red - blue)[coloured])
    box = body.probe.to_image(body.colour_box.astype(np.float32), size) > 0.5
    image[box & ~ndimage.binary_erosion(box)] = (120, 230, 120)
    return image
