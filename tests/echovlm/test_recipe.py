"""The whole recipe at a minuscule size: every step runs, and what it writes can be read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from echovlm.recipe_parts import PRESET, write_encoder

from examples.echovlm import recipe
from examples.echovlm.__main__ import main
from examples.echovlm.cases import read_cases
from moe_adapter.analysis.record import RoutingRecord


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "preset.yaml").write_text(PRESET)
    encoder = {"encoder": str(write_encoder(folder / "encoder")), "num_layers": 2}
    evaluation = {"tasks": ["report", "diagnosis", "vqa"], "questions_per_case": 1, "bertscore": encoder}
    (folder / "all.yaml").write_text(f"extends: {folder / 'preset.yaml'}\nevaluation: {json.dumps(evaluation)}\n")
    assert main(["--preset", str(folder / "all.yaml"), "--out", str(folder / "run")]) == 0
    return folder


def test_it_writes_tables_figure_record_and_adapters(first_run: Path) -> None:
    run = first_run / "run"
    report, results = (run / "report.md").read_text(), json.loads((run / "results.json").read_text())
    models = {scored["name"]: scored for scored in results["models"]}
    assert list(models) == ["most common answer", "base", "stage I", "stage II", "stage II, images shuffled"]
    for text in ("| **average** |", "Findings stated right", "Figure 5", "examples_ybr_color", "Stage II"):
        assert text in report
    assert (run / "figure5.png").read_bytes().startswith(b"\x89PNG") and (run / "figure5.pdf").stat().st_size
    record = RoutingRecord.open(run / "routing.parquet")
    assert len(record.facts.layers) == 2 and set(record.facts.groups) == set(
        models["base"]["tasks"]["report"]["by_organ"]
    )
    assert (run / "stage1" / "moe_adapter.json").is_file() and list((run / "stage2").glob("lora-*"))


def test_all_tasks_are_scored_and_each_score_says_how(first_run: Path) -> None:
    results = json.loads((first_run / "run" / "results.json").read_text())
    report = (first_run / "run" / "report.md").read_text()
    names = {*results["metrics"], *results["finding_scores"]}
    assert {"BLEU-1", "ROUGE-1", "ROUGE-L", "BERTScore (stand-in)"} <= names
    assert {*results["metrics"], *results["metrics_left_out"]} >= {"METEOR"}
    assert "NOT COMPARABLE" in results["metrics"]["BERTScore (stand-in)"]
    organs = set(results["models"][0]["tasks"]["report"]["by_organ"])
    for model in results["models"]:
        assert list(model["tasks"]) == ["report", "diagnosis", "vqa"]
        for task, scores in model["tasks"].items():
            assert set(scores["by_organ"]) == organs and set(scores["overall"]) == names
            assert len(scores["answers"]) == len(results["models"][0]["tasks"]["report"]["answers"]), task
    assert set(results["differences"]["vqa"]) == {model["name"] for model in results["models"]} - {"stage II"}
    for text in [*names, "## Report generation", "## Diagnosis", "## Question answering", "stage II minus"]:
        assert text in report


def test_the_static_path_remembers_the_general_text(first_run: Path) -> None:
    results = json.loads((first_run / "run" / "results.json").read_text())
    losses = {scored["name"]: scored["general_loss"] for scored in results["models"]}
    assert math.isclose(results["general_loss_static_only"], losses["base"], rel_tol=1e-6)
    assert losses["stage II"] != losses["base"]


def _run_on_the_first_base(first_run: Path, preset: Path, cases: Path, out: Path) -> int:
    options = {"preset": preset, "cases": cases, "base": first_run / "run" / "base", "out": out}
    return main([text for name, value in options.items() for text in (f"--{name}", str(value))])


def test_one_base_is_in_memory(first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load_base = recipe.load_base
    monkeypatch.setattr(recipe, "load_base", lambda *args: loaded.append(args) or load_base(*args))
    cases = first_run / "run" / "cases" / "cases.jsonl"
    assert _run_on_the_first_base(first_run, first_run / "preset.yaml", cases, tmp_path / "out") == 0
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("moe", "weights", "said"),
    [
        ({"shared_expert_dim": 0}, {"alpha"}, "## α by layer"),
        ({"mixing": "token"}, set(), "Each token has its own weights"),
        ({"num_experts": 0}, {"alpha", "lambda"}, "No token is routed"),
    ],
)
def test_an_ablation_runs_to_the_end(first_run: Path, tmp_path: Path, moe: dict, weights: set[str], said: str) -> None:
    preset = tmp_path / "ablation.yaml"
    preset.write_text(f"extends: {first_run / 'preset.yaml'}\nmoe: {json.dumps(moe)}\n")
    cases = first_run / "run" / "cases" / "cases.jsonl"
    assert _run_on_the_first_base(first_run, preset, cases, tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [set(row) for row in results["weights"]] == [weights] * 2
    report = (tmp_path / "out" / "report.md").read_text()
    assert said in report
    routed = moe.get("num_experts") != 0
    assert ("figure5.png" in report) == (tmp_path / "out" / "figure5.png").is_file() == routed


def test_a_users_own_cases_and_checkpoint_go_the_same_way(first_run: Path) -> None:
    rows = [json.loads(line) for line in (first_run / "run" / "cases" / "cases.jsonl").read_text().splitlines()]
    for row in rows:  # what a hospital may not have
        row.pop("attributes"), row.pop("questions"), row.pop("source")
    own = first_run / "run" / "cases" / "own.jsonl"
    own.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_cases(own)
    assert _run_on_the_first_base(first_run, first_run / "preset.yaml", own, first_run / "second") == 0
    assert not (first_run / "second" / "base").exists()
    results = json.loads((first_run / "second" / "results.json").read_text())
    [scores] = results["models"][0]["tasks"].values()  # findings are read off the references
    assert scores["overall"]["attributes"]["value"] is not None
