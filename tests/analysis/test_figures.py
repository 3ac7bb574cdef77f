"""Figure 5 shows the record's counts, in a journal's format, whatever the groups are called."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.colors import to_rgb

from moe_adapter import MoEAdapterError
from moe_adapter.analysis import style
from moe_adapter.analysis.figures import figure5
from moe_adapter.analysis.statistics import expert_load

ORGANS = ["thyroid", "breast", "liver", "kidney", "gynaecology", "vessel", "heart"]


@pytest.fixture
def recorded(vlm, record):
    """recorded(groups): one case of random text and image tokens per group."""

    def of(groups: list[str]):
        ids = torch.randint(3, 100, (len(groups), 40))
        ids[:, 5:25] = 120
        return record(vlm, lambda: vlm(input_ids=ids), cases=groups, groups=dict(zip(groups, groups, strict=True)))

    return of


def bars(ax) -> dict[str, np.ndarray]:
    """Heights (E,) of each series, checked to be stacked."""
    heights = {c.get_label(): np.array([bar.get_height() for bar in c]) for c in ax.containers}
    bottom = np.zeros(4)
    for container in ax.containers:
        np.testing.assert_allclose([bar.get_y() for bar in container], bottom)
        bottom = bottom + heights[container.get_label()]
    return heights


@pytest.mark.parametrize("layer", [None, 1])
def test_bars_are_the_records_counts(recorded, layer):
    result = recorded(ORGANS)
    figure = figure5(result, layer=layer)
    titles = [ax.get_title("left") for ax in figure.axes]
    letters = "abcdefgh"
    names = ["breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel", "overall"]
    assert titles == [f"({letter}) {name}" for letter, name in zip(letters, names, strict=True)]
    table = result.table(where=None if layer is None else pc.field("layer") == layer).to_pylist()
    for ax, name in zip(figure.axes, names, strict=True):
        for series, modality in (("image", "image"), ("text", "prompt")):
            rows = [row for row in table if name in ("overall", row["group"]) and row["modality"] == modality]
            expected = np.bincount([row["expert"] for row in rows], minlength=4)
            assert bars(ax)[series].tolist() == expected.tolist()
            assert expected.sum() > 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["image", "text"]


def test_shares_add_up(recorded):
    result = recorded(["b", "a"])
    figure = figure5(result, share=True)
    load = expert_load(result, by=("group",))
    for ax, group in zip(figure.axes, ["a", "b"], strict=False):
        total = sum(bars(ax).values())
        assert total.sum() == pytest.approx(100)
        np.testing.assert_allclose(total, 100 * load.total(group=group) / load.total(group=group).sum())
        assert ax.get_ylim() == figure.axes[0].get_ylim()
        assert ax.lines[0].get_ydata()[0] == 25


def test_groups_can_be_chosen_and_titled(recorded):
    result = recorded(["b", "a", "c"])
    figure = figure5(result, groups=["c", "a"], titles={"c": "site C", "overall": "all sites"})
    assert [ax.get_title("left") for ax in figure.axes] == ["(a) site C", "(b) a", "(c) all sites"]
    assert sum(bars(figure.axes[-1]).values()).tolist() == expert_load(result, by=()).counts_CE[0].tolist()
    with pytest.raises(MoEAdapterError, match=r"no group \['d'\]; its groups are a, b, c"):
        figure5(result, groups=["d"])
    with pytest.raises(MoEAdapterError, match="layers 0 to 1, not layer 2"):
        figure5(result, layer=2)


@pytest.mark.parametrize(
    ("groups", "width_mm", "rows_columns"),
    [(1, 183, (1, 1)), (3, 183, (1, 4)), (7, 183, (2, 4)), (7, 89, (4, 2)), (4, 183, (2, 3)), (30, 183, (8, 4))],
)
def test_the_grid_adapts(recorded, groups, width_mm, rows_columns, tmp_path):
    figure = figure5(recorded([f"g{number:02}" for number in range(groups)]), width_mm=width_mm)
    panels = groups + 1 if groups > 1 else 1
    assert len(figure.axes) == panels
    assert figure.axes[0].get_gridspec().get_geometry() == rows_columns
    assert figure.get_size_inches()[0] == pytest.approx(width_mm / 25.4)
    if groups == 30:
        assert figure.axes[-1].get_title("left") == "(ae) overall"
    style.save_figure(figure, tmp_path / "figure", formats=["png"])  # lays it out
    boxes = [ax.get_position() for ax in figure.axes]
    assert all(box.width > 0 and box.height > 0 for box in boxes)


def test_files(recorded, tmp_path):
    png, pdf = style.save_figure(figure5(recorded(["a"])), tmp_path / "out" / "figure.5")
    assert (png.name, pdf.name) == ("figure.5.png", "figure.5.pdf")
    assert png.read_bytes().startswith(b"\x89PNG\r\n") and pdf.read_bytes().startswith(b"%PDF-")
    width = int.from_bytes(png.read_bytes()[16:20])
    assert width == pytest.approx(183 / 25.4 * 300, abs=1)


def test_pyplot_stays_out():
    code = "import sys; import moe_adapter.analysis.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_series_differ_in_grey():
    looks = [style.IMAGE_LOOK, style.TEXT_LOOK]
    grey = [np.dot(to_rgb(look["facecolor"]), [0.299, 0.587, 0.114]) for look in looks]
    assert abs(grey[0] - grey[1]) > 0.3
    every = [style.IMAGE_LOOK, style.VIDEO_LOOK, style.AUDIO_LOOK, style.TEXT_LOOK]
    assert len({look.get("hatch") for look in every}) == 4


@pytest.fixture
def only_matplotlibs_fonts(monkeypatch):
    own = ("DejaVu Sans", "Last Resort High-Efficiency")
    fonts = [font for font in font_manager.fontManager.ttflist if font.name in own]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)


def test_labels_without_a_font_warn_once(recorded, only_matplotlibs_fonts, tmp_path, recwarn):
    style.save_figure(figure5(recorded(["甲状腺", "liver"])), tmp_path / "figure")
    messages = [str(warning.message) for warning in recwarn if "font" in str(warning.message)]
    assert messages == [
        "no installed font has 状甲腺, so figures show boxes there; install one, for example Noto Sans CJK (Debian: "
        "fonts-noto-cjk)."
    ]


def test_labels_in_an_installed_font(recorded, only_matplotlibs_fonts, tmp_path, recwarn):
    font_manager.fontManager.addfont(_font(tmp_path / "cjk.ttf", "甲状腺"))
    figure = figure5(recorded(["甲状腺", "liver"]))
    assert figure.axes[-2].title.get_fontfamily() == ["DejaVu Sans", "Square CJK"]
    _, pdf = style.save_figure(figure, tmp_path / "figure")
    assert b"SquareCJK" in pdf.read_bytes(), "the font is not embedded"
    assert not [warning for warning in recwarn if "font" in str(warning.message)]


def _font(path, characters: str) -> str:
    """A font in which every given character is a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(character):04X}" for character in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): f"uni{ord(character):04X}" for character in characters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Square CJK", "styleName": "Regular", "psName": "SquareCJK"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)
    return str(path)
