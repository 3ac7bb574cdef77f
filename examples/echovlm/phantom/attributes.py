"""What each organ's cases can show: kinds of finding, and the values that each attribute takes.

Kinds are equally frequent and every other attribute is drawn evenly and on its own, so that nothing but the
frames tells one case of an organ from another.
"""

from __future__ import annotations

import numpy as np

Kind = dict[str, tuple[str, ...]]

SIDE = ("left", "right")
NORMAL: Kind = {"lesion": ("none",)}


def _kind(lesion: str, **choices: tuple[str, ...] | str) -> Kind:
    return {"lesion": (lesion,)} | {k: (v,) if isinstance(v, str) else v for k, v in choices.items()}


def _cyst(**choices: tuple[str, ...] | str) -> Kind:
    return _kind("cyst", shape="round", echogenicity="anechoic", posterior="enhancement", **choices)


SMALL, MEDIUM = ("6", "10", "14"), ("20", "30", "40")
BRIGHT_OR_DARK = ("hypoechoic", "hyperechoic")
POLE, WALL, DIRECTION = ("upper pole", "lower pole"), ("near wall", "far wall"), ("toward", "away")

KINDS: dict[str, tuple[Kind, ...]] = {
    "thyroid": (
        NORMAL,
        _cyst(side=SIDE, size_mm=SMALL),
        _kind("nodule", side=SIDE, size_mm=SMALL, shape=("oval", "irregular"), echogenicity=BRIGHT_OR_DARK),
        _kind("calcification", side=SIDE, size_mm=SMALL, echogenicity="hyperechoic", posterior="shadow"),
    ),
    "breast": (
        NORMAL | {"side": SIDE},
        _cyst(side=SIDE, size_mm=SMALL),
        _kind("mass", side=SIDE, size_mm=SMALL, shape="oval", echogenicity=BRIGHT_OR_DARK),
        _kind("mass", side=SIDE, size_mm=SMALL, shape="irregular", echogenicity="hypoechoic", posterior="shadow"),
    ),
    "liver": (
        NORMAL,
        _cyst(position=("subcapsular", "deep"), size_mm=MEDIUM),
        _kind(
            "mass", position=("subcapsular", "deep"), size_mm=MEDIUM, shape=("round", "irregular"),
            echogenicity="hyperechoic",
        ),
        _kind(
            "mass", position=("subcapsular", "deep"), size_mm=MEDIUM, shape=("round", "irregular"),
            echogenicity="hypoechoic",
        ),
    ),
    "kidney": (
        NORMAL,
        _cyst(position=POLE, size_mm=MEDIUM),
        _kind("stone", position=POLE, size_mm=SMALL, echogenicity="hyperechoic", posterior="shadow"),
        _kind("hydronephrosis", size_mm=("12", "20", "28")),
    ),
    "gynaecology": (
        NORMAL,
        _cyst(site="ovary", side=SIDE, size_mm=MEDIUM),
        _kind("mass", site="ovary", side=SIDE, size_mm=MEDIUM, echogenicity="hyperechoic", posterior="shadow"),
        _kind("mass", site="uterus", side=SIDE, size_mm=MEDIUM, echogenicity="hypoechoic", shape=("round", "oval")),
    ),
    "vessel": (
        NORMAL | {"flow": DIRECTION, "pattern": ("laminar",)},
        _kind(
            "plaque", position=WALL, size_mm=("2", "3"), echogenicity=BRIGHT_OR_DARK,
            flow=DIRECTION, pattern="laminar",
        ),
        _kind(
            "plaque", position=WALL, size_mm=("4", "5"), echogenicity=BRIGHT_OR_DARK,
            flow=DIRECTION, pattern="aliasing",
        ),
        _kind("thrombus", flow="absent"),
    ),
    "heart": (
        NORMAL,
        _kind("effusion", size_mm=("10", "15", "20")),
        _kind("dilatation", side=SIDE, size_mm=("50", "60", "70")),
        _kind("regurgitation", side=SIDE, size_mm=MEDIUM),
    ),
}  # fmt: skip
ORGANS = tuple(KINDS)


def draw(organ: str, number: int, rng: np.random.Generator) -> dict[str, str]:
    """The attributes of the organ's case of this number: kinds in turn, the rest drawn evenly."""
    kind = KINDS[organ][number % len(KINDS[organ])]
    return {name: str(rng.choice(values)) for name, values in kind.items()}


def grade(organ: str, attributes: dict[str, str]) -> int:
    """0 mild, 1 moderate, 2 severe: the size's place among the sizes of its kind; 0 where there is no size."""
    for kind in KINDS[organ]:
        if attributes["lesion"] in kind["lesion"] and attributes.get("size_mm") in kind.get("size_mm", ()):
            return kind["size_mm"].index(attributes["size_mm"])
    return 0


def concern(organ: str, attributes: dict[str, str]) -> str:
    """How much a finding matters: "none", "low", "intermediate" or "high"."""
    a = attributes
    if a["lesion"] in ("hydronephrosis", "effusion", "dilatation", "regurgitation"):
        return ("low", "intermediate", "high")[grade(organ, a)]
    if a["lesion"] == "thrombus" or (organ, a.get("echogenicity")) == ("liver", "hypoechoic"):
        return "high"
    if organ in ("thyroid", "breast") and a.get("shape") == "irregular":
        return "high"
    if a.get("pattern") == "aliasing" or (a["lesion"], a.get("echogenicity")) == ("nodule", "hypoechoic"):
        return "intermediate"
    return "none" if a["lesion"] == "none" else "low"
