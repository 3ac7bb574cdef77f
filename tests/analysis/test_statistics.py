"""Counts against the rows themselves, coefficients against values worked out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import transformers as tf
import zoo

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.statistics import coefficient_of_variation, expert_load, normalised_entropy


@pytest.fixture
def organs(vlm, image_batch, record):
    return record(vlm, lambda: vlm(**image_batch("left")), cases=["a", "b"], groups={"a": "liver", "b": "heart"})


@pytest.mark.parametrize(
    "by", [("layer",), ("group",), ("layer", "group", "modality"), ("case", "slot"), ()], ids=lambda by: "-".join(by)
)
@pytest.mark.parametrize("where", [None, pc.field("layer") == 1], ids=["all", "layer 1"])
def test_expert_load_counts_rows(organs, by, where):
    load = expert_load(organs, by=by, where=where)
    rows = organs.table(where=where).to_pylist()
    expected = Counter((*(row[name] for name in by), row["expert"]) for row in rows)
    found = {
        (*cell, expert): count
        for cell, counts in zip(load.cells, load.counts_CE, strict=True)
        for expert, count in enumerate(counts)
    }
    assert {key: count for key, count in found.items() if count} == expected
    assert load.counts_CE.shape[1] == 4
    np.testing.assert_allclose(load.share_CE.sum(axis=1), 1)


def test_totals_and_table(organs):
    load = expert_load(organs, by=("group", "modality"))
    for expert in range(4):
        rows = organs.table(where=(pc.field("group") == "liver") & (pc.field("expert") == expert))
        assert load.total(group="liver")[expert] == len(rows)
    assert load.total().sum() == len(organs.table())
    assert load.total(group="liver", modality="video").tolist() == [0, 0, 0, 0]
    with pytest.raises(MoEAdapterError, match="by group, modality, not by layer"):
        load.total(layer=0)
    table = load.to_table()
    assert table.column_names == ["group", "modality", "expert", "count", "share"]
    assert len(table) == 4 * 4
    assert table["count"].to_pylist() == load.counts_CE.ravel().tolist()
    assert table["group"].to_pylist()[:4] == ["heart"] * 4


@pytest.mark.parametrize(
    ("counts", "entropy", "variation"),
    [
        ([5, 5, 5, 5], 1.0, 0.0),
        ([8, 0, 0, 0], 0.0, 3**0.5),
        ([6, 6, 0, 0], 0.5, 1.0),
        ([4, 2, 1, 1], 0.875, 0.612372),
        ([0, 0, 0, 0], np.nan, np.nan),
    ],
)
def test_evenness_of_a_load(counts, entropy, variation):
    stacked = np.array([counts, [1, 1, 1, 1]])
    np.testing.assert_allclose(normalised_entropy(stacked), [entropy, 1.0], atol=1e-12)
    np.testing.assert_allclose(coefficient_of_variation(stacked), [variation, 0.0], atol=1e-6)


def test_layers_of_different_sizes_are_not_mixed(record):
    config = tf.MixtralConfig(**zoo.TEXT, num_local_experts=4, num_experts_per_tok=2)
    model = tf.MixtralForCausalLM(config).eval()
    other = tf.MixtralConfig(**zoo.TEXT, num_local_experts=3, num_experts_per_tok=1)
    model.model.layers[1].mlp = tf.MixtralForCausalLM(other).model.layers[0].mlp
    result = record(model, lambda: model(input_ids=torch.full((1, 6), 5)))
    assert [(layer.num_experts, layer.top_k) for layer in result.facts.layers] == [(4, 2), (3, 1)]
    assert result.facts.tokens * 3 == len(result.table()) == 18
    with pytest.raises(MoEAdapterError, match=r"layers have \[3, 4\] experts"):
        expert_load(result)
    assert expert_load(result, where=pc.field("layer") == 1).counts_CE.sum() == 6
    with pytest.raises(MoEAdapterError, match="passes the filter"):
        expert_load(result, where=pc.field("layer") == 5)
