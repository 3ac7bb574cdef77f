"""A trained checkpoint that answers questions on a case's frames, and shows where their patches are routed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image

from examples.echovlm.processor import set_image_side
from moe_adapter import MoEAdapterError
from moe_adapter.analysis import style
from moe_adapter.analysis.overlays import expert_map
from moe_adapter.analysis.record import RoutingRecord, record_routing
from moe_adapter.analysis.routers import find_routers
from moe_adapter.integrations import pretrained

CASE = "frames"  # the one case of a record
RECORD = "routing.parquet"
DPI = 240  # of the overlay, for a screen


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What was asked about some frames and answered so far; the record of the last answer lies in `folder`."""

    frames: Sequence[Image.Image]
    turns: list[tuple[str, str]] = field(default_factory=list)
    folder: TemporaryDirectory[str] = field(default_factory=lambda: TemporaryDirectory(prefix="echovlm-chat-"))

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The chat so far with a new question: the frames stand before the first one, as in training."""
        said = [*self.said(), ("user", question)]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        messages[0]["content"][:0] = [{"type": "image", "image": frame} for frame in self.frames]
        return messages

    def said(self) -> list[tuple[str, str]]:
        """(role, text) of the chat so far."""
        return [line for turn in self.turns for line in zip(("user", "assistant"), turn, strict=True)]

    def close(self) -> None:
        self.folder.cleanup()


class Assistant:
    """A base with its adapter, which answers greedily."""

    def __init__(self, base: str, adapter: str, *, max_new_tokens: int, image_side: int | None = None) -> None:
        """Raises: MoEAdapterError if they can't be loaded, don't fit, or have no router or image processor."""
        self.processor = pretrained.load_processor(base)
        if not pretrained.reads_images(self.processor):
            raise MoEAdapterError(f"{base}: got a model that reads text alone, expected a vision-language model")
        if image_side:
            set_image_side(self.processor, image_side)
        self.model = pretrained.load_model(base, adapter=adapter)
        self.max_new_tokens = max_new_tokens
        self.layers = [block.facts(0, 0) for block in find_routers(self.model)]

    @torch.inference_mode()
    def answer(self, conversation: Conversation, question: str) -> str:
        """The greedy answer, added to the conversation.

        Raises: MoEAdapterError if the frames and the chat so far leave no room for it, in the context or the memory.
        """
        inputs = pretrained.encode(self.model, self.processor, [conversation.messages(question)], answered=False)
        self._check_room(inputs["input_ids"].shape[1], len(conversation.frames))
        try:
            with record_routing(self.model, Path(conversation.folder.name) / RECORD) as record:
                record.batch(case_ids=[CASE])
                ids = pretrained.answer_ids(self.model, inputs, self.max_new_tokens)
        except torch.OutOfMemoryError:
            raise MoEAdapterError(f"{len(conversation.frames)} frames don't fit into memory: give fewer.") from None
        text = pretrained.tokenizer_of(self.processor).decode(ids[0], skip_special_tokens=True).strip()
        conversation.turns.append((question, text))
        return text

    def overlay(self, conversation: Conversation, layer: int) -> Figure:
        """The frames of the last answer, beside themselves under the first expert of each patch in a layer.

        Raises: MoEAdapterError if nothing was answered, or the processor tells no grid of the patches.
        """
        record = RoutingRecord.open(Path(conversation.folder.name) / RECORD)
        grids = pretrained.image_grids(self.processor, conversation.frames)
        with matplotlib.rc_context({"figure.dpi": DPI}):
            return expert_map(record, CASE, conversation.frames, grids, layer=layer, width_mm=style.SINGLE_COLUMN_MM)

    def _check_room(self, tokens: int, frames: int) -> None:
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and tokens + self.max_new_tokens > room:
            raise MoEAdapterError(
                f"{frames} frames and what was asked take {tokens} tokens, and an answer up to {self.max_new_tokens}: "
                f"more than the model's {room}. Give fewer frames, or begin anew with other ones."
            )
