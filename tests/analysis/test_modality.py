"""Where the modalities go, with a planted preference and lengths that have nothing to do with it."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest

from moe_adapter.analysis.modality import modality_preference
from moe_adapter.analysis.resampling import Resampling


@pytest.fixture
def two_kinds(written, drawn):
    """30 cases of two layers. In layer 1 images prefer expert 0 by odds of e², text none; nothing in layer 0."""
    rng = np.random.default_rng(0)
    experts, modalities = [], []
    for images in rng.integers(50, 150, 30):
        text = drawn(rng, np.zeros(4), (10, 2))
        image = np.concatenate(
            [drawn(rng, np.zeros(4), (images, 1)), drawn(rng, np.array([2.0, 0, 0, 0]), (images, 1))], axis=1
        )
        experts.append(np.concatenate([text, image]))
        modalities.append(np.repeat([0, 1], [10, images]))
    return written(experts, modalities=modalities, groups=["liver", "heart"] * 15)


@pytest.mark.parametrize("where", [None, pc.field("group") == "liver"], ids=str)
def test_against_the_rows(two_kinds, where):
    found = modality_preference(two_kinds, where=where, resampling=Resampling(resamples=20))
    assert (found.layers, found.modalities) == ((0, 1), ("image", "prompt"))
    counts = np.zeros((2, 2, 4))
    for row in two_kinds.table(where=where).to_pylist():
        counts[row["layer"], found.modalities.index(row["modality"]), row["expert"]] += 1
    for layer, modality, expert in np.ndindex(2, 2, 4):
        here = counts[layer, modality, expert]
        rate = here / counts[layer, modality].sum()
        assert found.rate.value[layer, modality, expert] == pytest.approx(rate)
        assert found.part.value[layer, modality, expert] == pytest.approx(here / counts[layer, :, expert].sum())
        overall = counts[layer, :, expert].sum() / counts[layer].sum()
        assert found.preference.value[layer, modality, expert] == pytest.approx(rate / overall)


def test_a_planted_preference_is_found(two_kinds):
    rows = {
        (row["layer"], row["modality"], row["expert"]): row
        for row in modality_preference(two_kinds).to_table().to_pylist()
    }
    assert rows[1, "image", 0]["preference_low"] > 1.01 and rows[1, "prompt", 0]["preference_high"] < 0.8
    for key in ((0, "image", 0), (0, "prompt", 3)):
        assert rows[key]["preference_low"] < 1 < rows[key]["preference_high"]
        assert rows[key]["rate_low"] < 0.25 < rows[key]["rate_high"]
    assert rows[0, "image", 0]["part"] > 0.85, "there are ten images' tokens to one of text"


def test_a_modality_of_one_case_has_no_interval(written, drawn):
    rng = np.random.default_rng(0)
    experts = [drawn(rng, np.zeros(4), (20, 1)) for _ in range(5)]
    modalities = [np.repeat([0, 2], [10, 10]) if number == 3 else np.zeros(20, int) for number in range(5)]
    rows = modality_preference(written(experts, modalities=modalities)).to_table().to_pylist()
    assert {row["modality"]: row["rate_low"] is None for row in rows} == {"prompt": False, "video": True}
