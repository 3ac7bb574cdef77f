"""Liver: subcostal oblique view with abdominal wall, parenchyma, hepatic and portal veins, and diaphragm."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom import lesion
from examples.echovlm.phantom.body import AIR, BLOOD, FAT, MUSCLE, PARENCHYMA, Body
from examples.echovlm.phantom.probe import Probe

PROBE = Probe(width_mm=142, depth_mm=125, megahertz=3.5, radius_mm=45, half_angle=29)
BACKGROUND = PARENCHYMA


def paint(body: Body, attributes: dict[str, str], view: int, rng: np.random.Generator) -> None:
    """Odd views turn the probe: the veins run the other way and the lesion's section moves a little."""
    turn = 1 if view % 2 == 0 else -1
    body.texture(rng, 30, 1.0)
    x, depth = rng.uniform(-22, 22), rng.uniform(-2, 2)
    _veins(body, turn, rng)
    _diaphragm(body, turn)
    abdominal_wall(body)
    if "size_mm" in attributes:
        half = float(attributes["size_mm"]) / 2
        shallow = attributes["position"] == "subcapsular"
        centre = (x, 26 + half + depth) if shallow else (x * 0.6 - 10, 93 - half + depth)
        lesion.paint(body, rng, attributes, centre[0] * turn, centre[1], PARENCHYMA)


def abdominal_wall(body: Body) -> None:
    """Skin, fat and muscle over the first 14 mm, and the peritoneal line."""
    body.fill(body.layer(0, 7), FAT.at(4))
    muscle = body.layer(7, 14)
    body.fill(muscle, MUSCLE)
    body.stripes(muscle, 2.5, 9)
    for depth, level in ((1, 12), (7, 8), (14, 10)):
        body.line(body.depth - depth, 1.0, level)


def _veins(body: Body, turn: int, rng: np.random.Generator) -> None:
    root = np.array((26.0 * turn, 95.0))
    for end in ((-40, 60), (0, 42), (46, 56)):
        tip = np.array((end[0] * turn, end[1])) + rng.uniform(-5, 5, 2)
        bend = (root + tip) / 2 + rng.uniform(-6, 6, 2)
        knots = [(1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t**2 * tip for t in np.linspace(0, 1, 5)]
        for start, stop, width in zip(knots, knots[1:], (8, 6.5, 5, 3.5), strict=False):  # they taper
            body.fill(body.tube(start, stop, width) < 0, BLOOD)
    portal = body.tube((-36 * turn, 80), (-56 * turn, 86), 6)
    body.fill(portal < 0, BLOOD)
    body.line(portal, 1.6, 13)
    for _ in range(6):  # peripheral portal branches: short bright walls
        branch = body.ellipse(rng.uniform(-45, 45), rng.uniform(35, 95), 3.2, 1.8, tilt=rng.uniform(-60, 60))
        body.fill(branch < 0.6, BLOOD)
        body.line((branch - 1) * 1.8, 0.8, 9)


def _diaphragm(body: Body, turn: int) -> None:
    distance = np.hypot(body.x - 8 * turn, body.z - 20) - 88
    body.fill(distance > 0, AIR.at(4))
    body.line(distance, 1.8, 20)
