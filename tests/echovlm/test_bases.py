"""Bases of both families: made, saved, loaded, asked and trained; LLaVA-OneVision as Qwen2-VL."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from echovlm.recipe_parts import SIDE, TEXTS, example, small_config, tokenizer
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.base import load_base
from examples.echovlm.collator import IGNORED, Collator
from examples.echovlm.config import Family, RecipeConfig
from examples.echovlm.families import FAMILIES, build_model
from examples.echovlm.processor import build_processor
from examples.echovlm.stages import stage1, stage2
from examples.echovlm.vision import pretrain_vision
from moe_adapter import dual_path_layers

# As in the released checkpoints: the answer's header is written with a blank that the generation prompt leaves out.
RELEASED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<|image_pad|>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [example(frames=2), example("Another, longer question?", TEXTS[1], frames=1)]


def _config(family: Family = "llava_onevision", **changes) -> RecipeConfig:
    config = small_config(image_side=SIDE, **changes)
    return dataclasses.replace(config, base=dataclasses.replace(config.base, family=family))


def _collator(template: str | None = None) -> Collator:
    processor = build_processor(tokenizer(), SIDE, "llava_onevision")
    processor.chat_template = template or processor.chat_template
    return Collator(processor, 256)


def _model(config: RecipeConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, tokenizer()).eval()


@pytest.mark.parametrize("template", [None, RELEASED])
def test_exactly_the_answer_and_its_end_are_labelled(template: str | None) -> None:
    batch = _collator(template)(TURNS)
    for row, turn in enumerate(TURNS):
        labels = batch["labels"][row]
        assert tokenizer().decode(labels[labels != IGNORED]) == f"{turn.answer}<|im_end|>"
        start = int((labels != IGNORED).int().argmax())
        assert tokenizer().decode(batch["input_ids"][row, :start]).endswith("<|im_start|>assistant\n")
    images = batch["input_ids"] == tokenizer().convert_tokens_to_ids("<|image_pad|>")
    assert images.sum(1).tolist() == [2 * (4 + 1), 4 + 2 * (2 + 1)]  # tiles with their ends; a lone one twice
    assert (batch["labels"][images] == IGNORED).all()


def test_padding_and_other_rows_images_dont_reach_a_row() -> None:
    model, collate = _model(_config()), _collator()
    together = model(**collate(TURNS)).logits
    for row, turn in enumerate(TURNS):
        alone = collate([turn])
        labelled = alone["labels"][0] != IGNORED
        mask = collate(TURNS)["labels"][row] != IGNORED
        torch.testing.assert_close(together[row][mask], model(**alone).logits[0][labelled], rtol=1e-4, atol=1e-5)


def test_greedy_answers_are_those_of_the_whole_forward_and_see_the_images() -> None:
    config, collate = _config(), _collator()
    model = _model(config)
    evaluation = dataclasses.replace(config.evaluation, max_new_tokens=4, batch_size=2)
    [said, _] = answer(model, TURNS, collate, evaluation, label="")
    batch = collate.prompts(TURNS[:1])
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    ids = batch["input_ids"]
    for _ in range(4):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **rest).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    new = ids[0, batch["input_ids"].shape[1] :]
    assert said == tokenizer().decode(new, skip_special_tokens=True).strip()
    blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
    assert not torch.equal(model(**batch).logits, model(**blank).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_learns_and_the_language_model_waits(family: Family) -> None:
    config = _config(family)
    run = dataclasses.replace(config.base.tower_pretraining, batch_size=2)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, tower_pictures=4, tower_pretraining=run))
    model = _model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    accuracy = pretrain_vision(model, build_processor(tokenizer(), SIDE, family), config)
    assert {"tone", "width"} <= set(accuracy)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("language_model" in name for name in moved)
    bridge = "multi_modal_projector" if family == "llava_onevision" else "merger"
    assert any(bridge in name for name in moved)


def test_a_saved_checkpoint_is_loaded_like_any_other_and_trains_in_both_stages(tmp_path: Path) -> None:
    config = _config(run={"learning_rate": 1e-2})
    _model(config).save_pretrained(tmp_path / "base")
    _collator(RELEASED).processor.save_pretrained(tmp_path / "base")
    model, collate = load_base(tmp_path / "base", config)
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert type(collate.processor) is LlavaOnevisionProcessor
    before, now = _collator(RELEASED)(TURNS), collate(TURNS)
    assert all(torch.equal(before[name], now[name]) for name in before)
    account = Account()
    for stage in (stage1, stage2):
        with account.step(stage.__name__):
            model = stage(model, TURNS, collate, config, tmp_path / stage.__name__, account, fresh=lambda: None)
    assert len(dual_path_layers(model)) == 1  # the language model's, none of the tower's
    assert "2 of the projection, 6 of the vision encoder, 4 of the language model" in account.lines["stage2"][0]
