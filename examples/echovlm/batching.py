"""How training examples make a batch: padded to the longest, of like lengths, or one behind the other in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, DataCollatorWithFlattening
from transformers.trainer_pt_utils import LengthGroupedSampler

from examples.echovlm.collator import Collator
from examples.echovlm.tasks import Example

CASE_IDS = "case_ids"  # a batch's key for the cases of its rows, which is no input of the model

Collate = Callable[[Sequence[Any]], BatchFeature]


class WithCases:
    """A collate function whose batches name their cases."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> BatchFeature:
        batch = self.collate(items)
        batch[CASE_IDS] = [getattr(item, "case_id", "") for item in items]
        return batch


class Packed:
    """One row of all examples, without padding, by transformers' DataCollatorWithFlattening.

    Positions start anew with each example, by which transformers' attention masks keep them apart. A model with
    M-RoPE (Qwen2-VL) gets its three kinds of positions below these, in its own form (4 × 1 × T).
    """

    def __init__(self, collator: Collator, model: nn.Module) -> None:
        self.collator, self.flatten = collator, DataCollatorWithFlattening()
        with_rope = (part for part in model.modules() if hasattr(part, "get_rope_index"))
        self.rope_index = getattr(next(with_rope, None), "get_rope_index", None)

    def __call__(self, items: Sequence[Example | list[int]]) -> BatchFeature:
        rows = [self.collator([item]) for item in items]
        flat = self.flatten([{name: row[name][0] for name in ("input_ids", "labels")} for row in rows])
        names = {name: None for row in rows for name in row if name not in (*flat, "attention_mask")}
        batch = BatchFeature({name: _joined(rows, name) for name in names} | flat)
        if self.rope_index:
            positions = [self.rope_index(**row)[0] for row in rows]
            batch["position_ids"] = torch.cat([flat["position_ids"][None], torch.cat(positions, dim=-1)])
        batch["use_cache"] = False  # beside a cache, transformers doesn't look where sequences start
        return batch


def _joined(rows: Sequence[BatchFeature], name: str) -> torch.Tensor:
    """What the rows have of one input: along the tokens where it has some for each, else along the images."""
    rows = [row for row in rows if name in row]
    per_token = all(row[name].shape == row["input_ids"].shape for row in rows)
    return torch.cat([row[name] for row in rows], dim=1 if per_token else 0)


class LengthGrouped(LengthGroupedSampler):
    """transformers' sampler, whose order depends on seed and epoch alone, so that all ranks and a resumed run have it.

    It draws from torch's global random numbers otherwise, as they happen to be.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def lengths(examples: Sequence[Example], collator: Collator) -> list[int]:
    """Tokens of each example, in which every frame counts as much as one of the first example's."""
    texts = [len(collator.text(example)) for example in examples]
    first = examples[0]
    frame = 0
    if first.images:
        frame = (collator([first])["input_ids"].shape[1] - texts[0]) // len(first.images)
    return [text + frame * len(example.images) for text, example in zip(texts, examples, strict=True)]
