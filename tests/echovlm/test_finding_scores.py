"""Finding-level scores: presence with its denials, laterality, size within its tolerance."""

from __future__ import annotations

import pytest

from examples.echovlm.finding_scores import FINDING_SCORES, finding_sums
from examples.echovlm.findings import parse_findings
from examples.echovlm.metrics import corpus_score

CYST = {"lesion": "cyst", "side": "left", "size_mm": "14", "shape": "round", "echogenicity": "anechoic"}
NONE = {"lesion": "none"}


def _scores(*pairs: tuple[str, dict[str, str]], language: str = "en") -> dict[str, float]:
    stated = [parse_findings(text, "thyroid", language) for text, _ in pairs]
    sums = finding_sums(stated, [truth for _, truth in pairs])
    return {name: float(corpus_score(name, sums[name].sum(0))) for name in FINDING_SCORES}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A 14 mm round anechoic cyst is seen in the left thyroid lobe.", 100.0),
        ("A 10 mm round anechoic cyst is seen in the left thyroid lobe.", 80.0),
        ("A 14 mm round anechoic cyst is seen.", 80.0),
        ("No nodule or cyst is seen.", 0.0),
        ("", 0.0),
    ],
)
def test_attributes_count_right_values_only(answer: str, expected: float) -> None:
    assert _scores((answer, CYST))["attributes"] == pytest.approx(expected)


def test_presence_sees_negation() -> None:
    told, denied = "A cyst is seen.", "No cyst is seen."
    assert _scores((told, CYST), (denied, NONE))["presence recall"] == 100
    scores = _scores((denied, CYST), (told, CYST), (told, NONE), (told, NONE), ("", CYST))
    assert scores["presence precision"] == pytest.approx(100 / 3)
    assert scores["presence recall"] == pytest.approx(100 / 3)
    scores = _scores(("未见囊肿。", CYST), ("左叶见囊肿。", CYST), language="zh")
    assert (scores["presence precision"], scores["presence recall"]) == (100, 50)


def test_presence_counts_another_finding_as_one() -> None:
    scores = _scores(("A nodule is seen.", CYST))
    assert scores["presence recall"] == 100 and scores["attributes"] == 0


def test_laterality() -> None:
    pairs = [("A cyst on the left.", CYST), ("A cyst on the right.", CYST), ("A cyst.", CYST), ("No cyst.", NONE)]
    assert _scores(*pairs)["laterality"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("14", "a 16 mm cyst", True),  # 2 mm
        ("14", "a 1.2 cm cyst", True),
        ("14", "a 16.1 mm cyst", False),
        ("40", "a 44 mm cyst", True),  # 10 %
        ("40", "a 36 mm cyst", True),
        ("40", "a 45 mm cyst", False),
        ("14", "a cyst", False),
        ("14", "no cyst", False),
    ],
)
def test_size_within_its_tolerance(truth: str, answer: str, right: bool) -> None:
    assert _scores((answer, {"lesion": "cyst", "size_mm": truth}))["size"] == (100 if right else 0)


def test_what_no_truth_has_is_not_scored() -> None:
    sums = finding_sums([{"lesion": "cyst"}] * 2, [{}, {"size_mm": "about an inch"}])
    assert {name: rows.sum(0).tolist() for name, rows in sums.items()} == {
        "attributes": [0, 1],  # of the second
        "presence precision": [0, 0],
        "presence recall": [0, 0],
        "laterality": [0, 0],
        "size": [0, 0],
    }
