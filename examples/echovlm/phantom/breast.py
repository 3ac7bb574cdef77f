"""Breast: skin, subcutaneous fat with Cooper's ligaments, glandular layer, pectoral muscle, ribs and pleura."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom import lesion
from examples.echovlm.phantom.body import AIR, BONE, FAT, MUSCLE, PARENCHYMA, Body
from examples.echovlm.phantom.probe import Probe

PROBE = Probe(width_mm=44, depth_mm=37.5, megahertz=9)
GLAND = PARENCHYMA.at(2)
BACKGROUND = FAT.at(-4)


def paint(body: Body, attributes: dict[str, str], view: int, rng: np.random.Generator) -> None:
    """Even views cross the ribs, odd ones run along an intercostal space."""
    centre = rng.uniform(-6, 6), rng.uniform(15.0, 16.5)
    _layers(body, rng)
    if view % 2 == 0:
        for cx in (-15, 8):
            rib = body.ellipse(cx + rng.uniform(-2, 2), 35, 6.5, 3.2)
            body.fill(rib < 1, BONE)
            body.line(np.where(body.z < 35, (rib - 1) * 3.2, 9), 0.8, 18)
    if "size_mm" in attributes:
        lesion.paint(body, rng, attributes, *centre, GLAND)


def _layers(body: Body, rng: np.random.Generator) -> None:
    """From skin to pleura, the gland's borders wavy."""
    wave = np.sin(body.x / rng.uniform(4, 6) + rng.uniform(0, 6)) * np.float32(0.9)
    body.texture(rng, 6, 1.5)
    body.fill(body.layer(0, 1.8), GLAND.at(6))
    for x in rng.uniform(-22, 22, 5):  # Cooper's ligaments
        slope = rng.uniform(0.4, 0.9) * rng.choice((-1, 1))
        body.line(np.where(body.z < 8, body.x - x - slope * (body.z - 5), 9), 0.5, 8)
    gland = (body.z > 7 + wave) & (body.z < 25 + wave / 2)
    body.fill(gland, GLAND)
    body.texture(rng, 5, 1.6, gland)
    body.stripes(gland, 3.5, 2.5, slope=0.06)
    body.line(body.z - 7 - wave, 0.5, 9)
    muscle = (body.z > 27) & (body.z < 32.5)
    body.fill(muscle, MUSCLE.at(-2))
    body.stripes(muscle, 1.7, 9, slope=0.03)
    body.line(body.z - 26.8, 0.5, 10)
    body.fill(body.z > 35.5, AIR)
    body.line(body.z - 35.3, 0.7, 16)
