"""Small real parts of the recipe that several tests share."""

from __future__ import annotations

from functools import cache

from PIL import Image
from transformers import Qwen2Tokenizer

from examples.echovlm.collator import Collator
from examples.echovlm.processor import build_processor
from examples.echovlm.tasks import Example
from examples.echovlm.tokenizer import train_tokenizer

TEXTS = (
    "The thyroid has even echotexture. A 14 mm round anechoic cyst is seen in the left thyroid lobe.",
    "甲状腺回声均匀。甲状腺左叶可见一圆形无回声囊肿，大小约14mm，后方增强。",
)
SIDE = 56  # pixels: 4 visual tokens a frame


@cache
def tokenizer() -> Qwen2Tokenizer:
    return train_tokenizer(TEXTS * 20, 400)


@cache
def collator(max_length: int = 256) -> Collator:
    return Collator(build_processor(tokenizer(), SIDE), max_length)


def example(prompt: str = "Describe.", answer: str = TEXTS[0], frames: int = 2) -> Example:
    images = tuple(Image.new("RGB", (SIDE, SIDE), (90 * number, 40, 0)) for number in range(frames))
    return Example(prompt=prompt, answer=answer, images=images, case_id="1", organ="thyroid")
