"""The real processors of the two families around a tokenizer, and the size that frames are read at."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.image_utils import SizeDict

from examples.echovlm.config import Family
from examples.echovlm.pictures import CELL

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def build_processor(tokenizer: Qwen2Tokenizer, image_side: int, family: Family = "qwen2_vl") -> ProcessorMixin:
    """A processor that shows the model each frame at about image_side² pixels, several frames a turn."""
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    if family == "qwen2_vl":
        processor = Qwen2VLProcessor(
            Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=template
        )
        return set_image_side(processor, image_side)
    side = {"height": image_side, "width": image_side}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=[[image_side, image_side]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=(image_side // CELL) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )


def set_image_side(processor: ProcessorMixin, image_side: int) -> ProcessorMixin:
    """Let a Qwen-style image processor scale frames to about image_side² pixels; others keep their own size."""
    if hasattr(processor.image_processor, "merge_size"):
        processor.image_processor.size = SizeDict(shortest_edge=image_side**2, longest_edge=image_side**2)
    return processor
