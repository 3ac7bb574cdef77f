"""Batches: labels on the response tokens only, padding, images, general text beside turns."""

from __future__ import annotations

import pytest
import torch
from echovlm.recipe_parts import SIDE, TEXTS, collator, example, tokenizer

from examples.echovlm.collator import IGNORED, Collator
from examples.echovlm.processor import build_processor
from moe_adapter import MoEAdapterError


def _labelled(batch: dict[str, torch.Tensor], row: int) -> str:
    labels = batch["labels"][row]
    return tokenizer().decode(labels[labels != IGNORED])


@pytest.mark.parametrize("answer", TEXTS)
def test_exactly_the_answer_and_its_end_are_labelled(answer: str) -> None:
    batch = collator()([example(answer=answer), example(prompt="A much longer question than the other.", answer="No.")])
    assert _labelled(batch, 0) == f"{answer}<|im_end|>"
    assert _labelled(batch, 1) == "No.<|im_end|>"
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def test_prompt_image_and_padding_tokens_are_not_labelled() -> None:
    batch = collator()([example(frames=1), example(prompt="x" * 30, answer="No.", frames=3)])
    silent = batch["labels"] == IGNORED
    assert silent[batch["mm_token_type_ids"] == 1].all()
    assert silent[batch["attention_mask"] == 0].all()
    answer_starts = (~silent).int().argmax(dim=1)
    for row, start in enumerate(answer_starts):
        prompt = tokenizer().decode(batch["input_ids"][row, :start])
        assert prompt.endswith("<|im_start|>assistant\n")


def test_training_sees_the_prompt_that_generation_sees() -> None:
    turns = [example(frames=1), example(prompt="And this?", frames=2)]
    prompts, batch = collator().prompts(turns), collator()(turns)
    width = prompts["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(batch[name][:, :width], prompts[name])
    assert torch.equal(batch["pixel_values"], prompts["pixel_values"])
    assert prompts["attention_mask"][:, -1].all(), "prompts are padded on the left"


def test_images_stay_with_their_case_and_in_order() -> None:
    batch = collator()([example(frames=3), example(frames=1)])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 4
    red = batch["pixel_values"].unflatten(0, (4, 16)).mean(dim=(1, 2))
    assert red[0] < red[1] < red[2]
    assert torch.allclose(red[3], red[0])


def test_general_text_stands_beside_turns_labelled_in_full() -> None:
    block = tokenizer()(TEXTS[0])["input_ids"]
    batch = collator()([block, example()])
    row = batch["labels"][0]
    assert row[row != IGNORED].tolist() == block
    assert batch["attention_mask"][0].sum() == len(block)
    assert batch["mm_token_type_ids"][0].sum() == 0
    assert _labelled(batch, 1) == f"{TEXTS[0]}<|im_end|>"


def test_general_text_alone_needs_no_images() -> None:
    batch = collator()([tokenizer()(text)["input_ids"] for text in TEXTS])
    assert "pixel_values" not in batch
    assert batch["input_ids"].shape == batch["labels"].shape


def test_a_template_that_opens_the_answer_otherwise_than_it_writes_it_is_refused() -> None:
    processor = build_processor(tokenizer(), SIDE)
    processor.chat_template = processor.chat_template.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(MoEAdapterError, match=r"generation prompt ends in .*<think>.*expected a prefix"):
        Collator(processor, 256)


def test_long_answers_are_cut_and_long_prompts_refused() -> None:
    batch = collator(64)([example(answer=TEXTS[0] * 9)])
    assert batch["input_ids"].shape[1] == 64
    with pytest.raises(MoEAdapterError, match=r"max_length: a prompt with its images takes \d+ tokens"):
        collator(20)([example()])
