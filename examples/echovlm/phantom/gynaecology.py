"""Gynaecology: bladder, uterus with endometrium, and both ovaries, through the abdominal wall."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom import lesion
from examples.echovlm.phantom.body import FAT, FLUID, PARENCHYMA, Body, Tissue
from examples.echovlm.phantom.liver import abdominal_wall
from examples.echovlm.phantom.probe import Probe

PROBE = Probe(width_mm=142, depth_mm=105, megahertz=3.5, radius_mm=45, half_angle=34)
BACKGROUND = FAT.at(8)
MYOMETRIUM, ENDOMETRIUM, OVARY = PARENCHYMA.at(-8), PARENCHYMA.at(8), PARENCHYMA.at(-10)
URINE = Tissue(FLUID.level, 0.4)  # attenuates in place of the operator, who turns the gain down behind a bladder
UTERUS_Z, OVARY_X, OVARY_Z = 70.0, 47.0, 68.0


def paint(body: Body, attributes: dict[str, str], view: int, rng: np.random.Generator) -> None:
    """Even views are transverse, the patient's right on the image's left; odd ones sagittal through the finding."""
    jitter = rng.uniform(-2, 2, 2)
    body.texture(rng, 12, 2.5)
    abdominal_wall(body)
    _bladder(body, 36 if view % 2 == 0 else 30)
    side = -1 if attributes.get("side") == "right" else 1
    site = attributes.get("site")
    if view % 2 == 0:
        _uterus(body, 29, 20)
        for x in (-1, 1):
            _ovary(body, x * OVARY_X, rng)
        centre = (side * OVARY_X, OVARY_Z) if site == "ovary" else (side * 16, UTERUS_Z)
    elif site == "ovary":
        _ovary(body, 0, rng)
        centre = 0, OVARY_Z
    else:
        _uterus(body, 42, 20)
        centre = 12, UTERUS_Z
    if "size_mm" in attributes:
        host = BACKGROUND if site == "ovary" else MYOMETRIUM
        lesion.paint(body, rng, attributes, centre[0] + jitter[0], centre[1] + jitter[1], host)


def _bladder(body: Body, half_width: float) -> None:
    bladder = body.ellipse(0, 34, half_width, 13)
    body.fill(bladder < 1, URINE)
    body.line((bladder - 1) * 13, 1.2, 10)


def _uterus(body: Body, a: float, b: float) -> None:
    rho = body.ellipse(0, UTERUS_Z, a, b)
    body.fill(rho < 1, MYOMETRIUM)
    body.line((rho - 1) * b, 0.9, 9)
    lining = body.ellipse(0, UTERUS_Z, a * 0.5, 4)
    body.fill(lining < 1, ENDOMETRIUM)


def _ovary(body: Body, cx: float, rng: np.random.Generator) -> None:
    rho = body.ellipse(cx, OVARY_Z, 14, 10)
    body.fill(rho < 1, OVARY)
    body.line((rho - 1) * 10, 0.8, 7)
    for angle in rng.uniform(0, 6) + np.arange(4) * 1.6:
        follicle = body.ellipse(cx + 8 * np.cos(angle), OVARY_Z + 5 * np.sin(angle), 2.6, 2.4)
        body.fill(follicle < 1, FLUID)
