"""Shares and evenness against the rows themselves; intervals that cover at the rate they say."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest
from scipy import stats

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.balance import balance, load_shares
from moe_adapter.analysis.resampling import Resampling
from moe_adapter.analysis.statistics import (
    coefficient_of_variation,
    expert_load,
    max_over_mean,
    normalised_entropy,
    shares,
)


@pytest.fixture
def organs(written, clustered):
    rng = np.random.default_rng(0)
    experts = clustered(rng, 12, spread=1.0, layers=2)
    modalities = [rng.integers(0, 2, len(case)) for case in experts]
    return written(experts, groups=["liver", "heart", "liver"] * 4, modalities=modalities)


@pytest.mark.parametrize("by", [("layer",), ("group", "layer"), ("modality", "group"), ("slot",), ()], ids="-".join)
def test_shares_are_those_of_the_load(organs, by):
    load, found = expert_load(organs, by=by), load_shares(organs, by=by, resampling=Resampling(resamples=50))
    assert (found.by, found.cells) == (load.by, load.cells)
    np.testing.assert_allclose(found.share_CE.value, load.share_CE)
    assert (found.share_CE.low <= found.share_CE.value).all() and (found.share_CE.value <= found.share_CE.high).all()
    for cell, cases in zip(found.cells, found.cases_C, strict=True):
        rows = organs.table().to_pylist()
        of_cell = [row for row in rows if all(row[name] == value for name, value in zip(by, cell, strict=True))]
        assert cases == len({row["case"] for row in of_cell})


def test_the_interval_of_a_group_comes_from_its_own_cases(organs):
    """Against a bootstrap written out, of the group's cases alone, its tails expanded for eight cases."""
    settings = Resampling(resamples=20_000, level=0.8)
    found = load_shares(organs, by=("group",), where=pc.field("layer") == 1, resampling=settings)
    rows = organs.table(where=(pc.field("layer") == 1) & (pc.field("group") == "liver")).to_pylist()
    cases = sorted({row["case"] for row in rows})
    counts = np.array([[sum(r["case"] == c and r["expert"] == e for r in rows) for e in range(4)] for c in cases])
    rng = np.random.default_rng(9)
    samples = [shares(sum(counts[rng.integers(8)] for _ in range(8))) for _ in range(20_000)]
    tail = stats.norm.cdf(stats.t.ppf(0.1, df=7) * (8 / 7) ** 0.5)
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    assert found.cells[1] == ("liver",) and len(cases) == 8
    np.testing.assert_allclose(found.share_CE.low[1], low, atol=0.004)
    np.testing.assert_allclose(found.share_CE.high[1], high, atol=0.004)


def test_intervals_cover(written, clustered):
    """Every expert's true share is 1/4, by symmetry; resampling tokens in place of cases would cover far less."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        record = written(clustered(rng, 40, spread=1.0))
        share = load_shares(record, by=("layer",), resampling=Resampling(resamples=300)).share_CE
        covered.append((share.low <= 0.25) & (share.high >= 0.25))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_balance_is_of_the_load(organs):
    found, load = balance(organs, by=("group", "layer")), expert_load(organs, by=("group", "layer"))
    assert found.cells == load.cells
    for estimate, measure in (
        (found.entropy_C, normalised_entropy),
        (found.variation_C, coefficient_of_variation),
        (found.max_over_mean_C, max_over_mean),
    ):
        np.testing.assert_allclose(estimate.value, measure(load.counts_CE))
        assert (estimate.low < estimate.high).all()
    table = found.to_table()
    assert table.column_names[:5] == ["group", "layer", "cases", "entropy", "entropy_low"]
    assert table["group"].to_pylist() == ["heart", "heart", "liver", "liver"] and table["cases"].to_pylist() == [
        4,
        4,
        8,
        8,
    ]


def test_one_case_has_no_interval(written, clustered):
    record = written(clustered(np.random.default_rng(0), 3, spread=1.0), groups=["a", "b", "b"])
    table = load_shares(record, by=("group",)).to_table().to_pylist()
    assert [row["share_low"] is None for row in table] == [True] * 4 + [False] * 4
    assert all(row["share"] is not None for row in table)
    assert [row["cases"] for row in table] == [1] * 4 + [2] * 4


def test_a_case_in_two_groups_is_drawn_as_one(written, clustered):
    """All of it comes, or none: two halves drawn apart would make the whole's interval narrower."""
    experts = clustered(np.random.default_rng(5), 10, spread=2.0, tokens=200)
    halves = [half for case in experts for half in np.array_split(case, 2)]
    names = [f"case {number}" for number in range(10)]
    groups = ["a"] * 10
    whole = load_shares(written(experts, cases=names, groups=groups), by=("layer",)).share_CE
    halved = written(halves, cases=[n for n in names for _ in "ab"], groups=["a", "b"] * 10, name="halved.parquet")
    split = load_shares(halved, by=("layer",)).share_CE
    for one, other in zip(whole, split, strict=True):
        np.testing.assert_allclose(one, other)


def test_errors(organs):
    with pytest.raises(MoEAdapterError, match=r"intervals are over cases, so cells can't be cases"):
        load_shares(organs, by=("case",))
    with pytest.raises(MoEAdapterError, match="passes the filter"):
        balance(organs, where=pc.field("group") == "spleen")
    with pytest.raises(MoEAdapterError, match=r"no column \['organ'\]"):
        load_shares(organs, by=("organ",))
