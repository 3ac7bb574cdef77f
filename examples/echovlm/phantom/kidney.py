"""Kidney: long axis under the liver, with capsule, cortex, pyramids and bright sinus; then the short axis."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom import lesion
from examples.echovlm.phantom.body import FAT, FLUID, PARENCHYMA, Body
from examples.echovlm.phantom.liver import abdominal_wall
from examples.echovlm.phantom.probe import Probe

PROBE = Probe(width_mm=128, depth_mm=105, megahertz=3.5, radius_mm=45, half_angle=31)
BACKGROUND = FAT.at(6)
CORTEX, PYRAMID, SINUS = PARENCHYMA.at(-5), PARENCHYMA.at(-13), FAT.at(14)
MIDDLE = 64  # depth of the kidney's centre, mm


def paint(body: Body, attributes: dict[str, str], view: int, rng: np.random.Generator) -> None:
    """Even views are longitudinal with the upper pole on the image's left, odd ones transverse."""
    jitter = rng.uniform(-2.5, 2.5, 2)
    long = view % 2 == 0
    a, b = (rng.uniform(53, 58), rng.uniform(24, 26)) if long else (27, 24)
    tilt = rng.uniform(2, 9) if long else 0
    body.texture(rng, 14, 2)
    liver = body.z < 44 - 0.12 * body.x
    body.fill(liver, PARENCHYMA.at(-1))
    abdominal_wall(body)
    rho = body.ellipse(0, MIDDLE, a, b, tilt)
    body.fill(rho < 1, CORTEX)
    body.line((rho - 1) * b, 1.1, 9)
    dilated = float(attributes["size_mm"]) if attributes["lesion"] == "hydronephrosis" else 0.0
    _sinus(body, (a * 0.55, max(b * 0.4, dilated / 2 + 2)), tilt, long, rng)
    if dilated:
        _pelvis(body, dilated, tilt, long)
    elif "size_mm" in attributes:
        pole = -1 if attributes["position"] == "upper pole" else 1
        reach = {"cyst": 35, "stone": 19}[attributes["lesion"]] if long else 6
        centre = pole * reach + jitter[0], MIDDLE + np.sin(np.deg2rad(tilt)) * pole * reach + jitter[1]
        lesion.paint(body, rng, attributes, *centre, CORTEX)


def _sinus(body: Body, half: tuple[float, float], tilt: float, long: bool, rng: np.random.Generator) -> None:
    a, b = half
    for angle in np.linspace(0, 2 * np.pi, 11 if long else 7)[:-1]:
        x, z = 1.22 * a * np.cos(angle), (b + 5) * np.sin(angle)
        z += x * np.sin(np.deg2rad(tilt))
        body.fill(body.ellipse(x, MIDDLE + z, 5, 4.2) < 1, PYRAMID)
    sinus = body.ellipse(0, MIDDLE, a, b, tilt) < 1 + 0.12 * np.sin(body.x / 3 + rng.uniform(0, 6))
    body.fill(sinus, SINUS)
    body.texture(rng, 7, 2.5, sinus)


def _pelvis(body: Body, size: float, tilt: float, long: bool) -> None:
    """The dilated pelvis, `size` mm from front to back, and its calyces."""
    body.fill(body.ellipse(0, MIDDLE, (0.7 * size + 8) if long else size / 2, size / 2, tilt) < 1, FLUID)
    for x in (-1, 0, 1) if long else ():
        cx = x * (0.5 * size + 12)
        for side in (-1, 1):
            cz = MIDDLE + cx * np.sin(np.deg2rad(tilt)) + side * size * 0.3
            body.fill(body.ellipse(cx, cz, size * 0.22, size * 0.2) < 1, FLUID)
