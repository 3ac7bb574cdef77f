"""One call gives all tables that a report needs, of whatever record."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moe_adapter import dual_path_layers
from moe_adapter.analysis.paths import path_weights
from moe_adapter.analysis.resampling import Resampling
from moe_adapter.analysis.summary import summary
from moe_adapter.analysis.tally import count_routing

FEW = Resampling(resamples=20, permutations=19)
OF_COUNTS = {"load", "paths"}
OF_CASES = {"shares", "balance", "modality", "coactivation", "ranks"}
OF_GROUPS = {"specialisation", "specialisation_groups"}


def test_a_record_of_a_vlm(vlm, image_batch, record):
    batch = image_batch("left")
    result = record(vlm, lambda: vlm(**batch), cases=["a", "b"], groups={"a": "liver", "b": "heart"})
    tables = summary(result, resampling=FEW)
    assert set(tables) == OF_COUNTS | OF_CASES | OF_GROUPS | {"tokens", "confidence"}
    assert sum(tables["load"]["count"].to_pylist()) == len(result.table())
    assert tables["balance"]["group"].to_pylist() == ["heart", "liver"] * 2
    text = json.dumps({name: table.to_pylist() for name, table in tables.items()}, allow_nan=False)
    assert "q" in json.loads(text)["specialisation"][0]


def test_what_a_record_does_not_allow_is_not_there(written):
    experts = [np.zeros((5, 1, 1), int)] * 2
    plain = written(experts, token_ids=[np.full(5, -1)] * 2)
    assert set(summary(plain, resampling=FEW)) == OF_COUNTS | OF_CASES
    split = written(experts, cases=["a", "a"], groups=["liver", "heart"], name="split.parquet")
    assert set(summary(split, resampling=FEW)) == OF_COUNTS | OF_CASES | {"tokens"}


def test_counts_alone(vlm, text_batch):
    with count_routing(vlm) as counts:
        vlm(**text_batch("left"))
    assert set(summary(counts.record())) == OF_COUNTS


def test_alpha_and_lambda(vlm, mixtral, text_batch, record):
    first, second = dual_path_layers(vlm).values()
    torch.nn.init.constant_(first.alpha_logit, 1.0)
    torch.nn.init.constant_(second.lam_logit, -1.0)
    rows = path_weights(record(vlm, lambda: vlm(**text_batch("left")))).to_table().to_pylist()
    assert [row["name"] for row in rows] == list(dual_path_layers(vlm))
    for row, layer in zip(rows, (first, second), strict=True):
        alpha, lam = (1 / (1 + np.exp(-logit.item())) for logit in (layer.alpha_logit, layer.lam_logit))
        found = [row[name] for name in ("alpha", "lam", "shared", "routed")]
        assert found == pytest.approx([alpha, lam, (1 - alpha) * lam, 1 - alpha], rel=1e-6)
    row = path_weights(record(mixtral, lambda: mixtral(**text_batch("left")))).to_table().to_pylist()[0]
    assert (row["alpha"], row["lam"], row["shared"], row["routed"]) == (None,) * 4
