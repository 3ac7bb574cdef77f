"""Greedy answers of a model to examples, batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel

from examples.echovlm.collator import Collator
from examples.echovlm.config import EvaluationConfig
from examples.echovlm.tasks import Example
from examples.echovlm.training import own_precision
from moe_adapter.analysis.record import RoutingRecorder

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    examples: Sequence[Example],
    collator: Collator,
    config: EvaluationConfig,
    *,
    label: str,
    record: RoutingRecorder | None = None,
) -> list[str]:
    """The model's greedy answers in order; `record` is told which case and organ each row is."""
    model.eval()
    answers: list[str] = []
    for rows, batch in _batches(examples, collator, config.batch_size, label):
        if record is not None:
            record.batch(case_ids=[row.case_id for row in rows], groups=[row.organ for row in rows])
        batch = batch.to(model.device)
        with own_precision(model):
            out = model.generate(**batch, max_new_tokens=config.max_new_tokens, **GREEDY)
        new = out[:, batch["input_ids"].shape[1] :]
        answers += collator.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in answers]


def _batches(
    examples: Sequence[Example], collator: Collator, size: int, label: str
) -> Iterator[tuple[Sequence[Example], BatchFeature]]:
    for start in tqdm(range(0, len(examples), size), desc=label, leave=False):
        rows = examples[start : start + size]
        yield rows, collator.prompts(rows)
