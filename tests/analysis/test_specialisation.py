"""Specialisation that was planted is found; without any, p-values are uniform; the numbers are information theory's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest
from scipy import stats

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.resampling import Resampling
from moe_adapter.analysis.specialisation import mutual_information, specialisation

ORGANS = ["liver", "heart", "kidney"]


def test_bits_by_hand():
    """Two groups of equal size, one on expert 0 alone, one on expert 1: one bit. The same load in both: none."""
    counts_GLE = np.array([[[8, 0], [3, 1]], [[0, 8], [6, 2]]])
    information_L, divergence_LG = mutual_information(counts_GLE)
    np.testing.assert_allclose(information_L, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(divergence_LG, [[1.0, 1.0], [0.0, 0.0]], atol=1e-12)


def test_bits_of_a_record(written, clustered):
    """Against scipy's entropies and the rows themselves."""
    rng = np.random.default_rng(0)
    record = written(clustered(rng, 9, spread=1.0, layers=2), groups=ORGANS * 3)
    found = specialisation(record, resampling=Resampling(permutations=9))
    assert found.layers == (0, 1) and found.groups == ("heart", "kidney", "liver") and found.cases_G.tolist() == [3] * 3
    for layer in (0, 1):
        rows = record.table(where=pc.field("layer") == layer).to_pylist()
        joint = Counter((row["group"], row["expert"]) for row in rows)
        table_GE = np.array([[joint[group, expert] for expert in range(4)] for group in found.groups])
        entropies = [stats.entropy(counts.ravel(), base=2) for counts in (table_GE.sum(1), table_GE.sum(0), table_GE)]
        information = entropies[0] + entropies[1] - entropies[2]
        assert found.information_L.bits[layer] == pytest.approx(information, rel=1e-9)
        assert found.explained_L[layer] == pytest.approx(information / entropies[1], rel=1e-9)
        for group, counts in enumerate(table_GE):
            expected = stats.entropy(counts / counts.sum(), table_GE.sum(0) / table_GE.sum(), base=2)
            assert found.divergence_LG.bits[layer, group] == pytest.approx(expected, rel=1e-9)
        weights = table_GE.sum(1) / table_GE.sum()
        assert weights @ found.divergence_LG.bits[layer] == pytest.approx(information, rel=1e-9)


def test_p_values_count_permutations_of_cases(written, clustered):
    """Against labels moved from case to case in the rows, one permutation at a time."""
    record = written(clustered(np.random.default_rng(1), 8, spread=1.0), groups=["liver", "heart"] * 4)
    settings = Resampling(permutations=49, seed=3)
    found = specialisation(record, resampling=settings)
    counts = {case: np.zeros(4) for case in sorted(set(record.table()["case"].to_pylist()))}
    for row in record.table().to_pylist():
        counts[row["case"]][row["expert"]] += 1
    null = []
    for labels in np.concatenate(list(settings.permuted(np.array([1, 0] * 4)))):
        groups = [sum(c for c, own in zip(counts.values(), labels, strict=True) if own == label) for label in (0, 1)]
        parts = [stats.entropy(part, sum(groups), base=2) * part.sum() / sum(groups).sum() for part in groups]
        null.append(sum(parts))
    at_least = sum(value >= found.information_L.bits[0] - 1e-9 for value in null)
    assert 0 < at_least < 49
    assert found.information_L.p[0] == (1 + at_least) / 50
    assert found.information_L.null[0] == pytest.approx(np.mean(null))


def test_planted_specialisation_is_found(written, clustered, drawn):
    """In layer 1 of 3, hearts prefer expert 2, and cases differ as well; nothing else is planted."""
    rng = np.random.default_rng(2)
    experts = clustered(rng, 60, spread=0.5, layers=3)
    groups = [ORGANS[number % 3] for number in range(60)]
    for case, group in zip(experts, groups, strict=True):
        if group == "heart":
            case[:, 1:2] = drawn(rng, np.array([0, 0, 1.5, 0]) + rng.normal(0, 0.5, 4), (len(case), 1))
    found = specialisation(written(experts, groups=groups))
    assert found.information_L.p[1] == 1 / 1000 and found.information_L.q[1] == pytest.approx(3 / 1000)
    assert found.information_L.bits[1] > 4 * found.information_L.null[1]
    assert (found.information_L.p[[0, 2]] > 0.05).all() and (found.information_L.q[[0, 2]] > 0.05).all()
    by_group = {(row["layer"], row["group"]): row for row in found.groups_table().to_pylist()}
    assert by_group[1, "heart"]["p"] == 1 / 1000
    assert max(by_group, key=lambda key: by_group[key]["divergence"]) == (1, "heart")


def test_p_values_are_uniform_where_there_is_nothing(written, clustered):
    """Where cases differ much from each other; labels permuted over tokens would find that significant."""
    rng = np.random.default_rng(4)
    p = []
    for _ in range(150):
        record = written(clustered(rng, 18, spread=1.5), groups=ORGANS * 6)
        p.append(specialisation(record, resampling=Resampling(permutations=99, seed=int(rng.integers(2**31)))))
    assert stats.kstest([found.information_L.p[0] for found in p], "uniform").pvalue > 0.01
    assert stats.kstest([found.divergence_LG.p[0, 1] for found in p], "uniform").pvalue > 0.01


def test_groups_of_other_modalities_alone_are_told_by_the_filter(written, drawn):
    """Images go to expert 0, text to expert 3, in every case; livers have more images, that is all."""
    rng = np.random.default_rng(6)
    experts, modalities, groups = [], [], []
    for number in range(30):
        images = 40 if number % 2 else 5
        parts = [drawn(rng, np.array([3.0, 0, 0, 0]), (images, 1)), drawn(rng, np.array([0, 0, 0, 3.0]), (20, 1))]
        experts.append(np.concatenate(parts))
        modalities.append(np.repeat([1, 0], [images, 20]))
        groups.append("liver" if number % 2 else "heart")
    record = written(experts, modalities=modalities, groups=groups)
    assert specialisation(record).information_L.p[0] == 1 / 1000
    assert specialisation(record, where=pc.field("modality") == "image").information_L.p[0] > 0.05


def test_errors(written, clustered):
    experts = clustered(np.random.default_rng(0), 4, spread=1.0)
    with pytest.raises(MoEAdapterError, match="all cases are of group 'all'; specialisation needs two"):
        specialisation(written(experts))
    with pytest.raises(MoEAdapterError, match="some cases have tokens in two groups"):
        specialisation(written(experts, cases=["a", "a", "b", "c"], groups=["liver", "heart"] * 2))
