"""An answer's findings beside the truth: which are right, wrong, missed, or nothing that the truth speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.echovlm.cases import Case
from examples.echovlm.finding_scores import finding_sums
from examples.echovlm.findings import parse_findings

# kind → symbol: told apart without colour.
RIGHT, WRONG, MISSED, ADDED = "right", "wrong", "missed", "added"
SYMBOLS = {RIGHT: "✓", WRONG: "✗", MISSED: "○", ADDED: "+"}
MEANING = {
    RIGHT: "stated as the truth has it (a size: within the tolerance of the score)",
    WRONG: "stated otherwise than the truth has it",
    MISSED: "in the truth, and not stated",
    ADDED: "stated, and the truth says nothing of it",
}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One attribute: what the answer states of it and what the truth is, empty where either has none."""

    kind: str
    name: str
    stated: str
    truth: str


def marks(answer: str, truth: Mapping[str, str], case: Case) -> list[Mark]:
    """A mark for each attribute of the truth, then for each that the answer alone states."""
    stated = parse_findings(answer, case.organ, case.language)
    size_right = bool(finding_sums([stated], [truth])["size"][0, 0])

    def kind(name: str) -> str:
        if name not in truth:
            return ADDED
        if name not in stated:
            return MISSED
        return RIGHT if stated[name] == truth[name] or (name == "size_mm" and size_right) else WRONG

    return [
        Mark(kind=kind(name), name=name, stated=stated.get(name, ""), truth=truth.get(name, ""))
        for name in [*truth, *(name for name in stated if name not in truth)]
    ]
