"""The base model: a small general one made here, or the user's own checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Tokenizer,
)

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.collator import Collator
from examples.echovlm.config import BaseConfig, RecipeConfig
from examples.echovlm.data import Data
from examples.echovlm.families import build_model
from examples.echovlm.general import blocks, general_text
from examples.echovlm.pictures import picture_example
from examples.echovlm.processor import build_processor, set_image_side
from examples.echovlm.tasks import Example, examples_of
from examples.echovlm.tokenizer import train_tokenizer
from examples.echovlm.training import train, use_bf16
from examples.echovlm.vision import pretrain_vision
from moe_adapter import MoEAdapterError

CAPTIONS = 500  # picture descriptions in the tokenizer's corpus


def load_base(path: Path, config: RecipeConfig) -> tuple[PreTrainedModel, Collator]:
    """A checkpoint directory's vision-language model, on the GPU when there is one, and a collator of its processor.

    Raises: MoEAdapterError if there is no such checkpoint, or its processor has no chat template that can be used.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            path, attn_implementation=config.attention, dtype=_dtype(path, config.precision), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise MoEAdapterError(
            f"--base {path}: got no vision-language checkpoint ({str(error).splitlines()[0]}); expected a directory "
            "with a model and its processor, as save_pretrained writes them"
        ) from None
    if not processor.chat_template:
        raise MoEAdapterError(
            f"--base {path}: its processor has no chat template, expected one to ask questions with; put the "
            "instruction-tuned model's chat_template.jinja into the directory"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), Collator(set_image_side(processor, config.image_side), config.max_length)


def _dtype(path: Path, precision: str) -> str | torch.dtype:
    """The checkpoint's own ("auto"), except where nothing is computed in bf16, and for float16, which can't mix in."""
    if not use_bf16(precision):
        return torch.float32
    stored = AutoConfig.from_pretrained(path, local_files_only=True).dtype
    return torch.bfloat16 if stored == torch.float16 else "auto"


def make_base(config: RecipeConfig, data: Data, out: Path, account: Account) -> Path:
    """Pre-train a small model on general text and general pictures, and save it with its processor into `out`.

    Of several processes each pre-trains the vision tower, all alike, and its share of the rest.
    """
    base = config.base
    assert base is not None, "checked before the run"
    tokenizer = train_tokenizer(_corpus(data, config), base.vocab_size)
    processor = build_processor(tokenizer, config.image_side, base.family)
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)
    account.say(
        f"a {type(model).__name__} of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, a "
        f"byte-level BPE of {len(tokenizer)} tokens; general pre-training without any ultrasound"
    )
    accuracy = pretrain_vision(model, processor, config)
    told = ", ".join(f"{name} {value:.0%}" for name, value in accuracy.items())
    account.say(f"the vision tower tells apart cells of {base.tower_pictures} general pictures: {told}")
    general = GeneralData(base, tokenizer, config.image_side, config.seed)
    collator = Collator(processor, config.max_length)
    train(model, general, collator, base.pretraining, config, out, account, lambda model: _save(model, processor, out))
    return out


def _save(model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    if ranks.is_main():
        model.save_pretrained(out)
        processor.save_pretrained(out)


def _corpus(data: Data, config: RecipeConfig) -> Iterator[str]:
    """What the tokenizer is trained on: the general text, picture descriptions, and the training cases' texts."""
    yield general_text()[0]
    yield from (picture_example(index, config.image_side, config.seed).answer for index in range(CAPTIONS))
    for example in examples_of(data.train, data.folder):
        yield from (example.prompt, example.answer)


class GeneralData(Dataset):
    """The pre-training mixture: general text, and general pictures, drawn when asked for."""

    def __init__(self, base: BaseConfig, tokenizer: Qwen2Tokenizer, side: int, seed: int) -> None:
        self.blocks = blocks(general_text()[0], tokenizer)
        self.pictures, self.side, self.seed = base.pictures, side, seed

    def __len__(self) -> int:
        return len(self.blocks) + self.pictures

    def __getitem__(self, index: int) -> Example | list[int]:
        if index < len(self.blocks):
            return self.blocks[index]
        return picture_example(index - len(self.blocks), self.side, self.seed)
