"""Thyroid: transverse view of both lobes, isthmus, trachea and carotids; longitudinal view of the lesion's lobe."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom import lesion
from examples.echovlm.phantom.body import AIR, BLOOD, FAT, MUSCLE, PARENCHYMA, Body
from examples.echovlm.phantom.probe import Probe

PROBE = Probe(width_mm=60, depth_mm=52, megahertz=9)
GLAND = PARENCHYMA.at(2)
BACKGROUND = FAT.at(-1)
LOBE_X, LOBE_Z = 16.5, 20.5  # centres of the lobes, mm


def paint(body: Body, attributes: dict[str, str], view: int, rng: np.random.Generator) -> None:
    """Even views are transverse, odd ones longitudinal; the patient's right is on the image's left."""
    offset = rng.uniform(-1.5, 1.5, 2)
    lobe = rng.uniform(10.2, 11.4), rng.uniform(9.6, 10.6)
    body.texture(rng, 9, 2)
    body.line(body.depth - 0.6, 1.0, 10)
    straps = body.layer(6, 10.5)
    body.fill(straps, MUSCLE)
    body.stripes(straps, 1.6, 6)
    body.line(body.depth - 5.6, 0.5, 6)
    if view % 2 == 0:
        _transverse(body, lobe, rng)
        centre = (-LOBE_X if attributes.get("side") == "right" else LOBE_X) + offset[0], LOBE_Z + offset[1]
    else:
        _longitudinal(body, lobe[1], rng)
        centre = 3 * offset[0], LOBE_Z + offset[1]
    if "size_mm" in attributes:
        lesion.paint(body, rng, attributes, *centre, GLAND)


def _gland(body: Body, mask: np.ndarray, rng: np.random.Generator) -> None:
    body.fill(mask, GLAND)
    body.texture(rng, 4, 1.0, mask)


def _transverse(body: Body, lobe: tuple[float, float], rng: np.random.Generator) -> None:
    for side in (-1, 1):  # longus colli
        body.fill(body.ellipse(side * 13, 38, 10, 5, tilt=-8 * side) < 1, MUSCLE.at(-3))
    isthmus = (np.abs(body.x) < 12) & (np.abs(body.z - 12.5 - 0.012 * body.x**2) < 2.2)
    rho = np.minimum(*(body.ellipse(side * LOBE_X, LOBE_Z, *lobe, tilt=12 * side) for side in (-1, 1)))
    _gland(body, (rho < 1) | isthmus, rng)
    body.line((rho - 1) * lobe[1], 0.45, 8)
    trachea = body.ellipse(0, 24, 8, 9)
    body.fill(trachea < 1, AIR)
    body.line(np.where(body.z < 22, (trachea - 1) * 8, 9), 1.0, 19)
    for echo in (1, 2, 3):  # reverberation between the tracheal air and the probe
        body.line(np.where(trachea < 1, body.z - 15 - 4.2 * echo, 9), 0.6, 24 - 3 * echo)
    for side in (-1, 1):
        carotid = body.ellipse(side * 24.5, 31 + 0.7 * side, 3.4, 3.4)
        body.fill(carotid < 1, BLOOD)
        body.line((carotid - 1) * 3.4, 0.5, 11)


def _longitudinal(body: Body, thickness: float, rng: np.random.Generator) -> None:
    muscle = body.layer(33, 41)
    body.fill(muscle, MUSCLE.at(-3))
    body.stripes(muscle, 2.2, 8, slope=0.05)
    body.line(body.depth - 43, 1.0, 14)
    rho = body.ellipse(0, LOBE_Z, 26, thickness, tilt=2)
    _gland(body, rho < 1, rng)
    body.line((rho - 1) * thickness, 0.5, 9)
