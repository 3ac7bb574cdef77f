"""The figure of a comparison shows both loads, their difference, and signs where it is sure."""

from __future__ import annotations

import numpy as np
import pytest

from moe_adapter.analysis.compare import compare
from moe_adapter.analysis.differences import comparison_figure
from moe_adapter.analysis.resampling import Resampling, benjamini_hochberg

QUICK = Resampling(resamples=50, permutations=199)


@pytest.fixture
def compared(written, drawn):
    """Of two layers, the second record prefers expert 2 in the last."""

    def of(by):
        records = []
        for number, name in enumerate("ab"):
            rng = np.random.default_rng(number)
            logits = [np.zeros(4), np.array([0, 0, 2.0 * number, 0])]
            experts = [np.concatenate([drawn(rng, each, (30, 1)) for each in logits], axis=1) for _ in range(14)]
            records.append(written(experts, groups=["heart", "肝"] * 7, name=f"{name}.parquet"))
        return compare(*records, by=by, resampling=QUICK)

    return of


@pytest.mark.parametrize("by", [("layer",), ("layer", "group")])
def test_the_panels_hold_the_comparisons_numbers(compared, by):
    found = compared(by)
    figure = comparison_figure(found, names=("before", "after"))
    panels = [ax for ax in figure.axes if ax.images]
    expected = (found.a_CE, found.b_CE, found.difference_CE.value)
    for ax, values_CE in zip(panels, expected, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), values_CE.T)
        labels = [text.get_text() for text in ax.get_xticklabels()]
        assert labels == [", ".join(map(str, cell)) for cell in found.cells]
    assert panels[0].images[0].norm is panels[1].images[0].norm
    scale = panels[2].images[0].norm
    assert scale.vmin == -scale.vmax == -np.abs(found.difference_CE.value).max()
    assert [ax.get_title(loc="left") for ax in panels][:2] == ["(a) before", "(b) after"]


def test_signs_stand_where_the_difference_is_sure(compared):
    found = compared(("layer",))
    ax = [ax for ax in comparison_figure(found).axes if ax.images][2]
    signs = {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts}
    sure = np.argwhere(benjamini_hochberg(found.p_CE) < 0.05)
    assert signs == {(c, e): "+" if found.difference_CE.value[c, e] > 0 else "−" for c, e in sure.tolist()}
    assert signs[1, 2] == "+" and "−" in signs.values() and all(cell == 1 for cell, _ in signs)


def test_equal_records_have_no_sign(written, drawn):
    rng = np.random.default_rng(0)
    experts = [drawn(rng, np.zeros(4), (30, 2)) for _ in range(4)]
    records = [written(experts, name=f"{name}.parquet") for name in "ab"]
    figure = comparison_figure(compare(*records, resampling=QUICK))
    assert not [ax for ax in figure.axes if ax.images][2].texts
