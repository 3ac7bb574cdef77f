"""A small BERT that stands in for BERTScore's encoder where no published one lies (`--stand-in` of the grid).

It learns to fill in masked words of general text, and of reports and questions about phantoms that no case shows. Its
scores compare with each other, and with no published BERTScore.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer, DataCollatorForLanguageModeling

from examples.echovlm import ranks
from examples.echovlm.config import BertScoreConfig
from examples.echovlm.general import general_text
from examples.echovlm.phantom.attributes import ORGANS
from examples.echovlm.phantom.generate import describe

LAYER, LAYERS = 3, 4  # whose states are compared, of so many
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": LAYERS}
LENGTH = 128  # tokens of a text in training; of one that is scored, up to four times as many
CASES = 60  # of an organ
STEPS, BATCH, RATE = 200, 16, 1e-3


def stand_in(folder: Path, seed: int, steps: int = STEPS) -> BertScoreConfig:
    """The encoder in `folder`, which is trained and put there if it is not there yet."""
    if ranks.is_main() and not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        _train(part, seed, steps)
        os.replace(part, folder)
    ranks.wait()
    return BertScoreConfig(encoder=str(folder.resolve()), num_layers=LAYER)


def _train(folder: Path, seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    texts = [*_reports(seed), *_paragraphs()]
    tokenizer = BertTokenizer().train_new_from_iterator(texts, 4000, show_progress=False)
    tokenizer.model_max_length = 4 * LENGTH
    mask = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=8)
    rows = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=4 * LENGTH, **SIZES)
    encoder, model = BertModel(config), BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        model(**mask([{"input_ids": rows[i]} for i in rng.choice(len(rows), BATCH)])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    encoder.load_state_dict(model.bert.state_dict(), strict=False)  # which has no pooler
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _reports(seed: int) -> Iterator[str]:
    """What is said of phantoms of another seed than the cases'."""
    for organ in ORGANS:
        for number in range(CASES):
            case = describe(organ, number, seed=seed + 1, frames=1, split="train")
            yield f"{case.findings}\n{case.impression}"
            yield from (f"{question.question} {question.answer}" for question in case.questions)


def _paragraphs() -> list[str]:
    return [text for text in general_text()[0].split("\n\n") if text.strip()]
