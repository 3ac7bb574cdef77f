"""The phantoms: physics against theory, frames that show what the reports state, reports that read back."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.findings import TERMS, parse_findings
from examples.echovlm.phantom import ORGANS, generate_cases, lesion
from examples.echovlm.phantom.attributes import KINDS, Kind, concern
from examples.echovlm.phantom.bmode import DYNAMIC_RANGE_DB, bmode
from examples.echovlm.phantom.body import FLUID, PARENCHYMA, Body
from examples.echovlm.phantom.doppler import colours, wrapped
from examples.echovlm.phantom.generate import PAINTERS, describe, render
from examples.echovlm.phantom.probe import Probe
from examples.echovlm.phantom.reports import Writer
from examples.echovlm.phantom.screen import HOSPITALS
from moe_adapter.errors import MoEAdapterError

LINEAR = Probe(width_mm=40, depth_mm=40, megahertz=5)
CURVED = Probe(width_mm=120, depth_mm=90, megahertz=3, radius_mm=40, half_angle=30)


def combinations(kind: Kind) -> list[dict[str, str]]:
    return [dict(zip(kind, values, strict=True)) for values in itertools.product(*kind.values())]


def all_attributes() -> list[tuple[str, dict[str, str]]]:
    return [(organ, a) for organ in ORGANS for kind in KINDS[organ] for a in combinations(kind)]


@pytest.fixture(scope="module")
def phantom_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case]]:
    path = generate_cases(tmp_path_factory.mktemp("phantoms"), cases_per_organ=12, size=112)
    return path, read_cases(path)


def small(image: np.ndarray) -> np.ndarray:
    """The frame's brightness at 56 x 56, speckle averaged out."""
    return np.asarray(Image.fromarray(image).convert("L").resize((56, 56), Image.Resampling.BOX), dtype=float)


# --- physics ---


def test_speckle_is_rayleigh() -> None:
    """Mean over standard deviation of a Rayleigh envelope is sqrt(pi / (4 - pi)) = 1.913 (Wagner et al. 1983)."""
    level_db = bmode(Body(LINEAR, PARENCHYMA.at(2)), np.random.default_rng(0)) * DYNAMIC_RANGE_DB
    middle = 10 ** (level_db[20:-20] / 20)
    clipped = (level_db <= 0) | (level_db >= DYNAMIC_RANGE_DB)
    assert clipped.mean() < 1e-3, "clipping would bend the statistics"
    assert middle.mean() / middle.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.03)


def test_time_gain_keeps_tissue_level_with_depth() -> None:
    grey = bmode(Body(LINEAR, PARENCHYMA), np.random.default_rng(0))
    assert grey[30:90].mean() == pytest.approx(grey[-90:-30].mean(), abs=0.03)


def test_fluid_enhances_and_calcification_shadows() -> None:
    host = {"shape": "round", "size_mm": "10"}
    kinds = {
        "cyst": {"lesion": "cyst", "echogenicity": "anechoic"},
        "stone": {"lesion": "stone", "echogenicity": "hyperechoic", "posterior": "shadow"},
    }
    behind = {}
    for name, kind in kinds.items():
        body = Body(LINEAR, PARENCHYMA)
        lesion.paint(body, np.random.default_rng(0), host | kind, 0, 15, PARENCHYMA)
        grey = bmode(body, np.random.default_rng(0))
        column = (np.abs(body.x) < 3) & (body.z > 24)
        beside = (np.abs(body.x) > 10) & (body.z > 24)
        behind[name] = (grey[column].mean() - grey[beside].mean()) * DYNAMIC_RANGE_DB
    # 10 mm of fluid in place of soft tissue: 0.54 dB/(cm MHz) x 5 MHz x 2 cm of path saved, 5.4 dB
    assert behind["cyst"] == pytest.approx(5.4, abs=1.0)
    assert behind["stone"] < -20


@pytest.mark.parametrize("shape", ["round", "oval", "irregular"])
@pytest.mark.parametrize("size", [6.0, 40.0])
def test_an_outline_has_its_stated_largest_diameter(shape: str, size: float) -> None:
    radius = lesion.outline(np.random.default_rng(3), shape, size)
    points = radius * np.exp(1j * lesion.ANGLES)
    assert np.abs(points[:, None] - points[None]).max() == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("size", [6, 10, 14])
def test_a_cyst_measures_in_the_frame_what_the_report_says(size: int) -> None:
    """Its width, mean of four patients; an edge in a speckle field is where the mean power halves."""
    attributes = {"lesion": "cyst", "shape": "round", "echogenicity": "anechoic", "side": "left", "size_mm": str(size)}
    mm = PAINTERS["breast"].PROBE.width_mm / 448
    widths = []
    for seed in range(4):
        frame = render("breast", attributes, hospital="north", seed=(seed,), view=1, size=448)[..., 0]
        rows = frame[int(14.2 / mm) : int(17.2 / mm)]  # through the middle of the lesion
        power = (10 ** (rows / 255 * DYNAMIC_RANGE_DB / 10)).mean(axis=0)
        below = np.flatnonzero(power < np.median(power) / 2)
        widths.append(max(map(len, np.split(below, np.flatnonzero(np.diff(below) > 1) + 1))) * mm)
    assert np.mean(widths) == pytest.approx(size, abs=0.8)


@pytest.mark.parametrize("probe", [LINEAR, CURVED])
def test_scan_conversion_puts_a_point_where_it_belongs(probe: Probe) -> None:
    body = Body(probe, FLUID)
    spot = body.ellipse(8, 30, 3, 3)
    image = probe.to_image((spot < 1).astype(np.float32), 200)
    row, column = (indices.mean() + 0.5 for indices in np.nonzero(image > 0.5))
    mm = probe.width_mm / 200
    assert (column * mm - probe.width_mm / 2, row * mm) == pytest.approx((8, 30), abs=1.0)


@pytest.mark.parametrize(("velocity", "share"), [(0.3, 0.5), (-0.3, -0.5), (0.9, -0.5), (-0.9, 0.5), (1.2, 0.0)])
def test_velocities_alias_at_the_nyquist_velocity(velocity: float, share: float) -> None:
    assert wrapped(np.array(velocity)) == pytest.approx(share)


def test_red_is_towards_the_probe_and_blue_away() -> None:
    toward, away = colours(np.array([0.5, -0.5]))
    assert toward[0] > 2 * toward[2] and away[2] > 2 * away[0]


# --- frames show what the reports state ---


@pytest.mark.parametrize("organ", ORGANS)
def test_every_attribute_value_changes_the_frames_visibly(organ: str) -> None:
    """Two cases alike but for one stated value differ, in frames of 56 pixels, by more than speckle does."""
    for kind in KINDS[organ]:
        for name, values in kind.items():
            for first, second in itertools.combinations(values, 2):
                alike = {k: v[0] for k, v in kind.items()}
                one, other = (
                    small(render(organ, alike | {name: value}, hospital="north", seed=(7,), size=112))
                    for value in (first, second)
                )
                assert np.sort(np.abs(one - other), axis=None)[-8:].mean() > 30, (kind, name, first, second)


@pytest.mark.parametrize(("organ", "kind"), [(o, k) for o in ORGANS for k in KINDS[o] if k["lesion"] != ("none",)])
def test_every_kind_of_finding_is_visible(organ: str, kind: Kind) -> None:
    normal = {k: v[0] for k, v in KINDS[organ][0].items()}
    ill = {k: v[0] for k, v in kind.items()}
    normal |= {k: v for k, v in ill.items() if k in normal and k != "lesion" and v in KINDS[organ][0][k]}
    for view in (0, 1) if ill["lesion"] != "regurgitation" else (0,):  # a jet is seen in colour only
        frames = [render(organ, a, hospital="north", seed=(7,), view=view, size=112) for a in (normal, ill)]
        one, other = map(small, frames)
        assert np.sort(np.abs(one - other), axis=None)[-8:].mean() > 30, (view, ill)


@pytest.mark.parametrize("organ", ORGANS)
def test_frames_of_a_case_are_different_views(organ: str) -> None:
    attributes = {k: v[0] for k, v in KINDS[organ][1].items()}
    frames = [render(organ, attributes, hospital="hill", seed=(1,), view=view, size=112) for view in range(4)]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(frames, 2))
    assert {f.shape for f in frames} == {(112, 112, 3)} and frames[0].dtype == np.uint8


def test_only_vessel_and_heart_show_colour() -> None:
    for organ in ORGANS:
        attributes = {k: v[0] for k, v in KINDS[organ][0].items()}
        frame = render(organ, attributes, hospital="north", seed=(2,), size=112).astype(int)
        coloured = np.ptp(frame, axis=-1) > 60
        assert coloured.any() == (organ in ("vessel", "heart")), organ


# --- reports ---


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("hospital", HOSPITALS)
def test_every_report_reads_back_as_its_attributes(language: str, hospital: str) -> None:
    for organ, attributes in all_attributes():
        writer = Writer(organ=organ, language=language, hospital=hospital, attributes=attributes)
        assert parse_findings(writer.findings(), organ, language) == attributes
        assert len(writer.findings().split()) <= 45
        assert writer.impression()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_different_findings_have_different_reports(language: str) -> None:
    for hospital in HOSPITALS:
        reports = Counter(
            Writer(organ=o, language=language, hospital=hospital, attributes=a).findings() for o, a in all_attributes()
        )
        assert max(reports.values()) == 1


def test_no_slot_is_left_open() -> None:
    for organ, attributes in all_attributes():
        for language in ("en", "zh"):
            writer = Writer(organ=organ, language=language, hospital="hill", attributes=attributes)
            questions = writer.questions(np.random.default_rng(0))
            for text in (writer.findings(), writer.impression(), *(q.answer for q in questions)):
                assert not set("{}") & set(text) and "  " not in text and text[-1] in ".。", text
            assert 2 <= len(questions) <= 3


def test_the_parser_knows_the_whole_vocabulary() -> None:
    known = {name: set(values) for name, values in TERMS["en"].items()}
    assert known == {name: set(values) for name, values in TERMS["zh"].items()}
    for organ, attributes in all_attributes():
        assert all(v in known[k] for k, v in attributes.items() if k != "size_mm"), organ


@pytest.mark.parametrize(
    ("organ", "attributes", "expected"),
    [
        ("thyroid", {"lesion": "none"}, "none"),
        ("thyroid", {"lesion": "nodule", "shape": "irregular", "echogenicity": "hyperechoic"}, "high"),
        ("thyroid", {"lesion": "nodule", "shape": "oval", "echogenicity": "hypoechoic"}, "intermediate"),
        ("liver", {"lesion": "mass", "shape": "round", "echogenicity": "hypoechoic"}, "high"),
        ("liver", {"lesion": "mass", "shape": "irregular", "echogenicity": "hyperechoic"}, "low"),
        ("heart", {"lesion": "effusion", "size_mm": "20"}, "high"),
        ("vessel", {"lesion": "plaque", "pattern": "aliasing", "echogenicity": "hypoechoic"}, "intermediate"),
    ],
)
def test_concern(organ: str, attributes: dict[str, str], expected: str) -> None:
    assert concern(organ, attributes) == expected


# --- sets ---


def test_a_set_is_the_same_for_the_same_seed(phantom_set: tuple[Path, list[Case]], tmp_path: Path) -> None:
    path, cases = phantom_set
    again = generate_cases(tmp_path / "again", cases_per_organ=12, size=112)
    other = generate_cases(tmp_path / "other", cases_per_organ=12, size=112, seed=1)
    assert again.read_bytes() == path.read_bytes() != other.read_bytes()
    for image in cases[5].images:
        assert (again.parent / image).read_bytes() == (path.parent / image).read_bytes()
        assert (other.parent / image).read_bytes() != (path.parent / image).read_bytes()


def test_kinds_are_even_and_splits_keep_patients_apart(phantom_set: tuple[Path, list[Case]]) -> None:
    _, cases = phantom_set
    assert Counter(c.organ for c in cases) == dict.fromkeys(ORGANS, 12)
    for organ in ORGANS:
        mine = [c for c in cases if c.organ == organ]
        assert sum(c.split == "test" for c in mine) in (2, 3)
        assert sum(c.attributes["lesion"] == "none" for c in mine) == 3
    splits = {(c.patient, c.split) for c in cases}
    assert len(splits) == len({c.patient for c in cases}) < len(cases)


def test_both_languages_and_three_houses(phantom_set: tuple[Path, list[Case]]) -> None:
    _, cases = phantom_set
    assert 0.2 < sum(c.language == "zh" for c in cases) / len(cases) < 0.45
    assert {c.hospital for c in cases} == set(HOSPITALS)
    assert {q.dimension for c in cases for q in c.questions} == {
        "diagnostic interpretation",
        "risk stratification",
        "patient counselling",
        "surveillance",
        "treatment planning",
    }


def test_values_are_drawn_evenly_and_apart_from_language_and_hospital() -> None:
    """Nothing but the frames tells: for each attribute the best guess from the rest is near chance."""
    for organ, kinds in KINDS.items():
        mine = [describe(organ, number, seed=0, frames=1, split="train") for number in range(480)]
        for group in ({"language": "en"}, {"language": "zh"}, {"hospital": "hill"}):
            [(field, value)] = group.items()
            inside = [c for c in mine if getattr(c, field) == value]
            most_common = Counter(c.attributes["lesion"] for c in inside).most_common(1)[0][1] / len(inside)
            expected = Counter(kind["lesion"][0] for kind in kinds).most_common(1)[0][1] / len(kinds)
            assert most_common < expected + 0.1, (organ, group)
        for side in ("left", "right"):
            sided = [c for c in mine if "side" in c.attributes]
            if sided:
                assert abs(sum(c.attributes["side"] == side for c in sided) / len(sided) - 0.5) < 0.08


@pytest.mark.parametrize("bad", [{"cases_per_organ": 0}, {"test_share": 1.5}, {"frames": 5}, {"size": 8}])
def test_numbers_out_of_range(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(MoEAdapterError, match=f"{next(iter(bad))}: got .*; expected a number from"):
        generate_cases(tmp_path, **{"cases_per_organ": 4, **bad})


def test_progress_counts_every_case(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    generate_cases(tmp_path, cases_per_organ=1, frames=1, size=56, progress=lambda *step: seen.append(step))
    assert seen == [(i, 7) for i in range(1, 8)]
