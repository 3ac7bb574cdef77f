"""Lesions: outlines of an exact largest diameter, and how each kind looks."""

from __future__ import annotations

import numpy as np

from examples.echovlm.phantom.body import FLUID, Body, Tissue

LEVEL_DB = {"hypoechoic": -20.0, "hyperechoic": 14.0}  # against the host
SHADOW_DB = 11.0  # of a solid lesion with a shadow
CALCIFIED = ("calcification", "stone")  # brighter, and their shadow is black
CALCIFIED_DB, CALCIFIED_SHADOW_DB = 19.0, 40.0
ANGLES = np.linspace(0, 2 * np.pi, 181, dtype=np.float32)


def outline(rng: np.random.Generator, shape: str, size_mm: float) -> np.ndarray:
    """Radius in mm at each of ANGLES of an outline whose largest diameter is `size_mm`."""
    if shape == "round":
        radius = np.ones_like(ANGLES)
    elif shape == "oval":
        radius = 1 / np.hypot(np.cos(ANGLES), np.sin(ANGLES) / 0.58)
    else:
        radius = 1 / np.hypot(np.cos(ANGLES) / 0.8, np.sin(ANGLES))
        for waves, height in ((3, 0.15), (5, 0.13), (9, 0.08)):
            radius = radius + rng.uniform(0.7, 1.2) * height * np.cos(waves * ANGLES + rng.uniform(0, 2 * np.pi))
    x, z = radius * np.cos(ANGLES), radius * np.sin(ANGLES)
    diameter = np.hypot(x[:, None] - x[None], z[:, None] - z[None]).max()
    return radius * np.float32(size_mm / diameter)


def paint(body: Body, rng: np.random.Generator, attributes: dict[str, str], cx: float, cz: float, host: Tissue) -> None:
    """Paint the lesion that the attributes describe, its centre at (cx, cz) mm, into its host tissue."""
    size = float(attributes["size_mm"])
    radius = outline(rng, attributes.get("shape", "round"), size)
    dx, dz = body.x - np.float32(cx), body.z - np.float32(cz)
    distance = np.hypot(dx, dz)
    near = distance < size
    edge = np.full_like(distance, size)
    edge[near] = distance[near] - np.interp(np.arctan2(dz[near], dx[near]) % (2 * np.pi), ANGLES, radius)
    mask = edge < 0
    if attributes["echogenicity"] == "anechoic":
        body.fill(mask, FLUID)
        steep = np.abs(dz) > 0.8 * distance  # walls across the beam reflect, walls along it do not
        body.line(np.where(steep, edge - size / 25, np.float32(size)), size / 30, host.level + 12)
        return
    calcified = attributes["lesion"] in CALCIFIED
    level = CALCIFIED_DB if calcified else host.level + LEVEL_DB[attributes["echogenicity"]]
    body.fill(mask, Tissue(level, host.attenuation))
    if attributes.get("posterior") == "shadow":  # from the back half, so that the whole lesion can be seen
        body.shade(mask & (dz > size / 5), CALCIFIED_SHADOW_DB if calcified else SHADOW_DB, 0.3 * size)
