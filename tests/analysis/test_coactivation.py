"""Pairs of a token's experts, all of them, against a count over the rows."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.coactivation import coactivation


@pytest.fixture
def three_of_five(written, drawn):
    """Two layers, three of five experts a token, in several row groups."""
    rng = np.random.default_rng(0)
    experts = [drawn(rng, rng.normal(size=5), (size, 2), top_k=3) for size in (7, 12, 5)]
    return written(experts, groups=["liver", "heart", "liver"], num_experts=5, row_group_rows=50)


@pytest.mark.parametrize("where", [None, pc.field("group") == "liver", pc.field("layer") == 1], ids=str)
def test_counts_all_pairs_of_a_token(three_of_five, where):
    found = coactivation(three_of_five, where=where)
    tokens: dict[tuple, set] = {}
    for row in three_of_five.table(where=where).to_pylist():
        tokens.setdefault((row["layer"], row["case"], row["position"]), set()).add(row["expert"])
    pairs = Counter((layer, *pair) for (layer, *_), of in tokens.items() for pair in itertools.product(of, of))
    assert found.layers == ((1,) if where is not None and "layer" in str(where) else (0, 1))
    for number, layer in enumerate(found.layers):
        assert found.tokens_L[number] == sum(key[0] == layer for key in tokens)
        for i, j in itertools.product(range(5), repeat=2):
            assert found.pairs_LEE[number, i, j] == pairs[layer, i, j]


def test_measures(three_of_five):
    found = coactivation(three_of_five)
    pairs, tokens = found.pairs_LEE[0], found.tokens_L[0]
    rows = {(row["expert"], row["other"]): row for row in found.to_table().to_pylist() if row["layer"] == 0}
    assert len(rows) == 20
    for (i, j), row in rows.items():
        assert row["count"] == pairs[i, j]
        assert row["conditional"] == pytest.approx(pairs[i, j] / pairs[i, i])
        assert row["jaccard"] == pytest.approx(pairs[i, j] / (pairs[i, i] + pairs[j, j] - pairs[i, j]))
        assert row["lift"] == pytest.approx(pairs[i, j] * tokens / (pairs[i, i] * pairs[j, j]))
    np.testing.assert_allclose(found.conditional_LEE[0].sum(axis=1) - 1, 2)  # k − 1 others to each expert


def test_lift_of_random_pairs_is_what_the_docstring_says(written, drawn):
    found = coactivation(written([drawn(np.random.default_rng(0), np.zeros(4), (40_000, 1))]))
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(found.lift_LEE[0][off], (2 - 1) * 4 / (2 * (4 - 1)), rtol=0.03)


def test_one_expert_a_token_and_idle_experts(written):
    found = coactivation(written([np.array([[[0]], [[2]], [[0]]])]))
    assert found.pairs_LEE[0].tolist() == np.diag([2, 0, 1, 0]).tolist()
    row = found.to_table().to_pylist()[3]
    assert (row["expert"], row["other"], row["conditional"], row["lift"]) == (1, 0, None, None)


def test_single_slots_are_refused(three_of_five):
    with pytest.raises(MoEAdapterError, match="leaves out some of a token's slots"):
        coactivation(three_of_five, where=pc.field("expert") != 0)
    with pytest.raises(MoEAdapterError, match="leaves out some of a token's slots"):
        coactivation(three_of_five, where=pc.field("slot") == 1)
    with pytest.raises(MoEAdapterError, match="passes the filter"):
        coactivation(three_of_five, where=pc.field("group") == "spleen")
