"""Intervals cover, p-values are uniform where there is nothing, and both treat the case as what was sampled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from moe_adapter import MoEAdapterError
from moe_adapter.analysis import resampling
from moe_adapter.analysis.resampling import Resampling, benjamini_hochberg, p_value


def test_bootstrap_is_the_distribution_of_sums_over_drawn_cases():
    """Against all 27 ways to draw three cases from three."""
    values_NX = np.array([[1.0, 10.0], [2.0, 0.0], [4.0, 5.0]])
    every = np.array([values_NX[list(drawn)].sum(axis=0) for drawn in itertools.product(range(3), repeat=3)])
    samples = Resampling(resamples=20_000).bootstrap(values_NX)
    assert set(map(tuple, samples)) == set(map(tuple, every))
    for value, count in zip(*np.unique(every, axis=0, return_counts=True), strict=True):
        assert (samples == value).all(axis=1).mean() == pytest.approx(count / 27, abs=0.01)


def test_chunks_do_not_change_a_result(monkeypatch):
    values_NX = np.random.default_rng(0).normal(size=(11, 3))
    whole = Resampling(resamples=50)
    expected = whole.bootstrap(values_NX), np.concatenate(list(whole.permuted(np.arange(11) % 3)))
    monkeypatch.setattr(resampling, "CHUNK", 40)
    np.testing.assert_allclose(whole.bootstrap(values_NX), expected[0])
    parts = list(whole.permuted(np.arange(11) % 3))
    assert len(parts) == 333 and (np.concatenate(parts) == expected[1]).all()
    assert sum(map(len, whole.swaps(11))) == 999


def test_permutations_keep_the_number_of_each_label():
    (labels_PN,) = Resampling(permutations=200).permuted(np.array([0, 0, 0, 1, 2, 2]))
    assert (np.sort(labels_PN, axis=1) == [0, 0, 0, 1, 2, 2]).all()
    np.testing.assert_allclose((labels_PN == 0).mean(axis=0), 0.5, atol=0.15)


def test_p_values_by_hand():
    null = np.array([[0.0, 1.0, 5.0], [1.0, 1.0, np.nan], [2.0, 1.0, np.nan]])
    np.testing.assert_allclose(p_value(np.array([2.0, 1.0 + 1e-13, 9.0]), null), [2 / 4, 4 / 4, 3 / 4])
    assert np.isnan(p_value(np.array(np.nan), null[:, 0]))
    assert p_value(np.array(99.0), null[:, 0]) == 1 / 4


def test_benjamini_hochberg_against_scipy():
    p = np.random.default_rng(1).uniform(size=(5, 4)) ** 3
    np.testing.assert_allclose(
        benjamini_hochberg(p), stats.false_discovery_control(p.ravel()).reshape(5, 4), rtol=1e-12
    )
    holed = p.copy()
    holed[1, 2] = np.nan
    found = benjamini_hochberg(holed)
    assert np.isnan(found[1, 2])
    kept = ~np.isnan(holed)
    np.testing.assert_allclose(found[kept], stats.false_discovery_control(holed[kept]), rtol=1e-12)


def test_settings_are_checked():
    for settings in (dict(resamples=0), dict(permutations=0), dict(level=1.0), dict(level=95)):
        with pytest.raises(MoEAdapterError, match="expected at least 1 of each and a level between 0 and 1"):
            Resampling(**settings)
