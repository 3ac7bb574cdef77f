"""A byte-level BPE tokenizer with Qwen's pipeline and special tokens, trained on the recipe's own corpus."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import Qwen2Tokenizer

# Qwen2-VL's special tokens in their order; <|endoftext|> pads, <|im_end|> ends a turn.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A tokenizer of at most `vocab_size` entries; any text round-trips, since all 256 bytes are in it.

    Raises: ValueError if `vocab_size` cannot hold the bytes and the special tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {256 + len(SPECIAL_TOKENS)}")
    untrained = Qwen2Tokenizer(eos_token="<|im_end|>", extra_special_tokens=list(SPECIAL_TOKENS[1:]))
    return untrained.train_new_from_iterator(corpus, vocab_size, show_progress=False)
