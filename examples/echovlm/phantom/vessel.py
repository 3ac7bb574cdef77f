"""Vessel: common carotid artery, long axis with colour Doppler, then the short axis in B-mode."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom.body import BLOOD, FAT, MUSCLE, Body, Tissue
from examples.echovlm.phantom.probe import Probe

PROBE = Probe(width_mm=36, depth_mm=34, megahertz=8)
BACKGROUND = FAT
RADIUS, CENTRE_Z = 4.0, 18.0  # lumen of 8 mm
FREE_VELOCITY, FASTEST = 0.17, 1.05  # m/s along the beam: peak in the free lumen, and the most we show
PLAQUE = {"hypoechoic": Tissue(-17.0, 0.54), "hyperechoic": Tissue(16.0, 0.54)}
PLAQUE_SHADOW_DB = 16.0  # of a hyperechoic, that is calcified, plaque
THROMBUS = Tissue(-17.0, 0.5)


def paint(body: Body, attributes: dict[str, str], view: int, rng: np.random.Generator) -> None:
    """Even views are longitudinal with a colour box, odd ones transverse without."""
    body.texture(rng, 6, 2)
    body.line(body.depth - 0.6, 0.8, 10)
    muscle = body.layer(5, 10.5)
    body.fill(muscle, MUSCLE)
    body.stripes(muscle, 1.4, 9, slope=0.04)
    for depth in (5, 10.5, 27.5):
        body.line(body.depth - depth - 0.4 * np.sin(body.x / 6), 0.4, 8)
    if view % 2 == 0:
        _longitudinal(body, attributes, rng)
    else:
        _transverse(body, attributes)


def _walls(body: Body, distance: np.ndarray) -> None:
    """Intima and adventitia: two bright lines with the darker media between; below 0 is the lumen."""
    body.fill(distance < 0, BLOOD)
    body.fill((distance >= 0) & (distance < 0.9), Tissue(-14.0))
    body.line(distance - 0.15, 0.3, 9)
    body.line(distance - 1.1, 0.5, 14)


def _plaque(body: Body, mask: np.ndarray, attributes: dict[str, str]) -> None:
    body.fill(mask, PLAQUE[attributes["echogenicity"]])
    if attributes["echogenicity"] == "hyperechoic":
        deepest = mask & ~np.roll(mask, -2, axis=0)
        body.shade(deepest, PLAQUE_SHADOW_DB, 2 * body.probe.step_mm)


def _longitudinal(body: Body, attributes: dict[str, str], rng: np.random.Generator) -> None:
    axis = CENTRE_Z + np.float32(rng.uniform(-0.05, 0.05)) * body.x
    across = body.z - axis
    _walls(body, np.abs(across) - RADIUS)
    thickness = np.zeros_like(body.x)
    top = RADIUS + np.zeros_like(body.x)
    if attributes["lesion"] == "plaque":
        far = 1 if attributes["position"] == "far wall" else -1
        reach = np.abs(body.x - rng.uniform(-2, 2)) / 6
        thickness = np.float32(attributes["size_mm"]) * np.exp(-(reach**4)).astype(np.float32)
        plaque = (far * across > RADIUS - thickness) & (far * across < RADIUS)
        _plaque(body, plaque, attributes)
        body.line(np.where(thickness > 0.4, far * across - RADIUS + thickness, 9), 0.3, 8)
        across, top = across + far * thickness / 2, RADIUS - thickness / 2
    elif attributes["lesion"] == "thrombus":
        body.fill(np.abs(across) < RADIUS, THROMBUS)
        body.texture(rng, 3, 2, np.abs(across) < RADIUS)
    body.colour_box = (np.abs(body.x + 0.35 * (body.z - CENTRE_Z)) < 11.5) & (np.abs(body.z - CENTRE_Z) < 7.5)
    direction = {"toward": 1, "away": -1, "absent": 0}[attributes["flow"]]
    profile = np.maximum(1.15 - (across / top) ** 2, 0) * (np.abs(across) < top)
    peak = np.minimum(FREE_VELOCITY * (RADIUS / top) ** 2, FASTEST)  # same flow through a narrower lumen
    body.velocity = (direction * peak * profile).astype(np.float32)


def _transverse(body: Body, attributes: dict[str, str]) -> None:
    vein = body.ellipse(10, CENTRE_Z - 2.5, 4.5, 2.4, tilt=-20)
    body.fill(vein < 1, BLOOD)
    body.line((vein - 1) * 2.4, 0.4, 6)
    radius = np.hypot(body.x, body.z - CENTRE_Z)
    _walls(body, radius - RADIUS)
    if attributes["lesion"] == "plaque":
        far = 1 if attributes["position"] == "far wall" else -1
        edge = RADIUS - float(attributes["size_mm"]) + 0.05 * body.x**2
        plaque = (radius < RADIUS) & (far * (body.z - CENTRE_Z) > edge)
        _plaque(body, plaque, attributes)
    elif attributes["lesion"] == "thrombus":
        body.fill(radius < RADIUS, THROMBUS)
