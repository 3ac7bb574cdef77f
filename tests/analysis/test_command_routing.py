"""`moe-adapter routing stats`, `plot` and `compare`: the library's tables and figures, and what goes with what."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from command_models import TEMPLATE, image_cases, mixtral, run, save_text_model, save_vlm, write_lines
from PIL import Image

from moe_adapter.analysis import charts, style
from moe_adapter.analysis.balance import balance, load_shares
from moe_adapter.analysis.commands import _options
from moe_adapter.analysis.commands._output import as_text
from moe_adapter.analysis.compare import compare
from moe_adapter.analysis.confidence import confidence
from moe_adapter.analysis.differences import comparison_figure
from moe_adapter.analysis.figures import figure5
from moe_adapter.analysis.modality import modality_preference
from moe_adapter.analysis.overlays import expert_map
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import Resampling
from moe_adapter.analysis.saturation import saturation
from moe_adapter.analysis.schema import METADATA_KEY, MODALITIES
from moe_adapter.analysis.snapshots import open_snapshots, saturation_curve
from moe_adapter.analysis.specialisation import specialisation
from moe_adapter.analysis.statistics import expert_load, max_over_mean
from moe_adapter.analysis.tally import count_routing

QUICK = Resampling(resamples=50, permutations=99)
FAST = ("--resamples", "50", "--permutations", "99")
IMAGES = pc.field("modality").isin(pa.array(["image"]))


@pytest.fixture
def record(written, drawn) -> RoutingRecord:
    """Two organs, three cases each, three layers; the second organ prefers expert 2. Layers have an α."""
    return planted(written, drawn, "record.parquet")


def planted(written, drawn, name: str, *, seed: int = 0, strength: float = 2.0, top_k: int = 2) -> RoutingRecord:
    rng = np.random.default_rng(seed)
    logits = [np.array([0, 0, strength * (case % 2), 0]) for case in range(6)]
    experts = [drawn(rng, each, (40, 3), top_k) for each in logits]
    modalities = [np.repeat([1, 0, 4], [24, 10, 6])] * 6
    found = written(experts, groups=["heart", "肝"] * 3, modalities=modalities, name=name)
    layers = [replace(layer, alpha=0.5 + 0.1 * number, lam=0.4) for number, layer in enumerate(found.facts.layers)]
    facts = replace(found.facts, layers=tuple(layers))
    table = pq.read_table(found.paths[0]).replace_schema_metadata({METADATA_KEY: facts.to_json()})
    pq.write_table(table, found.paths[0])
    return RoutingRecord.open(found.paths[0])


def said(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def plain(table: pa.Table) -> list[dict]:
    return json.loads(json.dumps(table.to_pylist()))


def test_the_usual_tables_are_the_librarys(record, capsys):
    found = said(capsys, "routing", "stats", record.paths[0], *FAST)
    information = specialisation(record, resampling=QUICK)
    assert found["tables"] == {
        "load": plain(load_shares(record, resampling=QUICK).to_table()),
        "balance": plain(balance(record, resampling=QUICK).to_table()),
        "specialisation": plain(information.to_table()),
        "specialisation_groups": plain(information.groups_table()),
        "modality": plain(modality_preference(record, resampling=QUICK).to_table()),
        "confidence": plain(confidence(record, resampling=QUICK).to_table()),
    }
    assert found["left_out"] == {} and found["record"] == [str(record.paths[0])]


def test_rows_parts_and_uncertainty_are_as_asked(record, capsys):
    chosen = ("--by", "group", "layer", "--groups", "肝", "--layers", "1", "2", "--modalities", "image")
    arguments = ("--tables", "load", *chosen, *FAST, "--level", "0.5", "--seed", "3")
    found = said(capsys, "routing", "stats", record.paths[0], *arguments)
    where = IMAGES & (pc.field("group") == "肝") & (pc.field("layer") > 0)
    sure = Resampling(resamples=50, permutations=99, level=0.5, seed=3)
    expected = load_shares(record, by=("group", "layer"), where=where, resampling=sure)
    assert found["tables"] == {"load": plain(expected.to_table())}
    assert _options.MODALITIES == MODALITIES


def test_every_table_can_be_asked_for_and_several_files_are_one_record(record, written, drawn, capsys):
    other = planted(written, drawn, "other.parquet", seed=1)
    paths = (*record.paths, *other.paths)
    found = said(capsys, "routing", "stats", *paths, "--tables", "load", *FAST)
    both = RoutingRecord.open(paths)
    assert found["tables"]["load"] == plain(load_shares(both, resampling=QUICK).to_table())
    names = said(capsys, "routing", "stats", *record.paths, "--tables", "all", *FAST)["tables"]
    assert {"coactivation", "ranks", "tokens", "paths"} < set(names)


def test_tokens_are_named_by_the_models_tokenizer(record, tmp_path, capsys):
    model = save_text_model(mixtral(), tmp_path / "model", TEMPLATE)
    (row, *_) = said(capsys, "routing", "stats", *record.paths, "--tables", "tokens", "--model", model)["tables"][
        "tokens"
    ]
    assert (row["token_id"], row["token"]) == (7, "is")


def test_what_a_record_has_none_of_is_left_out_with_a_reason(written, drawn, capsys):
    rng = np.random.default_rng(0)
    record = written([drawn(rng, np.zeros(4), (20, 2), 1) for _ in range(3)])
    assert run("routing", "stats", *record.paths, *FAST) == 0
    captured = capsys.readouterr()
    assert "confidence left out: layer 0 routes each token to one expert" in captured.err
    assert "specialisation left out: all cases are of group 'all'" in captured.err
    assert "confidence\n" not in captured.out and "balance\n" in captured.out
    assert run("routing", "stats", *record.paths, "--tables", "confidence") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_counts_have_load_and_balance_without_intervals(tmp_path, capsys):
    model = mixtral()
    with count_routing(model) as counts:
        model(input_ids=torch.tensor([[4, 5, 6, 7]]))
        counts.write(tmp_path / "counts.parquet")
    record = RoutingRecord.open(tmp_path / "counts.parquet")
    found = said(capsys, "routing", "stats", tmp_path / "counts.parquet")["tables"]
    assert found["load"] == plain(expert_load(record).to_table())
    assert [row["max_over_mean"] for row in found["balance"]] == max_over_mean(expert_load(record).counts_CE).tolist()


def test_csv_has_a_file_for_each_table(record, tmp_path, capsys):
    tables = ("--tables", "load", "specialisation")
    assert run("routing", "stats", *record.paths, *tables, *FAST, "--csv", tmp_path / "csv") == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "load.csv",
        "specialisation.csv",
        "specialisation_groups.csv",
    ]
    found = pyarrow.csv.read_csv(tmp_path / "csv" / "load.csv")
    assert found["share"].to_pylist() == pytest.approx(load_shares(record).to_table()["share"].to_pylist())


def test_text_tables_line_up_whatever_the_script():
    columns = {
        "group": ["肝", "heart"],
        "share": [0.5, 0.25],
        "share_low": [0.4, None],
        "share_high": [0.6, None],
        "p": [0.0001, float("nan")],
        "cases": [1234, 5],
        "token": ["\n", "a\x1b[0m"],
    }
    assert as_text(columns).split("\n") == [
        "group                 share        p  cases  token",
        "肝     0.500 [0.400, 0.600]  1.0e-04  1,234  \\n",
        "heart                 0.250        –      5  a\\x1b[0m",
    ]


DRAWN = {
    "5": (
        ("--by", "share", "--groups", "肝", "--layers", "1"),
        lambda r: figure5(r, share=True, groups=["肝"], layer=1),
    ),
    "heatmap": (("--width", "single"), lambda r: charts.layer_heatmap(r, width_mm=89.0)),
    "load": (("--modalities", "image"), lambda r: charts.stacked_load(r, where=IMAGES)),
    "coactivation": ((), charts.coactivation_matrix),
    "specialisation": (FAST, lambda r: charts.specialisation_by_layer(r, resampling=QUICK)),
    "alpha": (("--width", "double"), lambda r: charts.path_weights_by_layer(r, width_mm=183.0)),
    "pathways": (("--groups", "heart"), lambda r: charts.token_pathways(r, where=pc.field("group") == "heart")),
}


def same_picture(path: Path, figure, folder: Path) -> bool:
    (expected,) = style.save_figure(figure, folder / "expected", ["png"])
    return np.array_equal(*(np.asarray(Image.open(each)) for each in (path, expected)))


@pytest.mark.parametrize("name", DRAWN)
def test_each_figure_is_the_librarys(name, record, tmp_path, capsys):
    arguments, expected = DRAWN[name]
    assert run("routing", "plot", *record.paths, "--figure", name, *arguments, "-o", tmp_path / "f.png") == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "f.png")]
    assert same_picture(tmp_path / "f.png", expected(record), tmp_path)


def test_a_figure_has_the_formats_that_its_files_names_end_in(record, tmp_path, capsys):
    outputs = [tmp_path / name for name in ("a.pdf", "b.SVG", "v1.2")]
    outputs[0].write_text("old")
    arguments = [part for output in outputs for part in ("-o", output)]
    assert run("routing", "plot", *record.paths, "--figure", "load", *arguments) == 0
    written = {Path(line).name for line in capsys.readouterr().out.split()}
    assert written == {"a.pdf", "b.SVG", "v1.2.pdf", "v1.2.png"}
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in (tmp_path / "b.SVG").read_bytes()


def test_all_figures_go_into_a_directory_and_what_cannot_be_drawn_is_told(written, drawn, tmp_path, capsys):
    rng = np.random.default_rng(0)
    record = written([drawn(rng, np.zeros(4), (20, 2), 1) for _ in range(3)])
    found = said(capsys, "routing", "plot", *record.paths, "--figure", "all", "-o", tmp_path / "all", *FAST)
    assert sorted(found["left_out"]) == ["alpha", "coactivation", "specialisation"]
    names = ("figure5", "heatmap", "load", "pathways")
    assert sorted(os.listdir(tmp_path / "all")) == sorted(f"{n}.{f}" for n in names for f in ("pdf", "png"))
    assert len(found["written"]) == 8


def test_saturation_is_of_a_folder_of_snapshots(written, drawn, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "snapshots").mkdir()
    for step in (100, 200, 300):
        experts = [drawn(rng, np.array([0, step / 100, 0, 0]), (20, 2)) for _ in range(4)]
        written(experts, name=f"snapshots/step-{step:06d}.parquet")
    out = ("--figure", "saturation", "-o", tmp_path / "s.png", *FAST)
    assert run("routing", "plot", tmp_path / "snapshots", *out) == 0
    expected = saturation_curve(saturation(open_snapshots(tmp_path / "snapshots"), resampling=QUICK))
    assert same_picture(tmp_path / "s.png", expected, tmp_path)
    assert run("routing", "plot", tmp_path, *out) == 1
    assert "no snapshot in" in capsys.readouterr().err


def test_the_experts_of_a_cases_images(written, drawn, tmp_path, capsys):
    model = save_vlm(tmp_path / "model")
    cases = write_lines(tmp_path / "cases.jsonl", image_cases(tmp_path))
    experts = [drawn(np.random.default_rng(0), np.zeros(4), (10, 3))]
    record = written(experts, cases=["a"], modalities=[np.repeat([1, 0], [8, 2])])
    arguments = ("--figure", "experts", "--case", "a", "--cases", cases, "--model", model, "-o", tmp_path / "a.png")
    assert run("routing", "plot", *record.paths, *arguments) == 0
    frames = [Image.open(tmp_path / f"{number}.png") for number in range(2)]
    assert same_picture(tmp_path / "a.png", expert_map(record, "a", frames, [(2, 2), (2, 2)], layer=2), tmp_path)
    assert run("routing", "plot", *record.paths, *arguments, "--case", "z") == 1
    assert "has no case 'z'" in capsys.readouterr().err


def test_compare_is_the_librarys_and_draws_it(record, written, drawn, tmp_path, capsys):
    other = planted(written, drawn, "other.parquet", strength=0.0)
    paths = (*record.paths, *other.paths)
    found = said(capsys, "routing", "compare", *paths, *FAST, "-o", tmp_path / "c.png")
    expected = compare(record, other, resampling=QUICK)
    assert found["tables"] == {"cells": plain(expected.cells_table()), "experts": plain(expected.to_table())}
    assert found["paired"] is True and found["written"] == [str(tmp_path / "c.png")]
    assert same_picture(tmp_path / "c.png", comparison_figure(expected, names=("record", "other")), tmp_path)
    unpaired = said(capsys, "routing", "compare", *paths, *FAST, "--unpaired", "--by", "group")
    assert unpaired["paired"] is False and [row["group"] for row in unpaired["tables"]["cells"]] == ["heart", "肝"]
    assert run("routing", "compare", *paths, *FAST) == 0
    captured = capsys.readouterr()
    assert "a is" in captured.err and "the same cases" in captured.err and "distance" in captured.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("stats", "R", "--layers", "7"), "has no layer 7; it has 0, 1, 2"),
        (("stats", "R", "--groups", "lung"), "has no group lung; it has heart, 肝"),
        (("stats", "R", "--level", "2"), "a level between 0 and 1"),
        (("plot", "R", "--figure", "load", "-o", "f.png", "--modalities", "video"), "passes the filter"),
        (("plot", "none.parquet", "--figure", "5", "-o", "f.png"), "no routing record at none.parquet"),
        (("compare", "R", "none.parquet"), "no routing record at none.parquet"),
        (("compare", "R", "R", "--groups", "lung"), "has no group lung"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_one_line(arguments, told, record, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("routing", *(record.paths[0] if each == "R" else each for each in arguments)) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("plot", "R", "--figure", "six", "-o", "f.png"), "heatmap"),
        (("plot", "R", "--figure", "alpha", "--groups", "heart", "-o", "f.png"), "--groups doesn't go with"),
        (("plot", "R", "--figure", "load", "--by", "share", "-o", "f.png"), "--by doesn't go with"),
        (("plot", "R", "--figure", "5", "--layers", "0", "1", "-o", "f.png"), "shows one layer"),
        (("plot", "R", "--figure", "experts", "-o", "f.png"), "needs --case"),
        (("plot", "R", "--figure", "all", "-o", "f.png"), "into one directory"),
        (("plot", "r.parquet", "--figure", "saturation", "-o", "f.png"), "one folder of snapshots"),
        (("stats", "R", "--tables", "lod"), "invalid choice"),
        (("stats", "R", "--resamples", "0"), "at least 1"),
        (("record", "M", "--data", "d", "-o", "r", "--batch-size", "none"), "expected a whole number"),
        (("stats", "R", "--seed", str(2**64)), "expected a whole number of 64 bits"),
        (("record", "M", "--data", "d", "-o", "r", "--max-new-tokens", "3", "--answers", "said"), "not allowed with"),
        (("stats",), "RECORD"),
        ((), "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_with_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as left:
        run("routing", *arguments)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["record", "stats", "plot", "compare"])
def test_help_gives_examples_and_plot_lists_its_figures(name, capsys):
    with pytest.raises(SystemExit):
        run("routing", name, "--help")
    out = capsys.readouterr().out
    assert f"examples:\n  moe-adapter routing {name}" in out
    if name == "plot":
        assert all(f"\n  {figure} " in out for figure in (*DRAWN, "saturation", "experts", "all"))


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            ModuleNotFoundError("no", name="pyarrow.parquet"),
            1,
            'this needs pyarrow: pip install "moe-adapter[analysis]".',
        ),
        (ModuleNotFoundError("no", name="peft"), 1, 'this needs peft: pip install "moe-adapter[peft]".'),
        (PermissionError(13, "Permission denied", "out.png"), 1, "[Errno 13] Permission denied: 'out.png'"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_the_machine_refuses_is_one_line_too(error, code, told, monkeypatch, capsys):
    def refuse(options):
        raise error

    monkeypatch.setattr("moe_adapter.analysis.commands.routing_stats.run", refuse)
    assert run("routing", "stats", "r.parquet") == code
    assert capsys.readouterr().err == (f"moe-adapter: error: {told}\n" if told else "")
