"""Balanced sampling: quotas by temperature and weight, and indices by the seed."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from echovlm.corpus.llm_server import language_model, write_case_file

from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.generation import generate
from examples.echovlm.corpus.instances import INSTANCES, read_instances
from examples.echovlm.corpus.manifest import MANIFEST
from examples.echovlm.corpus.sampling import balanced, quotas
from moe_adapter import MoEAdapterError

COUNTS = {"thyroid": 900, "breast": 90, "vessel": 10}
GROUPS = [name for name, count in COUNTS.items() for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("weights", [{}, {"vessel": 3.0}, {"thyroid": 0.0}])
@pytest.mark.parametrize("total", [1, 7, 100, 1000, 12345])
def test_quotas_are_within_one_of_the_formula(temperature, weights, total):
    got = quotas(COUNTS, total, temperature=temperature, weights=weights)
    share = np.array([weights.get(name, 1.0) * float(n) ** temperature for name, n in COUNTS.items()])
    assert sum(got.values()) == total
    assert np.abs(np.array(list(got.values())) - total * share / share.sum()).max() < 1


def test_the_ends_of_the_temperature():
    assert quotas(COUNTS, 1000) == COUNTS
    assert set(quotas(COUNTS, 999, temperature=0.0).values()) == {333}
    assert quotas(COUNTS | {"heart": 0}, 999, temperature=0.0)["heart"] == 0


def test_without_repetition_what_one_group_lacks_goes_to_the_others():
    assert quotas(COUNTS, 300, temperature=0.0, repeat=False) == {"thyroid": 200, "breast": 90, "vessel": 10}
    assert quotas(COUNTS, 60, temperature=0.0, repeat=False) == {"thyroid": 25, "breast": 25, "vessel": 10}
    assert quotas(COUNTS, 5000, temperature=0.0, repeat=False) == COUNTS
    none = quotas(COUNTS, 5000, weights={"thyroid": 0.0}, repeat=False)
    assert none == {"thyroid": 0, "breast": 90, "vessel": 10}
    for total in range(0, 1001, 37):
        got = quotas(COUNTS, total, temperature=0.4, repeat=False)
        assert sum(got.values()) == total and all(got[name] <= COUNTS[name] for name in COUNTS)


def test_indices_follow_the_quotas_and_the_seed():
    drawn = balanced(GROUPS, 600, temperature=0.0, seed=3)
    assert Counter(GROUPS[index] for index in drawn) == dict.fromkeys(COUNTS, 200)
    times = Counter(drawn)
    of = {name: {times[i] for i, group in enumerate(GROUPS) if group == name} for name in COUNTS}
    assert of == {"thyroid": {0, 1}, "breast": {2, 3}, "vessel": {20}}  # no item comes again before the others came
    assert drawn == balanced(GROUPS, 600, temperature=0.0, seed=3) != balanced(GROUPS, 600, temperature=0.0, seed=4)
    assert [GROUPS[index] for index in drawn[:50]].count("thyroid") < 40  # shuffled
    assert sorted(balanced(GROUPS)) == list(range(1000)) and balanced([], 5) == []


def test_refusals():
    with pytest.raises(MoEAdapterError, match="temperature: got 2"):
        quotas(COUNTS, 10, temperature=2)
    for weights in ({"spleen": 1.0}, {"vessel": -1.0}, {"vessel": float("nan")}):
        with pytest.raises(MoEAdapterError, match=rf"weights: got '{next(iter(weights))}'"):
            quotas(COUNTS, 10, weights=weights)


def test_the_step_draws_each_instance_once(tmp_path, capsys):
    with language_model() as model:
        generate(write_case_file(tmp_path / "c", ["liver"] * 6 + ["vessel"]), tmp_path / "g", model.server())
    command = ["sample", str(tmp_path / "g" / INSTANCES), "--total", "26", "--temperature", "0"]
    assert main([*command, "--out", str(tmp_path / "s")]) == 0
    drawn = read_instances(tmp_path / "s" / INSTANCES)
    assert Counter(item.organ for item in drawn) == {"liver": 13, "vessel": 13}
    manifest = json.loads((tmp_path / "s" / MANIFEST).read_text())
    assert manifest["kept"] == 26 and manifest["dropped"] == {"not drawn": manifest["given"] - 26}
    assert main([*command, "--out", str(tmp_path / "t"), "--weight", "vessel"]) == 2
    assert "--weight: got vessel; expected ORGAN=NUMBER" in capsys.readouterr().err
