"""Finding-level scores: what of a case's findings the answers state, denials and measurements included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from examples.echovlm.cases import Case
from examples.echovlm.findings import parse_findings

SIZE_SHARE, SIZE_MM = 0.1, 2.0  # a size is right within the larger of the two
FINDING_SCORES = {
    "attributes": "attributes of the truth that the answer states with their exact value; a wrong and a missing one "
    "count alike",
    "presence precision": "answers that state a finding, of whose truth has one",
    "presence recall": "truths with a finding, of whose answer states one, be it another; a denial does not",
    "laterality": "truths with a side, of whose answer states that side",
    "size": f"truths with a size, of whose answer states it within {SIZE_SHARE:.0%} or {SIZE_MM:g} mm, the larger",
}

Findings = Mapping[str, str]


def truth_of(task: str, reference: str, case: Case) -> dict[str, str]:
    """A report's is the case's attributes; where there are none, and of another task, what the reference states."""
    known = case.attributes if task == "report" else {}
    return dict(known) or parse_findings(reference, case.organ, case.language)


def finding_sums(stated: Sequence[Findings], truths: Sequence[Findings]) -> dict[str, np.ndarray]:
    """Sums (N, 2) of each score: what is right in an answer, and of how many."""
    rows = [_counts(answer, truth) for answer, truth in zip(stated, truths, strict=True)]
    return {name: np.array([row[name] for row in rows], float).reshape(-1, 2) for name in FINDING_SCORES}


def _counts(stated: Findings, truth: Findings) -> dict[str, tuple[int, int]]:
    known = "lesion" in truth
    claimed, present = (known and found.get("lesion", "none") != "none" for found in (stated, truth))
    size = _millimetres(truth)
    return {
        "attributes": (sum(stated.get(name) == value for name, value in truth.items()), len(truth)),
        "presence precision": (claimed and present, claimed),
        "presence recall": (claimed and present, present),
        "laterality": ("side" in truth and stated.get("side") == truth["side"], "side" in truth),
        "size": (size is not None and _near(_millimetres(stated), size), size is not None),
    }


def _millimetres(found: Findings) -> float | None:
    """None too of a size that is no number, as a user's own attributes may have it."""
    try:
        return float(found["size_mm"])
    except (KeyError, ValueError):
        return None


def _near(stated: float | None, truth: float) -> bool:
    return stated is not None and abs(stated - truth) <= max(SIZE_SHARE * truth, SIZE_MM) + 1e-9  # of rounding
