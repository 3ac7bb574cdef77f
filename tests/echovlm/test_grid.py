"""The grid of arms: what each changes, that cases and bases are made once, and that it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
from echovlm.recipe_parts import PRESET

from examples.echovlm import ranks, recipe, side_by_side, stand_in
from examples.echovlm.config import load_preset
from examples.echovlm.evaluation import Evaluator
from examples.echovlm.grid import configure, main, read_arms
from moe_adapter import MoEAdapterError

ARMS = """
qwen2-vl: {tables: [models], changes: {method: zero-shot}}
plain: {tables: [models, experts], from: qwen2-vl, changes: {method: plain}}
other: {tables: [], from: qwen2-vl, changes: {method: full}}
"""


def test_every_arm_is_a_preset_and_differs_from_all_others() -> None:
    arms = read_arms()
    configs = configure("grid", arms, {})
    assert len({json.dumps(dataclasses.asdict(config), sort_keys=True) for config in configs.values()}) == len(arms)
    models = [name for name, arm in arms.items() if "models" in arm.tables]
    assert {(configs[name].base.family, configs[name].method) for name in models} == {
        ("llava_onevision", "zero-shot"),
        ("qwen2_vl", "zero-shot"),
        ("llava_onevision", "plain"),
        ("qwen2_vl", "plain"),
        ("qwen2_vl", "dual-path"),
    }
    paper = configs["dual-path"]
    assert paper == dataclasses.replace(load_preset("grid"), method="dual-path")
    for table in ("shared expert", "top-k", "experts", "controls", "alpha", "lambda", "start", "softmax"):
        others = [name for name, arm in arms.items() if table in arm.tables and name != "dual-path"]
        assert others, table
    assert configs["top-1"].moe["router_softmax"] == "all"  # else its router learns nothing from the task
    micro, everywhere = configs["balance-micro"], configs["balance-global"]
    assert dataclasses.replace(micro, moe={**micro.moe, "balance_scope": "global"}) == everywhere
    assert micro.stage1.accumulation > 1 and micro.stage2.accumulation > 1


def test_a_preset_without_a_base_asks_for_one_of_each_family() -> None:
    arms = read_arms()
    with pytest.raises(MoEAdapterError, match="'small' makes no base: give --base ARM=DIR for llava-onevision, or"):
        configure("small", arms, {"qwen2-vl": Path("2b")})
    configs = configure("small", arms, {"qwen2-vl": Path("2b"), "llava-onevision": Path("ov")})
    assert {config.base for config in configs.values()} == {None}
    assert configs["dense"].method == "dense" and configs["dense"].moe["shared_expert_dim"] == 0.3


def test_an_arm_comes_with_what_it_starts_from_and_after_it() -> None:
    assert list(read_arms(names=["llava-onevision-plain"])) == ["qwen2-vl", "llava-onevision", "llava-onevision-plain"]
    assert list(read_arms())[:2] == ["qwen2-vl", "llava-onevision"]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (ARMS, ["plian"], "no arm is called 'plian', expected one of plain"),
        (ARMS + "lost: {tables: [], from: nowhere, changes: {}}", None, "no arm is called 'nowhere'"),
        ("a: {tables: [], change: {}}", None, "expected a mapping of arms as in arms.yaml, got"),
        ("[1]", None, "expected a mapping of arms"),
    ],
)
def test_a_faulty_table_says_what_is_wrong(tmp_path: Path, text: str, names: list[str] | None, message: str) -> None:
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(MoEAdapterError, match=message):
        read_arms(tmp_path / "arms.yaml", names)


def test_a_killed_grid_goes_on_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "preset.yaml").write_text(PRESET)
    (tmp_path / "arms.yaml").write_text(ARMS)
    out = tmp_path / "grid"
    call = ["--preset", str(tmp_path / "preset.yaml"), "--table", str(tmp_path / "arms.yaml"), "--out", str(out)]
    call += ["--arms", "plain", "--stand-in"]
    monkeypatch.setattr(stand_in, "stand_in", partial(stand_in.stand_in, steps=2))
    evaluated, loaded = [], []
    once, load_base, write = Evaluator._once, recipe.load_base, recipe.write_results
    found = lambda self, name, part, find: once(self, name, part, lambda: evaluated.append(name) or find())  # noqa: E731
    monkeypatch.setattr(Evaluator, "_once", found)
    monkeypatch.setattr(recipe, "load_base", lambda path, config: loaded.append(path) or load_base(path, config))

    def die(folder: Path, *args: object) -> Path:
        if folder.name == "plain":
            raise KeyboardInterrupt
        return write(folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "write_results", die)
        with pytest.raises(KeyboardInterrupt):
            main(call)
    assert list(json.loads((out / "grid.json").read_text())["arms"]) == ["qwen2-vl"]
    assert {path.parent.name for path in loaded} == {"qwen2-vl"} and not (out / "plain" / "cases").exists()
    assert evaluated.count("base") == 2 and "stage II" in evaluated  # its reports and its general text, once

    evaluated.clear(), capsys.readouterr()
    assert main(call) == 0
    assert not evaluated and "qwen2-vl: done before" in capsys.readouterr().out
    arms = json.loads((out / "grid.json").read_text())["arms"]
    assert list(arms) == ["qwen2-vl", "plain"]
    plain = arms["plain"]
    assert plain["tables"] == ["models", "experts"] and plain["changes"] == {"method": "plain"}
    assert 0 < plain["parameters"]["stage II"]["trainable"] < plain["parameters"]["stage II"]["total"]
    assert [scored["name"] for scored in plain["results"]["models"]][1:3] == ["base", "stage II"]
    assert "NOT COMPARABLE" in plain["results"]["metrics"]["BERTScore (stand-in)"]
    assert plain["seconds"] > 0 and arms["qwen2-vl"]["parameters"] == {}
    assert plain["results"]["weights"] == [] and plain["results"]["general_loss_static_only"] is None

    with monkeypatch.context() as patch:
        patch.setattr(ranks, "count", lambda: 2)
        assert main([*call, "--jobs", "2"]) == 2
    assert "--jobs: got 2 under a launcher" in capsys.readouterr().err

    (tmp_path / "preset.yaml").write_text(PRESET + "seed: 7\n")
    assert main(call) == 2
    assert "was started otherwise: seed: got 7, before 0" in capsys.readouterr().err


def test_a_folder_that_is_no_grid_is_spared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "precious").write_text("keep")
    assert main(["--preset", "grid", "--out", str(tmp_path)]) == 2
    assert "it holds something that is no grid" in capsys.readouterr().err
    assert main(["--preset", "grid", "--out", str(tmp_path / "new"), "--base", "dense=nowhere"]) == 2
    assert "expected ARM=DIR, an arm of qwen2-vl, llava-onevision" in capsys.readouterr().err


@pytest.mark.slow
def test_arms_at_once_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(PRESET)
    (tmp_path / "arms.yaml").write_text(ARMS)
    call = ["--preset", str(tmp_path / "preset.yaml"), "--table", str(tmp_path / "arms.yaml")]
    for jobs in ("1", "2"):
        assert main([*call, "--out", str(tmp_path / jobs), "--jobs", jobs]) == 0
    single, both = (json.loads((tmp_path / jobs / "grid.json").read_text())["arms"] for jobs in ("1", "2"))
    assert list(single) == list(both) == ["qwen2-vl", "plain", "other"]
    assert all(both[name]["config"] == arm["config"] for name, arm in single.items())
    assert all(both[name]["parameters"] == arm["parameters"] for name, arm in single.items())
    assert "stage II" in (tmp_path / "2" / "plain.log").read_text()
    assert not (tmp_path / "1" / "plain.log").exists()


class Gone(Executor):
    """Workers of whom one has died."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future


def test_arms_wait_for_what_they_start_from_and_a_dead_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(side_by_side, "run_arm", lambda name: None)
    start = lambda name: started.append(name) or {"name": name}  # noqa: E731
    needs = {"late": {"first", "base"}, "base": {"first"}, "first": set(), "done": set()}
    assert list(side_by_side.run_all(needs, start, ["done"], 1)) == started == ["first", "base", "late"]
    monkeypatch.setattr(side_by_side, "_processes", lambda jobs: Gone())
    with pytest.raises(MoEAdapterError, match=r"first: its process, or one beside it, has died.*fewer --jobs"):
        list(side_by_side.run_all(needs, start, [], 2))
