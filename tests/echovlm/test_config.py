"""Presets: what they hold, how they extend one another, and what a faulty one says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from examples.echovlm.config import PresetError, load_preset
from moe_adapter import DualPathConfig


def _preset(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_paper_preset_is_table_8() -> None:
    paper = load_preset("paper")
    assert DualPathConfig(**paper.moe) == DualPathConfig()
    assert (paper.lora.r, paper.lora.alpha, paper.lora.dropout) == (8, 16, 0.05)
    assert (paper.stage1.learning_rate, paper.stage2.learning_rate) == (1e-3, 2e-5)
    for stage in (paper.stage1, paper.stage2):
        assert (stage.epochs, stage.batch_size, stage.weight_decay) == (1, 1, 0)
        assert (stage.scheduler, stage.warmup_ratio) == ("cosine", 0.03)
    assert (paper.image_side, paper.max_length, paper.precision) == (392, 32768, "bf16")
    assert paper.gradient_checkpointing
    assert (paper.engine.deepspeed, paper.engine.offload) == ("zero2", False)
    assert paper.base is None
    assert paper.phantoms is None


def test_tiny_keeps_what_size_does_not_force() -> None:
    paper, tiny = load_preset("paper"), load_preset("tiny")
    for name in ("num_experts", "top_k", "balance_coef"):
        assert tiny.moe[name] == paper.moe[name]
    assert (tiny.lora.r, tiny.lora.alpha, tiny.lora.target) == (paper.lora.r, paper.lora.alpha, paper.lora.target)
    for mine, theirs in ((tiny.stage1, paper.stage1), (tiny.stage2, paper.stage2)):
        assert (mine.scheduler, mine.warmup_ratio, mine.weight_decay) == (
            theirs.scheduler,
            theirs.warmup_ratio,
            theirs.weight_decay,
        )


def test_small_has_the_papers_shares_and_grid_the_model_of_tiny() -> None:
    paper, small, tiny, grid = (load_preset(name) for name in ("paper", "small", "tiny", "grid"))
    for name, width in (("expert_dim", 1408), ("shared_expert_dim", 5632)):
        assert small.moe[name] == pytest.approx(width / 18944, rel=0.01)
    assert small.stage1.learning_rate == paper.stage1.learning_rate and small.base is None
    assert (grid.moe, grid.base.text) == (tiny.moe, tiny.base.text)
    assert dataclasses.replace(grid.lora, learning_rate=tiny.lora.learning_rate) == tiny.lora
    assert grid.stage1.learning_rate == tiny.stage1.learning_rate


def test_changes_come_on_top_in_order() -> None:
    config = load_preset("tiny", {"moe": {"top_k": 1}, "seed": 3}, {"moe": {"router_softmax": "all"}, "seed": 4})
    assert config.seed == 4 and config.moe == {**load_preset("tiny").moe, "top_k": 1, "router_softmax": "all"}


def test_a_file_of_the_users_extends_a_preset_section_by_section(tmp_path: Path) -> None:
    mine = load_preset(_preset(tmp_path, "extends: paper\nstage1: {epochs: 3}\n"))
    assert mine.stage1.epochs == 3
    assert mine.stage1.learning_rate == 1e-3
    assert mine.stage2 == load_preset("paper").stage2


def test_a_base_of_the_users_takes_any_image_side(tmp_path: Path) -> None:
    assert load_preset(_preset(tmp_path, "extends: tiny\nbase: null\nimage_side: 100")).image_side == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "extends: paper\nstage1: {learning_rat: 1}",
            r"stage1\.learning_rat: unknown field, did you mean 'learning_rate'",
        ),
        ("extends: paper\nstage1: {batch_size: 0}", r"stage1\.batch_size: .*greater than 0, got 0"),
        ("extends: paper\nprecision: fp8", r"precision: .*'auto', 'fp32' or 'bf16', got 'fp8'"),
        ("extends: paper\nimage_side: many", r"image_side: .*got 'many'"),
        ("extends: paper\nmoe: {top_k: 9}", r"moe: DualPathConfig.top_k: got 9, expected 1 to num_experts = 4"),
        ("extends: paper\nmoe: {expert_dims: 3}", r"moe: DualPathConfig has no field expert_dims; its fields are"),
        ("extends: paper\nlora: {target: '(['}", r"lora\.target: got '\(\[', expected a regular expression"),
        ("extends: paper\nstage2: {scheduler: foo}", r"stage2\.scheduler: .*'cosine'.*, got 'foo'"),
        ("extends: tiny\nimage_side: 100", r"image_side: got 100, expected a multiple of 28 up to 448"),
        ("extends: tiny\nimage_side: 476", r"image_side: got 476, expected a multiple of 28 up to 448"),
        (
            "extends: paper\nengine: {deepspeed: zero9}",
            r"engine: deepspeed: got 'zero9', expected zero2, zero3 or a Deep",
        ),
        (f"extends: paper\nengine: {{deepspeed: {__file__}}}", r"engine: deepspeed: .*test_config.py is no JSON: "),
        ("extends: paper\nengine: {fsdp: true}", r"engine: got deepspeed: zero2 and fsdp: true, expected one engine"),
        (
            "extends: tiny\nmethod: plain\nengine: {fsdp: true}",
            r"method: got plain with engine fsdp, whose spread",
        ),
        ("extends: tiny\nmethod: full\nengine: {deepspeed: zero3}", r"method: got full with engine zero3"),
        ("extends: tiny\nengine: {offload: true}", r"engine: offload: got true, expected it with zero2, zero3 or fsdp"),
        (
            "extends: tiny\nreport_to: [mlflow]",
            r"report_to\.0: got 'mlflow', which is not installed; pip install mlflow",
        ),
        ("extends: tiny\nreport_to: [paper]", r"report_to\.0: .*'tensorboard', 'wandb'.*, got 'paper'"),
        ("extends: tiny\nevaluation: {tasks: []}", r"evaluation\.tasks: .*at least 1 item"),
        ("extends: tiny\nevaluation: {tasks: [reports]}", r"tasks\.0: .*'report', 'diagnosis' or 'vqa', got 'reports'"),
        (
            "extends: tiny\nevaluation: {bertscore: {encoder: bert-base-chinese}}",
            r"evaluation\.bertscore\.encoder: got 'bert-base-chinese', expected a folder with an encoder",
        ),
        ("extends: paper\non_nan: ignore", r"on_nan: .*'stop' or 'skip', got 'ignore'"),
        (
            "extends: paper\nstage1: {batching: packt}",
            r"stage1\.batching: .*'plain', 'grouped' or 'packed', got 'packt'",
        ),
        ("extends: tiny\nbase: {pretraining: {save_steps: 5}}", r"base\.pretraining\.save_steps: unknown field"),
        ("extends: tiny\nmethod: lora", r"method: .*'dual-path', 'dense', 'plain', 'full' or 'zero-shot', got 'lora'"),
        ("extends: tiny\nfrozen: [experts]", r"frozen\.0: .*'router', 'alpha' or 'lambda', got 'experts'"),
        ("extends: tiny\nbase: {family: llava}", r"base\.family: .*'qwen2_vl' or 'llava_onevision', got 'llava'"),
        ("extends: papre", r"unknown preset 'papre': use one of grid, paper, small, tiny"),
        ("image_side: 112", r"max_length: Field required"),
        ("[1, 2]", r"got list, expected a mapping"),
        ("a: [", r"no valid YAML"),
    ],
)
def test_a_faulty_preset_says_field_and_cure(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PresetError, match=message):
        load_preset(_preset(tmp_path, text))
