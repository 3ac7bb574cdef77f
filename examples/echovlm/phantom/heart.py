"""Heart: apical four-chamber view, with colour Doppler over the atrioventricular valves, then in B-mode."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom.body import AIR, BLOOD, FLUID, PARENCHYMA, Body
from examples.echovlm.phantom.probe import Probe

PROBE = Probe(width_mm=168, depth_mm=150, megahertz=2.5, radius_mm=4, half_angle=42)
BACKGROUND = AIR.at(4)
MYOCARDIUM = PARENCHYMA.at(-2)
VALVES_Z, SEPTUM = 104.0, 9.0  # depth of the valve plane, thickness of the septum, mm
INFLOW, JET = 0.32, -0.9  # m/s towards the probe
LEAN, LENGTH, WALL = 0.35, 62.0, 9.0  # ventricles: how far the apex leans inwards, and mm
WIDTH = {"left": 40.0, "right": 28.0}  # of a normal ventricle, mm


def paint(body: Body, attributes: dict[str, str], view: int, rng: np.random.Generator) -> None:
    """The apex on top, the patient's left on the image's right; even views carry the colour box."""
    width = {side: w + rng.uniform(-1.5, 1.5) for side, w in WIDTH.items()}
    kind, size = attributes["lesion"], float(attributes.get("size_mm", 0))
    if kind == "dilatation":
        width[attributes["side"]] = size
    body.texture(rng, 25, 3)
    middle = {"right": -(SEPTUM + width["right"]) / 2, "left": (SEPTUM + width["left"]) / 2}
    _muscle(body, middle, width, size if kind == "effusion" else 0.0)
    for side, x in middle.items():
        systole = kind == "regurgitation"
        _chambers(body, x, width[side] / 2, closed=systole)
        if view % 2 == 0:
            _flow(body, x, size if attributes.get("side") == side else 0.0, systole=systole)
    body.attenuation[:] = PARENCHYMA.attenuation  # the time-gain is set on the heart: blood leaves no enhancement
    if view % 2 == 0:
        body.colour_box = (body.z > 78) & (body.z < 148) & (np.abs(body.x) < 0.55 * (body.z + 30) - 10)


def _muscle(body: Body, middle: dict[str, float], width: dict[str, float], effusion: float) -> None:
    """Ventricular muscle, atrial walls, and the pericardium with `effusion` mm of fluid under it."""
    above = body.z < VALVES_Z + 4
    body.fill(body.ellipse((middle["left"] + middle["right"]) / 2, 122, 46, 29) < 1, MYOCARDIUM)
    left, right = middle["left"] + width["left"] / 2 + WALL, -middle["right"] + width["right"] / 2 + WALL * 0.6
    outer = _half_ellipse(body, left, right, LENGTH + WALL)
    pericardium = _half_ellipse(body, left + effusion, right + effusion, LENGTH + WALL + effusion)
    if effusion:
        body.fill((pericardium < 1) & above, FLUID)
    body.line(np.where(above, (pericardium - 1) * (right + effusion), 9), 1.6, 14)
    body.fill((outer < 1) & above, MYOCARDIUM)


def _half_ellipse(body: Body, left: float, right: float, length: float) -> np.ndarray:
    """Radius in units of the outline's own, around both ventricles: its base is the valve plane."""
    half = np.where(body.x > 0, np.float32(left), np.float32(right))
    return np.hypot(body.x / half, (body.z - VALVES_Z) / length).astype(np.float32)


def _chambers(body: Body, middle: float, half_width: float, *, closed: bool) -> None:
    lean = LEAN * middle / LENGTH * np.maximum(VALVES_Z - body.z, 0)  # the apex is nearer to the septum
    ventricle = np.hypot((body.x - np.float32(middle) + lean) / half_width, (body.z - VALVES_Z) / LENGTH)
    body.fill((ventricle < 1) & (body.z < VALVES_Z), BLOOD)
    body.fill(body.ellipse(middle, VALVES_Z + 21, min(19, half_width + 3), 19) < 1, BLOOD)
    reach, rise = (0.04, 3) if closed else (0.4, 10)
    for x in (-1, 1):  # two leaflets
        tip = middle + x * half_width * reach, VALVES_Z - rise
        body.line(body.tube((middle + x * half_width, VALVES_Z), tip, 1), 1.4, 12)


def _flow(body: Body, middle: float, jet: float, *, systole: bool) -> None:
    """Diastole: inflow through the valve. Systole: none, or a regurgitant jet `jet` mm long into the atrium."""
    if not systole:
        stream = body.ellipse(middle, VALVES_Z - 4, 8, 26)
        body.velocity = np.where(stream < 1, INFLOW * (1.1 - stream**2), body.velocity).astype(np.float32)
    elif jet:
        down = (body.z - VALVES_Z) / jet
        across = (body.x - middle) / (3 + 7 * np.clip(down, 0, 1))
        inside = (down > 0) & (down < 1) & (np.abs(across) < 1)
        body.velocity[inside] = JET * (1 - 0.6 * across[inside] ** 2)
