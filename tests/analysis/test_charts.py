"""The figures beside Figure 5: they show the record's numbers, and look as they did when they were looked at."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.testing.compare import compare_images
from PIL import Image

from moe_adapter import MoEAdapterError
from moe_adapter.analysis import charts, style
from moe_adapter.analysis.figures import figure5
from moe_adapter.analysis.overlays import expert_map, patch_experts
from moe_adapter.analysis.resampling import Resampling

GOLDEN = Path(__file__).parent / "golden"  # rewritten under MOE_ADAPTER_GOLDEN=write; look at what changed
ORGANS = ("breast", "heart", "thyroid")
QUICK = Resampling(resamples=50, permutations=99)


@pytest.fixture
def planted(written, drawn):
    """Three organs, four cases each, six layers; the first organ's tokens prefer expert 2 in the last three."""
    rng = np.random.default_rng(0)
    experts, groups, modalities = [], [], []
    for number in range(12):
        logits = np.zeros((6, 4))
        logits[3:, 2] = 2.0 * (number % 3 == 0)
        layers = [drawn(rng, logits_E, (40, 1)) for logits_E in logits]
        experts.append(np.concatenate(layers, axis=1))
        groups.append(ORGANS[number % 3])
        modalities.append(np.repeat([1, 0, 4], [24, 10, 6]))
    result = written(experts, groups=groups, modalities=modalities)
    facts = [replace(layer, alpha=0.5 + 0.02 * i, lam=0.6 - 0.03 * i) for i, layer in enumerate(result.facts.layers)]
    return replace(result, facts=replace(result.facts, layers=tuple(facts)))


def frames() -> list[Image.Image]:
    ramp = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    return [Image.fromarray(ramp), Image.fromarray(ramp[::-1])]


FIGURES = {
    "figure5": figure5,
    "layer_heatmap": charts.layer_heatmap,
    "stacked_load": charts.stacked_load,
    "coactivation_matrix": charts.coactivation_matrix,
    "specialisation_by_layer": lambda record: charts.specialisation_by_layer(record, resampling=QUICK),
    "path_weights_by_layer": charts.path_weights_by_layer,
    "token_pathways": charts.token_pathways,
    "expert_map": lambda record: expert_map(record, "case 0000", frames(), [(3, 4), (3, 4)], layer=5),
}


@pytest.mark.parametrize("name", FIGURES)
def test_golden_image(planted, name, tmp_path, monkeypatch):
    """Pixel by pixel, with the font that matplotlib brings, so that every machine draws the same."""
    monkeypatch.setattr(style, "font_families", lambda text: ["DejaVu Sans"])
    monkeypatch.setitem(style.STYLE, "savefig.dpi", 80)
    (found,) = style.save_figure(FIGURES[name](planted), tmp_path / name, ["png"])
    if os.environ.get("MOE_ADAPTER_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / found.name).write_bytes(found.read_bytes())
    if not matplotlib.__version__.startswith("3.11."):
        pytest.skip("the golden images are of matplotlib 3.11")
    assert compare_images(str(GOLDEN / found.name), str(found), tol=1.0) is None


def test_heatmap_shows_shares(planted):
    figure = charts.layer_heatmap(planted, groups=["heart"])
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title("left") for ax in panels] == ["(a) heart", "(b) overall"]
    table = planted.table().to_pylist()
    for ax, keep in zip(panels, (lambda row: row["group"] == "heart", lambda row: True), strict=True):
        for layer in range(6):
            rows = [row["expert"] for row in table if keep(row) and row["layer"] == layer]
            expected = np.bincount(rows, minlength=4) / len(rows)
            np.testing.assert_allclose(ax.images[0].get_array()[:, layer], expected)


def test_stacked_bars_sum_to_one(planted):
    ax = charts.stacked_load(planted).axes[0]
    heights = np.array([[bar.get_height() for bar in container] for container in ax.containers])
    assert heights.shape == (4, 6)
    np.testing.assert_allclose(heights.sum(axis=0), 1)


def test_coactivation_rows_are_conditional(planted):
    shown = charts.coactivation_matrix(planted).axes[0].images[0].get_array().filled(np.nan)
    tokens: dict[tuple, set[int]] = {}
    for row in planted.table().to_pylist():
        tokens.setdefault((row["case"], row["position"], row["layer"]), set()).add(row["expert"])
    chosen = [pair for pair in tokens.values() if 1 in pair]
    assert shown[1, 2] == pytest.approx(sum(2 in pair for pair in chosen) / len(chosen))
    np.testing.assert_allclose(np.nansum(shown, axis=1), 1)  # top-2: the other is one of three


def test_specialised_layers_are_marked(planted):
    ax = charts.specialisation_by_layer(planted, resampling=QUICK).axes[0]
    sure = next(line for line in ax.lines if line.get_label().startswith("q <"))
    assert list(sure.get_xdata()) == [3, 4, 5]


def test_pathways_flow_between_first_experts(planted):
    layers, flows = charts._flows(planted, None)
    assert layers == list(range(6)) and flows.shape == (5, 4, 4)
    first = {}
    for row in planted.table().to_pylist():
        if row["slot"] == 0:
            first[row["case"], row["position"], row["layer"]] = row["expert"]
    expected = np.zeros((4, 4))
    for (case, position, layer), expert in first.items():
        if layer == 2:
            expected[expert, first[case, position, 3]] += 1
    np.testing.assert_array_equal(flows[2], expected)


def test_expert_map_lays_tokens_out_in_reading_order(planted):
    maps = patch_experts(planted, "case 0003", [(3, 4), (2, 6)], layer=4)
    rows = planted.table().to_pylist()
    expected = [
        row["expert"]
        for row in rows
        if (row["case"], row["modality"], row["layer"], row["slot"]) == ("case 0003", "image", 4, 0)
    ]
    assert [frame.shape for frame in maps] == [(3, 4), (2, 6)]
    assert np.concatenate([frame.ravel() for frame in maps]).tolist() == expected


def test_refusals(planted, written):
    with pytest.raises(MoEAdapterError, match=r"24 image tokens .* have 20"):
        patch_experts(planted, "case 0000", [(4, 5)], layer=0)
    with pytest.raises(MoEAdapterError, match="0 image tokens"):
        patch_experts(planted, "no such case", [(4, 6)], layer=0)
    with pytest.raises(MoEAdapterError, match="2 frames and 1 grids"):
        expert_map(planted, "case 0000", frames(), [(4, 6)], layer=0)
    with pytest.raises(MoEAdapterError, match="no group"):
        charts.layer_heatmap(planted, groups=["lung"])
    single = written([np.zeros((5, 1, 1), int)], name="single.parquet")
    for figure, message in (
        (charts.coactivation_matrix, "top-k of 2"),
        (charts.path_weights_by_layer, "no α"),
        (charts.token_pathways, "two layers"),
    ):
        with pytest.raises(MoEAdapterError, match=message):
            figure(single)
