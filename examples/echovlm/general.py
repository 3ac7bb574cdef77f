"""General text for the base model, and the held-out part that measures what training has unlearned."""

from __future__ import annotations

import pydoc_data.topics

from transformers import PreTrainedTokenizerBase

BLOCK = 64  # tokens


def general_text() -> tuple[str, str]:
    """Python's own language reference, which every installation holds: (training text, held-out text)."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = [text for index, text in enumerate(topics) if index % 10 == 9]
    return "\n".join(text for text in topics if text not in held_out), "\n".join(held_out)


def blocks(text: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The text as blocks of token ids, the tail left out."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]
