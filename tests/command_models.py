"""Tiny checkpoints on disk, with tokenizer or processor beside the weights, for the command line's tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import zoo
from echovlm.recipe_parts import SIDE, small_config, tokenizer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from examples.echovlm.base import build_model
from examples.echovlm.processor import build_processor
from moe_adapter import dual_path_layers, inject_dual_path_moe, save_adapter
from moe_adapter.analysis import cli

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = ("the", "liver", "heart", "is", "even", "dark", "bright", "where", "user", "assistant", ":")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def run(*arguments: str | Path) -> int:
    """The command line's exit code."""
    return cli.main([str(argument) for argument in arguments])


def save_text_model(model: tf.PreTrainedModel, folder: Path, template: str | None = None) -> Path:
    """A language model with a tokenizer of few words."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    special |= dict(model_input_names=["input_ids", "attention_mask"])  # type: ignore[dict-item]
    words = tf.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def mixtral() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**zoo.TEXT, num_local_experts=4, num_experts_per_tok=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_vlm(folder: Path) -> Path:
    """A Qwen2-VL with the recipe's processor: 2 × 2 image tokens a frame of SIDE pixels."""
    torch.manual_seed(0)
    model = build_model(small_config(attention="sdpa"), tokenizer())  # pyright: ignore
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    build_processor(tokenizer(), SIDE).save_pretrained(folder)
    return folder


def save_trained_adapter(base: Path, folder: Path) -> Path:
    """An adapter whose parameters are nowhere at their start values."""
    model = inject_dual_path_moe(
        tf.AutoModelForImageTextToText.from_pretrained(base), expert_dim=8, shared_expert_dim=16
    )
    torch.manual_seed(1)
    for layer in dual_path_layers(model).values():
        for parameter in layer.new_parameters().values():
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, folder)
    return folder


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def image_cases(folder: Path) -> list[dict[str, Any]]:
    """Three cases of two organs, with two frames, one and none."""
    for number in range(3):
        Image.new("RGB", (SIDE, SIDE), (90 * number, 200 - 60 * number, 40)).save(folder / f"{number}.png")
    return [
        {"id": "a", "group": "liver", "prompt": "It is. " * 12, "images": ["0.png", "1.png"], "reference": "Even."},
        {
            "id": "b",
            "group": "甲状腺",
            "prompt": "Describe the frames.",
            "images": ["2.png"],
            "reference": "无回声囊肿",
        },
        {"id": "c", "group": "liver", "messages": [{"role": "user", "content": "Hello."}], "reference": "Yes."},
    ]
