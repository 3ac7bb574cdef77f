"""Overlap of the same tokens' experts over checkpoints, however the files are cut; a folder of snapshots; the curve."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import transformers as tf
import zoo

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.saturation import saturation
from moe_adapter.analysis.snapshots import open_snapshots, saturation_curve, snapshot_path

GENERATED = 4


@pytest.fixture
def checkpoints(written, drawn):
    """Records at steps 1, 2 and 3 of which so many tokens already have their last experts: none, half, all."""
    rng = np.random.default_rng(0)
    last = [drawn(rng, np.zeros(4), (size, 2)) for size in (300, 500, 400)]
    records = {}
    for step, settled in ((1, 0.0), (2, 0.5), (3, 1.0)):
        experts = [
            np.where(rng.random((len(case), 1, 1)) < settled, case, drawn(rng, np.zeros(4), (len(case), 2)))
            for case in last
        ]
        records[str(step)] = written(experts, name=f"{step}.parquet", row_group_rows=100 + 77 * step)
    return records


def test_how_much_has_settled(checkpoints):
    found = saturation(checkpoints)
    assert (found.checkpoints, found.layers, found.chance_L.tolist()) == (("1", "2"), (0, 1), [0.5, 0.5])
    np.testing.assert_allclose(found.saturation_SL.value, [[0.5, 0.5], [0.75, 0.75]], atol=0.03)
    ours, theirs = (
        [row for row in r.table().to_pylist() if row["layer"] == 1] for r in (checkpoints["2"], checkpoints["3"])
    )
    sets = [
        ({a["expert"], b["expert"]}, {c["expert"], d["expert"]})
        for a, b, c, d in zip(ours[::2], ours[1::2], theirs[::2], theirs[1::2], strict=True)
    ]
    expected = np.mean([len(one & other) / 2 for one, other in sets])
    assert found.saturation_SL.value[1, 1] == pytest.approx(expected, rel=1e-12)
    row = found.to_table().to_pylist()[3]
    assert (row["checkpoint"], row["layer"], row["chance"]) == ("2", 1, 0.5)
    assert row["saturation_low"] < row["saturation"] < row["saturation_high"]


def test_a_filter(checkpoints):
    found = saturation(checkpoints, where=(pc.field("layer") == 1) & (pc.field("position") < 10))
    assert found.layers == (1,) and found.saturation_SL.value.shape == (2, 1)


def test_what_a_checkpoint_generated_is_left_out(written):
    given = np.array([[[0, 1]], [[2, 3]]])
    after = [np.concatenate([given, np.full((size, 1, 2), [[0, 3]])]) for size in (3, 1)]
    records = {
        str(number): written(
            [experts], modalities=[np.repeat([0, GENERATED], [2, len(experts) - 2])], name=f"{number}.parquet"
        )
        for number, experts in enumerate(after)
    }
    assert saturation(records).saturation_SL.value.tolist() == [[1.0]]


def test_a_model_in_training(text_batch, record, tmp_path):
    """Records of a real model whose routers move by steps: those of layer 1 alone."""
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**zoo.TEXT, num_local_experts=4, num_experts_per_tok=2)).eval()
    batch = text_batch("left")
    records = {}
    for step in range(3):
        result = record(model, lambda: model(**batch))
        kept = tmp_path / f"step{step}.parquet"
        result.paths[0].rename(kept)
        records[f"step{step}"] = type(result).open(kept)
        torch.nn.init.normal_(model.model.layers[1].mlp.gate.weight)
    found = saturation(records).saturation_SL.value
    assert (found[:, 0] == 1).all() and (found[:, 1] < 1).all()


def test_a_folder_of_snapshots(checkpoints, tmp_path):
    """In order of step, not of name; the parts of processes are one record, and one that lacks a part is none."""
    folder = tmp_path / "routing"
    folder.mkdir()
    for step, record in zip((2, 9_000_000, 10_000_000), checkpoints.values(), strict=True):
        record.paths[0].rename(snapshot_path(folder, step))
    for rank in range(11):
        shutil.copy(snapshot_path(folder, 2), snapshot_path(folder, 5, rank=rank, ranks=11))
    shutil.copy(snapshot_path(folder, 2), snapshot_path(folder, 7, rank=1, ranks=2))
    shutil.copy(snapshot_path(folder, 2), folder / "step-000008.parquet.bak")
    with pytest.warns(UserWarning, match=r"step 7 in .* has 1 parts of 2"):
        records = open_snapshots(folder)
    assert list(records) == ["2", "5", "9000000", "10000000"]
    assert [path.name for path in records["5"].paths] == [f"step-000005.{rank}-of-11.parquet" for rank in range(11)]
    assert records["5"].facts.tokens == 11 * records["2"].facts.tokens
    with pytest.raises(MoEAdapterError, match="no snapshot in"):
        open_snapshots(tmp_path / "absent")


def test_the_curve_draws_what_was_found(checkpoints):
    found = saturation(checkpoints)
    ax, bar = saturation_curve(found).axes
    curves = ax.lines[:2]
    assert [line.get_xdata().tolist() for line in curves] == [[1, 2]] * 2
    np.testing.assert_array_equal([line.get_ydata() for line in curves], found.saturation_SL.value.T)
    assert [line.get_ydata()[0] for line in ax.lines[2:]] == [0.5] and bar.get_ylabel() == "layer"
    bands = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert [(band.min(), band.max()) for band in bands] == list(
        zip(found.saturation_SL.low.min(axis=0), found.saturation_SL.high.max(axis=0), strict=True)
    )
    named = saturation_curve(saturation({f"epoch {name}": record for name, record in checkpoints.items()})).axes[0]
    assert [label.get_text() for label in named.get_xticklabels()] == ["epoch 1", "epoch 2"]


def test_errors(checkpoints, written):
    one = {"1": checkpoints["1"]}
    with pytest.raises(MoEAdapterError, match="got 1 record"):
        saturation(one)
    sizes = (300, 500, 400)
    nothing = [np.zeros((size, 2, 2), int) for size in sizes]
    for other in (
        written(nothing, cases=list("abc"), name="cases.parquet"),
        written(nothing, token_ids=[np.arange(size) for size in sizes], name="ids.parquet"),
        written([case[:-1] for case in nothing], name="shorter.parquet"),
    ):
        with pytest.raises(MoEAdapterError, match="do not hold the same tokens in the same order"):
            saturation(one | {"2": other})
    three = [np.zeros((size, 2, 3), int) for size in sizes]
    with pytest.raises(MoEAdapterError, match="differ in their layers or in k"):
        saturation(one | {"2": written(three, name="three.parquet")})
