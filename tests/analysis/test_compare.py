"""A difference that was planted between two records is found; where there is none, p-values are uniform."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest
from scipy import stats

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.compare import compare
from moe_adapter.analysis.resampling import Resampling, benjamini_hochberg
from moe_adapter.analysis.statistics import expert_load

FEW = Resampling(resamples=200, permutations=99)


@pytest.fixture
def pair(written, clustered, drawn):
    """pair(seed, shift, paired): two records of 16 cases, b's logits of expert 1 in hearts raised by `shift`."""

    def of(seed: int, *, shift: float = 0.0, paired: bool = True, spread: float = 1.0):
        rng = np.random.default_rng(seed)
        groups = ["liver", "heart"] * 8
        logits = rng.normal(0, spread, (2, 16, 4))
        if paired:
            logits[1] = logits[0]
        records = []
        for which in (0, 1):
            moved = [shift if which and group == "heart" else 0.0 for group in groups]
            experts = [
                drawn(rng, case + np.array([0, by, 0, 0]), (rng.integers(20, 60), 1))
                for case, by in zip(logits[which], moved, strict=True)
            ]
            names = [f"{'' if paired else which}case{number}" for number in range(16)]
            records.append(written(experts, groups=groups, cases=names, name=f"{which}.parquet"))
        return records

    return of


@pytest.mark.parametrize("paired", [True, False])
def test_a_planted_difference_is_found(pair, paired):
    a, b = pair(2, shift=3.0, paired=paired)
    found = compare(a, b, by=("group",))
    assert found.paired == paired and found.cells == (("heart",), ("liver",))
    for shares_CE, record in ((found.a_CE, a), (found.b_CE, b)):
        np.testing.assert_allclose(shares_CE, expert_load(record, by=("group",)).share_CE)
    np.testing.assert_allclose(found.difference_CE.value, found.b_CE - found.a_CE)
    heart, liver = found.cells_table().to_pylist()
    assert heart["p"] <= 0.01 and liver["p"] > 0.05
    assert heart["distance"] == pytest.approx(np.abs(found.b_CE - found.a_CE)[0].sum() / 2)
    rows = {(row["group"], row["expert"]): row for row in found.to_table().to_pylist()}
    assert rows["heart", 1]["difference_low"] > 0.1 and rows["heart", 1]["q"] < 0.05
    assert all(
        rows["liver", expert]["difference_low"] < 0 < rows["liver", expert]["difference_high"] for expert in range(4)
    )
    np.testing.assert_allclose([row["q"] for row in rows.values()], benjamini_hochberg(found.p_CE).ravel())


@pytest.mark.parametrize("paired", [True, False])
def test_p_values_are_uniform_and_intervals_cover_where_there_is_nothing(pair, paired):
    p, covered = [], []
    for seed in range(100):
        found = compare(*pair(seed, paired=paired), resampling=Resampling(resamples=200, permutations=99, seed=seed))
        p.append((found.distance_p_C[0], found.p_CE[0, 0]))
        covered.append((found.difference_CE.low <= 0) & (found.difference_CE.high >= 0))
    for values in np.array(p).T:
        assert stats.kstest(values, "uniform").pvalue > 0.01
    assert np.mean(covered) == pytest.approx(0.95, abs=0.035)


def test_both_directions_count(pair):
    """Two-sided: b against a has the p-values of a against b, whether a share rose or fell."""
    a, b = pair(2, shift=1.0)
    one, other = compare(a, b, by=("group",)), compare(b, a, by=("group",))
    np.testing.assert_allclose(one.p_CE, other.p_CE)
    np.testing.assert_allclose(one.difference_CE.value, -other.difference_CE.value)


def test_cases_that_differ_do_not_hide_a_paired_difference(pair):
    """The same small shift, between cases that differ much: seen only if a case is set against itself."""
    a, b = pair(1, shift=0.7, spread=2.0)
    paired, independent = (compare(a, b, by=("group",), paired=each) for each in (True, False))
    assert paired.p_CE[0, 1] < 0.05 < independent.p_CE[0, 1]
    widths = [found.difference_CE.high - found.difference_CE.low for found in (paired, independent)]
    assert widths[0][0, 1] < 0.7 * widths[1][0, 1]


def test_the_order_of_cases_does_not_matter(written, clustered):
    experts = clustered(np.random.default_rng(0), 6, spread=1.0)
    names = [f"c{number}" for number in range(6)]
    a = written(experts, cases=names, name="a.parquet")
    b = written(experts[::-1], cases=names[::-1], name="b.parquet")
    found = compare(a, b)
    assert found.paired and (found.difference_CE.value == 0).all() and (found.p_CE == 1).all()
    np.testing.assert_allclose([found.difference_CE.low, found.difference_CE.high], 0, atol=1e-12)


def test_cells_of_one_record_only_are_left_out(written, drawn):
    experts = [drawn(np.random.default_rng(0), np.zeros(4), (30, 1)) for _ in range(4)]
    a = written(experts, groups=["liver", "heart"] * 2, name="a.parquet")
    b = written(experts, groups=["liver", "vessel"] * 2, cases=list("wxyz"), name="b.parquet")
    assert compare(a, b, by=("group", "layer"), resampling=FEW).cells == (("liver", 0),)
    with pytest.raises(MoEAdapterError, match="no cell by group in common"):
        compare(a, b, by=("group",), where=pc.field("group") != "liver")


def test_errors(written, clustered):
    rng = np.random.default_rng(0)
    a = written(clustered(rng, 3, spread=1.0), name="a.parquet")
    b = written(clustered(rng, 4, spread=1.0), name="b.parquet")
    with pytest.raises(MoEAdapterError, match=r"not of the same cases .* compare with paired=False"):
        compare(a, b, paired=True)
    assert not compare(a, b, resampling=FEW).paired
    with pytest.raises(MoEAdapterError, match="the records have 4 and 8 experts"):
        compare(a, written(clustered(rng, 3, spread=1.0, experts=8), num_experts=8, name="c.parquet"))
