"""Greedy answers of a model to examples, batched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from examples.echovlm import ranks
from examples.echovlm.collator import Collator
from examples.echovlm.config import EvaluationConfig
from examples.echovlm.journal import Journal
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
    kept: Path | None = None,
) -> list[str]:
    """The model's greedy answers in order, on all processes, each of which answers some of the batches.

    `record` is told which case and organ each row is; it hears them all from the process that calls with one, alone.
    `kept`: a file of this process's answers so far, by which a run that was killed goes on.
    """
    model.eval()
    batches = [examples[start : start + config.batch_size] for start in range(0, len(examples), config.batch_size)]
    mine = batches if record is not None else ranks.share(batches)
    answers: list[list[str]] = []
    with Journal(kept) if kept else nullcontext() as journal:
        for number, rows in enumerate(tqdm(mine, desc=label, leave=False, disable=not ranks.is_main())):
            if journal is not None and (before := journal.get(str(number))):
                answers.append(before["answers"])
                continue
            if record is not None:
                record.batch(case_ids=[row.case_id for row in rows], groups=[row.organ for row in rows])
            answers.append(_answer(model, rows, collator, config))
            if journal is not None:
                journal.append(str(number), {"answers": answers[-1]})
    said = answers if record is not None else ranks.in_order(answers)
    return [text for texts in said for text in texts]


def _answer(model: PreTrainedModel, rows: Sequence[Example], collator: Collator, config: EvaluationConfig) -> list[str]:
    """The answers of one batch."""
    batch = collator.prompts(rows).to(model.device)
    with own_precision(model):
        out = model.generate(**batch, max_new_tokens=config.max_new_tokens, **GREEDY)
    new = out[:, batch["input_ids"].shape[1] :]
    texts = collator.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]
