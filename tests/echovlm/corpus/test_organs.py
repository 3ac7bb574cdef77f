"""Organs in reports: the phantoms' reports name their own organ and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.echovlm.cases import read_cases
from examples.echovlm.corpus.organs import organs_in
from examples.echovlm.phantom import generate_cases


def test_every_phantom_report_names_its_organ_and_no_other(tmp_path: Path) -> None:
    cases = read_cases(generate_cases(tmp_path, cases_per_organ=12, test_share=0.1, frames=1, size=56, seed=0))
    named = [(case.organ, organs_in(f"{case.findings}\n{case.impression}")) for case in cases]
    assert len(named) >= 84
    assert [pair for pair in named if not set(pair[1]) <= {pair[0]}] == []
    assert sum(bool(organs) for _, organs in named) > 0.8 * len(named)


@pytest.mark.parametrize(
    ("text", "organs"),
    [
        ("No lesion in the liver; kidneys normal.", ("liver", "kidney")),
        ("The gall bladder is filled.", ("gallbladder",)),
        ("Urinary bladder well filled, uterus regular.", ("gynaecology",)),
        ("THYROID", ("thyroid",)),
        ("颈动脉内膜增厚", ("vessel",)),
        ("肾上腺区未见异常", ()),
        ("肝、胆囊、脾未见异常", ("liver", "gallbladder", "spleen")),
        ("Normal study.", ()),
    ],
)
def test_organs_in_the_order_of_their_mention(text: str, organs: tuple[str, ...]) -> None:
    assert organs_in(text) == organs
