"""Gap and entropy of the recorded weights, and load by rank, against the rows and by hand."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.confidence import confidence, rank_load
from moe_adapter.analysis.resampling import Resampling


@pytest.fixture
def weighted(written, drawn):
    """Three experts a token whose weights sum to 2.5 and are in no order, as some routers leave them."""
    rng = np.random.default_rng(0)
    experts = [drawn(rng, np.zeros(4), (size, 2), top_k=3) for size in (6, 9, 4, 8)]
    weights = [2.5 * rng.dirichlet([1, 1, 1], case.shape[:2]).astype(np.float32) for case in experts]
    modalities = [np.arange(len(case)) % 2 for case in experts]
    return written(experts, weights=weights, modalities=modalities, groups=["liver", "heart"] * 2, row_group_rows=60)


def tokens_of(record, where=None) -> list[tuple[dict, list[tuple[float, int]]]]:
    """(a token and layer, its (weight, expert), largest first)."""
    found: dict[tuple, tuple[dict, list]] = {}
    for row in record.table(where=where).to_pylist():
        key = (row["layer"], row["case"], row["position"])
        found.setdefault(key, (row, []))[1].append((row["weight"], row["expert"]))
    return [(row, sorted(slots, reverse=True)) for row, slots in found.values()]


@pytest.mark.parametrize("by", [("layer",), ("group", "modality"), ()], ids="-".join)
def test_means_over_tokens(weighted, by):
    found = confidence(weighted, by=by, resampling=Resampling(resamples=50))
    cells: dict[tuple, list] = {}
    for row, slots in tokens_of(weighted):
        w = np.array([weight for weight, _ in slots]) / sum(weight for weight, _ in slots)
        cells.setdefault(tuple(row[name] for name in by), []).append((w[0] - w[1], -(w * np.log(w)).sum() / np.log(3)))
    assert found.cells == tuple(sorted(cells))
    for number, cell in enumerate(found.cells):
        gap, entropy = np.mean(cells[cell], axis=0)
        assert found.gap_C.value[number] == pytest.approx(gap, rel=1e-5)
        assert found.entropy_C.value[number] == pytest.approx(entropy, rel=1e-5)
    assert (found.gap_C.low < found.gap_C.value).all() and (found.gap_C.value < found.gap_C.high).all()


def test_extremes(written):
    experts, weights = np.array([[[0, 1]]] * 3), np.array([[[0.5, 0.5]], [[0.0, 3.0]], [[0.0, 0.0]]], np.float32)
    row = confidence(written([experts, experts], weights=[weights, weights])).to_table().to_pylist()[0]
    assert row["gap"] == 0.5 and row["entropy"] == 0.5, "of a token split evenly and one all on one; the third has none"


def test_the_gap_tells_the_logits_apart(vlm, text_batch, record):
    """log(w₁/w₂) is the difference of the two largest logits: what the docstring says the weights give."""
    logits = []
    for layer in vlm.model.language_model.layers:
        layer.mlp.router.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    batch = text_batch("right")
    result = record(vlm, lambda: vlm(**batch))
    real_T = batch["attention_mask"].flatten().bool()
    for number, logits_TE in enumerate(logits):
        top = logits_TE[real_T].topk(2).values
        found = [np.log(w1 / w2) for _, ((w1, _), (w2, _)) in tokens_of(result, pc.field("layer") == number)]
        np.testing.assert_allclose(sorted(found), sorted((top[:, 0] - top[:, 1]).tolist()), atol=1e-5)


@pytest.mark.parametrize("by", [("layer",), ("layer", "modality")], ids="-".join)
def test_load_by_rank_is_by_weight(weighted, by):
    found = rank_load(weighted, by=by)
    expected: dict[tuple, np.ndarray] = {}
    for row, slots in tokens_of(weighted):
        for rank, (_, expert) in enumerate(slots):
            expected.setdefault((*(row[name] for name in by), rank), np.zeros(4))[expert] += 1
    assert found.by == (*by, "rank") and found.cells == tuple(sorted(expected))
    np.testing.assert_array_equal(found.counts_CE, [expected[cell] for cell in found.cells])


def test_errors(written, weighted):
    with pytest.raises(MoEAdapterError, match="layer 0 routes each token to one expert"):
        confidence(written([np.zeros((3, 1, 1), int)]))
    with pytest.raises(MoEAdapterError, match=r"a token has no \['slot'\]; it has case, group"):
        rank_load(weighted, by=("slot",))
    with pytest.raises(MoEAdapterError, match="passes the filter"):
        confidence(weighted, where=pc.field("layer") == 7)
