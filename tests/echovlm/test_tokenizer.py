"""The tokenizer and the processor around it."""

from __future__ import annotations

import pytest
from echovlm.recipe_parts import SIDE, TEXTS, tokenizer
from PIL import Image
from transformers import AutoProcessor, Qwen2VLProcessor

from examples.echovlm.processor import build_processor
from examples.echovlm.tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.mark.parametrize("text", [*TEXTS, "μ-opioid ≤ 3×10⁻² mm²\n\n\tend ", "未见于训练语料：胆囊壁毛糙", "naïve 🫀"])
def test_any_text_round_trips(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


def test_special_tokens_are_single_tokens_of_qwens_names() -> None:
    for token in SPECIAL_TOKENS:
        assert len(tokenizer()(token)["input_ids"]) == 1
    assert tokenizer().eos_token == "<|im_end|>"
    assert tokenizer().pad_token == "<|endoftext|>"
    assert tokenizer().decode(tokenizer()("<|im_start|>a<|im_end|>")["input_ids"], skip_special_tokens=True) == "a"


def test_training_merges_what_is_frequent() -> None:
    assert len(tokenizer()(" thyroid")["input_ids"]) == 1
    assert len(tokenizer()("甲状腺")["input_ids"]) < len("甲状腺".encode())


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: got 200, expected at least 270"):
        train_tokenizer(TEXTS, 200)


@pytest.mark.parametrize(("size", "grid"), [((SIDE, SIDE), [1, 4, 4]), ((640, 320), [1, 2, 4]), ((30, 30), [1, 4, 4])])
def test_frames_are_shown_at_about_the_side_asked_for(size: tuple[int, int], grid: list[int]) -> None:
    processor = build_processor(tokenizer(), SIDE)
    seen = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [grid]


def test_chat_template_places_every_image_before_the_question() -> None:
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which side?"}]
    processor = build_processor(tokenizer(), SIDE)
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|im_start|>user\n{image}{image}Which side?<|im_end|>\n<|im_start|>assistant\n"


def test_the_processor_survives_saving(tmp_path) -> None:
    build_processor(tokenizer(), SIDE).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen2VLProcessor)
    assert loaded.tokenizer(TEXTS[1])["input_ids"] == tokenizer()(TEXTS[1])["input_ids"]
    assert loaded.image_processor.size["longest_edge"] == SIDE**2
