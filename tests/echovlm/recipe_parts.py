"""Small real parts of the recipe that several tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer, Qwen2Tokenizer

from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig, load_preset
from examples.echovlm.families import build_model
from examples.echovlm.phantom import generate_cases
from examples.echovlm.processor import build_processor
from examples.echovlm.tasks import Example
from examples.echovlm.tokenizer import train_tokenizer

TEXTS = (
    "The thyroid has even echotexture. A 14 mm round anechoic cyst is seen in the left thyroid lobe.",
    "甲状腺回声均匀。甲状腺左叶可见一圆形无回声囊肿，大小约14mm，后方增强。",
)
SIDE = 56  # pixels: 4 visual tokens a frame
PRESET = """
extends: tiny
image_side: 56
phantoms: {cases_per_organ: 3, test_share: 0.4, size: 56}
base:
  text: {num_hidden_layers: 2, hidden_size: 48, intermediate_size: 64, num_attention_heads: 4, num_key_value_heads: 2,
         initializer_range: 0.06, rope_parameters: {mrope_section: [2, 2, 2]}}
  vision: {depth: 1, embed_dim: 32}
  tower_pictures: 4
  tower_pretraining: {batch_size: 2}
  pictures: 4
  pretraining: {batch_size: 4, epochs: 0.004}
moe: {expert_dim: 16, shared_expert_dim: 24}
stage1: {batch_size: 4, epochs: 0.5}
stage2: {batch_size: 4, epochs: 0.1}
evaluation: {batch_size: 16, max_new_tokens: 4}
"""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}


@cache
def tokenizer() -> Qwen2Tokenizer:
    return train_tokenizer(TEXTS * 20, 400)


@cache
def collator(max_length: int = 256) -> Collator:
    return Collator(build_processor(tokenizer(), SIDE), max_length)


def example(prompt: str = "Describe.", answer: str = TEXTS[0], frames: int = 2) -> Example:
    images = tuple(Image.new("RGB", (SIDE, SIDE), (90 * number, 40, 0)) for number in range(frames))
    return Example(prompt=prompt, answer=answer, images=images, case_id="1", organ="thyroid")


def small_config(precision: str = "fp32", run: Mapping[str, Any] | None = None, **changes: Any) -> RecipeConfig:
    """The tiny preset at a minuscule size; both stages run at the paper's rate of stage II, but for `run`."""
    tiny = load_preset("tiny")
    stage = dataclasses.replace(tiny.stage2, **{"learning_rate": 2e-5, "batch_size": 1, "epochs": 1, **(run or {})})
    base = dataclasses.replace(tiny.base, text=TEXT, vision={"depth": 1, "embed_dim": 32, "num_heads": 2})
    moe = {"expert_dim": 16, "shared_expert_dim": 16}
    changes = {"base": base, "moe": moe, "stage1": stage, "stage2": stage, "precision": precision, **changes}
    return dataclasses.replace(tiny, **changes)


def write_inputs(folder: Path, preset: str) -> list[str]:
    """The command line's arguments for a run of a preset that extends PRESET on a base and cases written here."""
    (folder / "preset.yaml").write_text(PRESET)
    (folder / "mine.yaml").write_text(f"extends: {folder / 'preset.yaml'}\n{preset}")
    settings = load_preset(str(folder / "mine.yaml"))
    torch.manual_seed(0)
    build_model(settings, tokenizer()).save_pretrained(folder / "base")
    build_processor(tokenizer(), settings.image_side).save_pretrained(folder / "base")
    cases = generate_cases(folder / "cases", cases_per_organ=3, test_share=0.4, frames=2, size=SIDE)
    values = {"preset": folder / "mine.yaml", "base": folder / "base", "cases": cases}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def write_encoder(folder: Path, layers: int = 3) -> Path:
    """A random BERT that knows the words of TEXTS, as `save_pretrained` leaves it."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(set(" ".join(TEXTS).lower().split()) | set(TEXTS[1])),
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=layers, **sizes)).save_pretrained(folder)
    return folder
