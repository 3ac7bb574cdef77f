"""The real Qwen2-VL processor around a tokenizer, its chat template, and the size that frames are read at."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.image_utils import SizeDict

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def build_processor(tokenizer: Qwen2Tokenizer, image_side: int) -> Qwen2VLProcessor:
    """A processor that shows the model each frame at about image_side² pixels, several frames a turn."""
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
    return set_image_side(processor, image_side)


def set_image_side(processor: ProcessorMixin, image_side: int) -> ProcessorMixin:
    """Let a Qwen-style image processor scale frames to about image_side² pixels; others keep their own size."""
    if hasattr(processor.image_processor, "merge_size"):
        processor.image_processor.size = SizeDict(shortest_edge=image_side**2, longest_edge=image_side**2)
    return processor
