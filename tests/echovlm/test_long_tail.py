"""Balanced sampling in the recipe's preset: how often the stages draw each organ, and a tail made on purpose."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from echovlm.recipe_parts import PRESET

from examples.echovlm.account import Account
from examples.echovlm.cases import Case
from examples.echovlm.config import PresetError, RecipeConfig, SamplingConfig, load_preset
from examples.echovlm.corpus.sampling import balanced
from examples.echovlm.data import Data, load_data
from examples.echovlm.recipe import _examples
from moe_adapter import MoEAdapterError

COUNTS = {"liver": 12, "breast": 6, "vessel": 3}


def _config(**sampling) -> RecipeConfig:
    return dataclasses.replace(load_preset("paper"), sampling=SamplingConfig(**sampling))


def _data() -> Data:
    names = [(organ, f"{organ} {number}") for organ, count in COUNTS.items() for number in range(count)]
    values = dict(hospital="", language="en", images=("a.png",), findings="Normal.", impression="Fine.", split="train")
    cases = tuple(Case(id=name, patient=name, organ=organ, **values) for organ, name in names)
    return Data(folder=Path(), train=cases, test=(), shown=())


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {"liver": 12, "breast": 6, "vessel": 3}),
        ({"temperature": 0}, {"liver": 7, "breast": 7, "vessel": 7}),
        ({"temperature": 0, "weights": {"vessel": 5}}, {"liver": 3, "breast": 3, "vessel": 15}),
        ({"weights": {"liver": 0.5, "vessel": 3}}, {"liver": 6, "breast": 6, "vessel": 9}),
        ({"weights": {"liver": 0}}, {"breast": 14, "vessel": 7}),
    ],
)
def test_the_stages_draw_each_organ_as_the_preset_says(sampling: dict, expected: dict) -> None:
    for stage, tasks in ((1, 1), (2, 2)):  # reports; reports and diagnoses
        drawn = _examples(stage, _data(), _config(**sampling))
        assert Counter(example.organ for example in drawn) == {o: tasks * count for o, count in expected.items()}
        assert drawn == _examples(stage, _data(), _config(**sampling))
        seen = Counter(example.case_id for example in drawn if example.organ == "vessel")
        assert len(seen) == COUNTS["vessel"] and max(seen.values()) - min(seen.values()) <= tasks


def test_without_sampling_the_examples_stay_in_order() -> None:
    assert [e.case_id for e in _examples(1, _data(), _config())] == [case.id for case in _data().train]


def test_a_tail_is_cut_by_patient_and_from_training_alone(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(PRESET.replace("cases_per_organ: 3", "cases_per_organ: 12"))
    whole = load_preset(str(tmp_path / "preset.yaml"))
    data = load_data(whole, None, tmp_path, Account(), made=False)
    cut = dataclasses.replace(whole, sampling=SamplingConfig(keep={"vessel": 0.4, "heart": 0.001}))
    account = Account()
    with account.step("Cases"):
        kept = load_data(cut, None, tmp_path, account, made=True)
    assert kept.test == data.test
    left = {organ: [c for c in kept.train if c.organ == organ] for organ in ("vessel", "heart")}
    before = {c.patient for c in data.train if c.organ == "vessel"}
    assert len({c.patient for c in left["vessel"]}) == round(0.4 * len(before)) < len(before)
    assert len({c.patient for c in left["heart"]}) == 1  # an organ never goes altogether
    assert left["vessel"] == [c for c in data.train if c.patient in {c.patient for c in left["vessel"]}]
    assert [c for c in kept.train if c.organ not in left] == [c for c in data.train if c.organ not in left]
    assert f"{len(left['heart'])} heart" in "".join(account.lines["Cases"])
    assert kept.train == load_data(cut, None, tmp_path, Account(), made=True).train


def test_a_negative_total_is_refused_and_does_not_go_on_for_ever() -> None:
    with pytest.raises(MoEAdapterError, match="total: got -5"):
        balanced(["liver", "liver"], -5)


def test_an_organ_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoEAdapterError, match="weights: got 'vesel', expected numbers ≥ 0 for some of liver"):
        _examples(1, _data(), _config(weights={"vesel": 2}))
    (tmp_path / "preset.yaml").write_text(PRESET + "sampling: {keep: {vesel: 0.5}}")
    config = load_preset(str(tmp_path / "preset.yaml"))
    with pytest.raises(MoEAdapterError, match=r"sampling\.keep: got 'vesel', which no training case is of; expected"):
        load_data(config, None, tmp_path, Account(), made=False)


@pytest.mark.parametrize(
    "sampling", ["{temperature: 2}", "{keep: {liver: 0}}", "{temprature: 0}", "{weights: {a: -1}}"]
)
def test_a_setting_out_of_its_range_is_named(tmp_path: Path, sampling: str) -> None:
    (tmp_path / "preset.yaml").write_text(PRESET + f"sampling: {sampling}")
    with pytest.raises(PresetError, match=r"sampling\."):
        load_preset(str(tmp_path / "preset.yaml"))
