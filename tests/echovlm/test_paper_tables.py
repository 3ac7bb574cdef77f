"""The paper's tables of a grid: real cases, real scores of answers made up, numbers held against plain arithmetic."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from echovlm.recipe_parts import PRESET

from examples.echovlm.cases import read_cases
from examples.echovlm.config import load_preset
from examples.echovlm.figures.runs import Run
from examples.echovlm.grid import _plain, read_arms
from examples.echovlm.metrics import TextMetrics
from examples.echovlm.paper_tables import Grid, _marked, main, paper_tables
from examples.echovlm.phantom import generate_cases
from examples.echovlm.scoring import HeldOut
from examples.echovlm.table_files import Score, Table, as_csv, latex, markdown

TASKS = ("report", "diagnosis")
MADE_UP = {  # how an arm answers: of each held-out question's answer, so many words
    "qwen2-vl": 0.1,
    "llava-onevision": 0.0,
    "qwen2-vl-plain": 0.5,
    "dual-path": 0.9,
    "no-shared-expert": 0.7,
    "long-tail": 0.6,
}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid's folder as the recipe writes it, but for the models."""
    out = tmp_path_factory.mktemp("grid")
    (out / "preset.yaml").write_text(PRESET + "sampling: {keep: {vessel: 0.5}}")
    config, arms, metrics = load_preset(str(out / "preset.yaml")), read_arms(), TextMetrics()
    cases_file = generate_cases(out / "qwen2-vl" / "cases", cases_per_organ=6, test_share=0.5, frames=1, size=56)
    cases = read_cases(cases_file)
    done = {}
    for name, share in MADE_UP.items():
        model = "base" if arms[name].changes["method"] == "zero-shot" else "stage II"
        started = {"cases_file": str(cases_file), "base_folder": None, "seed": 0, "evaluation": {}}
        (out / name).mkdir(exist_ok=True)
        (out / name / "account.json").write_text(json.dumps({"run": started}))
        scored = {}
        for task in TASKS:
            held_out = HeldOut(task, Run(out / name).held_out(task), cases)
            words = [example.answer.split() for example in held_out.examples]
            answers = [" ".join(said[: math.ceil(share * len(said))]) for said in words]
            sums = held_out.sums(answers, metrics)
            file = out / name / "evaluation" / model / f"{task}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"answers": answers, "sums": {k: v.tolist() for k, v in sums.items()}}))
            scored[task] = held_out.scores(answers, sums).values()
        blind = {"name": "most common answer", "general_loss": None, "tasks": scored}
        shuffled = {"name": f"{model}, images shuffled", "general_loss": None, "tasks": {}}
        results = {
            "metrics": metrics.described,
            "metrics_left_out": metrics.missing,
            "models": [blind, {"name": model, "general_loss": 5.0 + share, "tasks": scored}, shuffled],
        }
        stages = {} if model == "base" else {s: {"trainable": 10, "total": 20} for s in ("stage I", "stage II")}
        config_of_arm = _plain(config) if name == "long-tail" else _plain(load_preset("grid"))
        done[name] = dict(tables=arms[name].tables, parameters=stages, results=results, config=config_of_arm, seconds=9)
    (out / "grid.json").write_text(json.dumps({"arms": done}))
    return out


@pytest.fixture(scope="module")
def tables(grid: Path) -> dict[str, Table]:
    return {table.name: table for table in paper_tables(Grid(grid))}


def _rows(table: Table) -> dict[tuple, tuple]:
    return {row[: table.labels]: row[table.labels :] for row in table.rows}


def test_every_table_has_its_number_or_says_that_it_is_beyond_the_paper(tables: dict[str, Table]) -> None:
    assert list(tables) == ["table-1", "table-2", "table-3", "table-5", "table-7", "controls", "tail", "table-8"]
    for name, table in tables.items():
        number = re.fullmatch(r"table-(\d)", name)
        assert table.caption.startswith(f"Table {number[1]}: " if number else "Beyond the paper: ")
        assert all(len(row) == len(table.head) for row in table.rows)


def test_table_1_counts_the_cases(grid: Path, tables: dict[str, Table]) -> None:
    cases = read_cases(grid / "qwen2-vl" / "cases" / "cases.jsonl")
    rows = dict(_rows(tables["table-1"]))
    assert rows["all",] == (
        sum(case.split == "train" for case in cases),
        sum(case.split == "test" for case in cases),
        len(cases),
        sum(case.language == "en" for case in cases),
        sum(case.language == "zh" for case in cases),
        sum(len(case.questions) for case in cases),
    )
    assert rows["vessel",][0] + rows["vessel",][1] == 6 and any("208,941" in n for n in tables["table-1"].notes)


def test_a_model_table_is_organs_by_metrics_and_its_average_their_mean(grid: Path, tables: dict[str, Table]) -> None:
    table = tables["table-2"]
    assert table.head[2:] == (
        "most common answer (no image seen)",
        "LLaVA-OneVision, zero-shot",
        "Qwen2-VL, zero-shot",
        "Qwen2-VL, fine-tuned",
        "EchoVLM (dual path)",
    )
    rows = _rows(table)
    organs = {organ for organ, _ in rows} - {"average"}
    assert len(organs) == 7
    for metric in ("BLEU-1", "ROUGE-1", "ROUGE-L"):
        by_organ = np.array([[score.value for score in rows[organ, metric]] for organ in organs])
        average, by_organ = rows["average", metric][1:], by_organ[:, 1:]
        assert rows["average", metric][0].interval is not None
        assert [score.value for score in average] == pytest.approx(by_organ.mean(axis=0))
        assert [score.best for score in average] == [False, False, False, True]
        for score in average[:3]:
            assert score.difference[0] == pytest.approx(score.value - average[3].value)
            assert score.difference[1] <= score.difference[0] <= score.difference[2]
            assert score.difference[3] < 0.01  # every patient's answers are the better ones
            assert score.interval[0] <= score.value <= score.interval[1]
        assert average[3].difference is None
    assert all(a.value >= b.value for o in organs for a, b in zip(rows[o, "ROUGE-1"], rows[o, "ROUGE-L"], strict=True))


def test_ablations_stand_beside_the_reference_with_what_they_forget(tables: dict[str, Table]) -> None:
    table = tables["table-5"]
    assert table.head == ("task", "metric", "dual-path", "no-shared-expert")
    rows = _rows(table)
    assert {task for task, _ in rows} == {*TASKS, "all"}
    assert [s.value for s in rows["all", "general text, nats"]] == pytest.approx([5.9, 5.7])
    assert rows["all", "trainable parameters"] == (10, 10)
    assert tables["table-7"].head[2:] == ("dual-path", "qwen2-vl-plain")  # the paper's 0 experts
    assert "0 experts are the fine-tuned Qwen2-VL" in tables["table-7"].notes[-1]
    assert not any(score.best for score in _marked([Score(value=1.0), Score(value=1.0)]))  # all alike


def test_the_tail_says_what_each_arm_was_trained_on(tables: dict[str, Table]) -> None:
    assert tables["tail"].notes[0] == "dual-path trains on all; long-tail trains on 50% of vessel"
    assert ("vessel", "findings") in _rows(tables["tail"])
    whole, tail = _rows(tables["tail"])["average", "BLEU-1"]
    assert tail.difference is None and whole.difference[0] == pytest.approx(whole.value - tail.value)


def test_table_8_is_the_preset_beside_the_grid_s(tables: dict[str, Table]) -> None:
    rows = _rows(tables["table-8"])
    assert rows["expert dim",] == (1408, 128) and rows["learning rate, stage II",] == (2e-5, 5e-3)
    assert rows["engine",] == ("zero2", "–") and rows["longest sequence",] == (32768, 512)
    assert rows["trainable parameters, stage I",][0] == "3.39 B of 11.68 B"


def test_the_command_writes_three_files_that_say_the_same(grid: Path, tmp_path: Path, capsys) -> None:
    assert main([str(grid), "-o", str(tmp_path / "tables")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["tables.md", "tables.tex", "tables.csv"]
    rows = {(r["table"], r["row"], r["column"]): r for r in csv.DictReader(paths[2].open())}
    found = rows["table-2", "average/BLEU-1", "Qwen2-VL, fine-tuned"]
    value, difference, p = (float(found[name]) for name in ("value", "difference", "p"))
    cell = f"{value:.2f} ({difference:+.2f}, p={p:.3f})"
    text, tex = (path.read_text() for path in paths[:2])
    assert cell in text and cell in tex
    best = float(rows["table-2", "average/BLEU-1", "EchoVLM (dual path)"]["value"])
    assert f"**{best:.2f}**" in text and rf"\textbf{{{best:.2f}}}" in tex
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == text.count("\n## ")
    assert text.count("sacrebleu") == tex.count("sacrebleu") == 1  # of all tables, not of each


def test_a_folder_that_is_no_grid_is_named(grid: Path, tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "o")]) == 2
    assert "got no grid" in capsys.readouterr().err
    shutil.copy(grid / "grid.json", tmp_path)
    values = json.loads((tmp_path / "grid.json").read_text())
    del values["arms"]["dual-path"]
    (tmp_path / "grid.json").write_text(json.dumps(values))
    assert main([str(tmp_path), "-o", str(tmp_path / "o")]) == 2
    assert "expected dual-path among them" in capsys.readouterr().err


def test_latex_and_markdown_take_any_text() -> None:
    table = Table(name="t", caption="50 % of x_y & α", head=("a_b", "λ"), rows=(("p|q", Score(value=math.nan)),))
    assert r"50 \% of x\_y \& $\alpha$" in latex(table) and r"a\_b" in latex(table) and r"$\lambda$" in latex(table)
    assert markdown(table).splitlines()[-1].count("–") == 1
    assert as_csv([table]).splitlines()[1] == "t,p|q,λ,,,,,,,"
