"""Examples to batches: prompts padded on the left, and labels on the response tokens only (equation 5)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from examples.echovlm.tasks import Example
from moe_adapter import MoEAdapterError

IGNORED = -100


class Collator:
    """Turns examples, or bare blocks of token ids (general text), into a model's training batch.

    Every row is `[padding | prompt | response | padding]`: the prompt side is what generation sees too.
    Labels are IGNORED (-100) on padding, prompt and image tokens.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int) -> None:
        """Raises: MoEAdapterError if the processor's chat template can't tell prompt and response apart."""
        self.processor = processor
        self.max_length = max_length
        self._response(Example(prompt="?", answer="!"))

    def __call__(self, items: Sequence[Example | list[int]]) -> BatchFeature:
        """A batch of B rows with input_ids, attention_mask, labels (B × T) and the images.

        Raises: MoEAdapterError if a prompt alone fills `max_length`.
        """
        turns = [item for item in items if isinstance(item, Example)]
        batch = self.prompts(turns) if turns else BatchFeature()
        responses = [self._response(item) if isinstance(item, Example) else item for item in items]
        is_turn = torch.tensor([isinstance(item, Example) for item in items])
        return self._append(batch, is_turn, responses)

    def prompts(self, examples: Sequence[Example]) -> BatchFeature:
        """The prompts alone, padded on the left, ready for `generate`."""
        texts = [self._render(example.messages(), add_generation_prompt=True) for example in examples]
        frames = [example.frames() for example in examples]
        batch = self.processor(
            text=texts,
            images=frames if any(frames) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        if batch["input_ids"].shape[1] >= self.max_length:
            raise MoEAdapterError(
                f"max_length: a prompt with its images takes {batch['input_ids'].shape[1]} tokens, expected fewer "
                f"than {self.max_length}; raise max_length or lower image_side in the preset"
            )
        return batch

    def text(self, example: Example) -> list[int]:
        """Token ids of prompt and response, in which each image is one token."""
        prompt = self._render(example.messages(), add_generation_prompt=True)
        return self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"] + self._response(example)

    def _response(self, example: Example) -> list[int]:
        """Token ids of the answer as the chat template writes it, up to the end of the turn.

        Raises: MoEAdapterError if what generation starts from is no prefix of the conversation; labels would then
        cover the prompt.
        """
        prompt = self._render(example.messages(), add_generation_prompt=True)
        answer = {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}
        whole = self._render([*example.messages(), answer], add_generation_prompt=False)
        written = self._after(prompt, whole)
        if written is None:
            raise MoEAdapterError(
                f"chat template: its generation prompt ends in {prompt[-40:]!r}, where the conversation with the "
                "answer goes on otherwise; expected a prefix of it. Give the processor a template that opens the "
                "answer as it writes it, without an added <think> or the like"
            )
        return self.processor.tokenizer(written.rstrip(), add_special_tokens=False)["input_ids"]

    @staticmethod
    def _after(prompt: str, whole: str) -> str | None:
        """What follows the prompt in the conversation; blanks may differ, as they do in LLaVA-OneVision's template."""
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        found = re.match(r"\s+".join(map(re.escape, prompt.split())) + r"\s*", whole)
        return whole[found.end() :] if found else None

    def _append(self, batch: BatchFeature, is_turn: torch.Tensor, responses: list[list[int]]) -> BatchFeature:
        """Put the responses right of the prompts; rows without a turn have an empty prompt."""
        rows = len(responses)
        width = batch["input_ids"].shape[1] if batch else 0
        ids, mask, kinds = (torch.zeros(rows, width, dtype=torch.long) for _ in range(3))
        ids += self.processor.tokenizer.pad_token_id
        for name, tensor in (("input_ids", ids), ("attention_mask", mask), ("mm_token_type_ids", kinds)):
            if name in batch:
                tensor[is_turn] = batch[name].long()
        longest = min(max(map(len, responses)), self.max_length - width)
        tails = torch.full((rows, longest), IGNORED)
        for row, response in enumerate(responses):
            tails[row, : len(response)] = torch.tensor(response[:longest])
        real = tails != IGNORED
        batch["input_ids"] = torch.cat([ids, tails.where(real, self.processor.tokenizer.pad_token_id)], dim=1)
        batch["attention_mask"] = torch.cat([mask, real.long()], dim=1)
        batch["labels"] = torch.cat([torch.full_like(ids, IGNORED), tails], dim=1)
        if "mm_token_type_ids" in self.processor.model_input_names:
            batch["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tails)], dim=1)
        return batch

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
