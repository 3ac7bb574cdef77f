"""What trains in the two stages, in which dtype, and where the LoRA is put."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from echovlm.recipe_parts import TEXT, collator, example, small_config, tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from examples.echovlm import training
from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.base import load_base
from examples.echovlm.config import load_preset
from examples.echovlm.families import build_model
from examples.echovlm.stages import add_lora, lora_places, stage1, stage2
from moe_adapter import DualPathMoE, MoEAdapterError, dual_path_layers, inject_dual_path_moe, set_stage
from moe_adapter.integrations.chunked_loss import ChunkedLoss

STEPS = 12


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A base whose weights are stored in bf16."""
    model = build_model(small_config(), tokenizer()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    collator().processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _dtypes(model: nn.Module, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


def test_what_trains_on_a_bf16_base_is_float32_and_moves(checkpoint: Path, tmp_path: Path) -> None:
    """Against bf16 weights as their own masters, of which steps of 2e-5 leave two thirds where they were."""
    config, account = small_config("bf16"), Account()
    model, _ = load_base(checkpoint, config)
    for stage in (stage1, stage2):
        with account.step(stage.__name__):
            data, folder = [example()] * STEPS, tmp_path / stage.__name__
            model = stage(model, data, collator(), config, folder, account, fresh=lambda: None)
        assert _dtypes(model, trained=True) == {torch.float32}
        assert _dtypes(model, trained=False) == {torch.bfloat16}
        if stage is stage1:
            before = [layer.experts.gate_up_proj.detach().clone() for layer in dual_path_layers(model).values()]
    after = [layer.experts.gate_up_proj for layer in dual_path_layers(model).values()]
    moved = torch.cat([(a != b).float().mean(dim=(1, 2)) for a, b in zip(after, before, strict=True)])
    assert moved.max() > 0.95, moved
    assert "2 of the projection, 4 of the vision encoder, 4 of the language model" in account.lines["stage2"][0]
    [said] = answer(model, [example()], collator(), config.evaluation, label="")
    assert isinstance(said, str)


def test_both_stages_compute_in_bf16_and_evaluation_in_the_bases_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage trains the model that the first has trained, which accelerate takes for prepared."""
    seen: list[bool] = []
    factors = DualPathMoE._factors
    monkeypatch.setattr(
        DualPathMoE, "_factors", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or factors(*args)
    )
    config, account = small_config("bf16"), Account()
    model = build_model(config, tokenizer())
    for stage in (stage1, stage2):
        with account.step(stage.__name__):
            folder = tmp_path / stage.__name__
            model = stage(model, [example()], collator(), config, folder, account, fresh=lambda: None)
        assert seen == [True]
        seen.clear()
        answer(model, [example()], collator(), config.evaluation, label="")
        assert not any(seen)
        seen.clear()


@pytest.mark.parametrize(
    ("stored", "precision", "dtype"),
    [
        (torch.bfloat16, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.float32),
        (torch.float16, "bf16", torch.bfloat16),
    ],
)
def test_the_base_keeps_its_dtype_where_that_mixes_with_bf16(
    checkpoint: Path, stored: torch.dtype, precision: str, dtype: torch.dtype
) -> None:
    config = small_config(precision)
    build_model(config, tokenizer()).to(stored).save_pretrained(checkpoint)
    model, _ = load_base(checkpoint, config)
    assert _dtypes(model, trained=True) == {dtype}


def test_a_processor_without_a_chat_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(MoEAdapterError, match="its processor has no chat template, expected one"):
        load_base(checkpoint, small_config())


def _llava() -> PreTrainedModel:
    text = {**TEXT, "model_type": "llama", "vocab_size": 64, "rope_parameters": None}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=3))


def _qwen3_vl() -> PreTrainedModel:
    text = {**TEXT, "vocab_size": 64, "head_dim": 8}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return Qwen3VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: build_model(small_config(), tokenizer()), (4, 2, 4)),
        (_qwen3_vl, (2, 0, 4)),  # the paper's pattern is of Qwen2-VL's names
        (_llava, (6, 2, 4)),  # LLaVA-OneVision's names
    ],
)
def test_the_lora_is_told_where_it_sits(make, expected: tuple[int, int, int]) -> None:
    places = lora_places(add_lora(make(), small_config()))
    assert (places["vision encoder"], places["projection"], places["language model"]) == expected


def test_all_parts_are_told_apart_by_name() -> None:
    everything = dataclasses.replace(load_preset("paper").lora, target=r".*(fc1|linear_1|linear_fc1|q_proj)")
    config = small_config("bf16", lora=everything)
    for make in (_llava, _qwen3_vl):
        assert min(lora_places(add_lora(make(), config)).values()) > 0


def test_a_target_that_names_nothing_is_an_error() -> None:
    config = small_config("bf16", lora=dataclasses.replace(load_preset("paper").lora, target="nowhere"))
    with pytest.raises(MoEAdapterError, match=r"lora\.target of the preset fits no module"):
        add_lora(_llava(), config)


@pytest.mark.parametrize("rate", [None, 1e-5])
def test_moe_blocks_and_lora_are_groups_of_their_own(tmp_path: Path, rate: float | None) -> None:
    """With one learning rate, or one for the LoRA; nothing decays, and both follow the schedule."""
    config = small_config(lora=dataclasses.replace(load_preset("paper").lora, learning_rate=rate))
    model = build_model(config, tokenizer())
    inject_dual_path_moe(model, **config.moe)
    tuned = add_lora(model, config)
    set_stage(tuned, 2)
    trainer = training._trainer(tuned, [example()], collator(), config.stage2, config, tmp_path)
    moe, lora = trainer.create_optimizer().param_groups
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert {id(p) for p in lora["params"]} == {id(p) for name, p in trained.items() if "lora_" in name}
    assert {id(p) for p in moe["params"]} == {id(p) for name, p in trained.items() if "lora_" not in name}
    assert (moe["lr"], lora["lr"]) == (2e-5, rate or 2e-5)
    assert moe["weight_decay"] == lora["weight_decay"] == 0
    trainer.create_scheduler(100).step()
    assert lora["lr"] / moe["lr"] == pytest.approx((rate or 2e-5) / 2e-5)


def test_the_chunked_loss_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[tuple[int, ...]] = []
    head = ChunkedLoss._head
    monkeypatch.setattr(ChunkedLoss, "_head", lambda *args: chunks.append(args[1].shape) or head(*args))
    trained = []
    for chunked in (False, True):
        config, account = small_config(run={"learning_rate": 1e-3}, chunked_loss=chunked), Account()
        torch.manual_seed(0)
        model = build_model(config, tokenizer())
        with account.step("stage1"):
            stage1(model, [example()] * 4, collator(), config, tmp_path / str(chunked), account, fresh=lambda: None)
        assert bool(chunks) == chunked
        trained.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-6, msg=name)
    answer(model, [example()], collator(), config.evaluation, label="")
    assert len(chunks) == 4, "in evaluation the model has its own loss back"


def test_the_stages_report_loads_and_balance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    config, account = small_config(report_to=("tensorboard",)), Account()
    model = build_model(config, tokenizer())
    with account.step("stage1"):
        stage1(model, [example()] * 2, collator(), config, tmp_path / "stage1", account, fresh=lambda: None)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    seen = set(board.Tags()["scalars"])
    assert {f"train/{name}" for name in ("loss", "balance_loss", "expert_load/0/3", "alpha/0", "lambda/0")} <= seen
