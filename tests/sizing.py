"""`python -m tests.sizing --write docs/sizing.md`: what an injection adds to hosts of several sizes.

Counted by `plan_injection` on the meta device, over Qwen2 and Qwen2-VL at their published sizes.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from moe_adapter import plan_injection

ROPE = dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6)
SIZES = {  # hidden, FFN, layers, attention heads, key-value heads, vocabulary
    "Qwen2-0.5B": (896, 4864, 24, 14, 2, 151936),
    "Qwen2-VL-2B": (1536, 8960, 28, 12, 2, 151936),
    "Qwen2-VL-7B": (3584, 18944, 28, 28, 4, 152064),
    "Qwen2-VL-72B": (8192, 29568, 80, 64, 8, 152064),
}
TIED = ("Qwen2-0.5B", "Qwen2-VL-2B")
CONFIGS: dict[str, dict[str, Any]] = {
    "the default, Table 8": {},
    "shares of the FFN: `expert_dim=1/16, shared_expert_dim=1/4`": dict(expert_dim=1 / 16, shared_expert_dim=1 / 4),
    'a budget: `budget="200M"`': dict(budget="200M"),
    "every fourth layer, Table 8": dict(every=4),
    "no shared expert: `shared_expert_dim=0`": dict(shared_expert_dim=0),
}
PAGE = """# What an injection adds

Written by `python -m tests.sizing --write docs/sizing.md`, which asks `plan_injection` on the meta device. "New" are
the parameters of stage I: everything that trains there. GiB are those of the new weights in bfloat16; AdamW in
float32 keeps eight bytes more for each.

The defaults are those of the paper's Table 8, which are meant for 7B: on a smaller host give the widths as shares of
its FFN (a float), or a budget. A budget scales shared and routed experts together, in multiples of 8, to the most
parameters that it allows. `print(plan_injection(model, …))` shows the same for your own model before anything is
touched.

{tables}
"""


def build(name: str) -> torch.nn.Module:
    """The model `name` on the meta device, in bfloat16."""
    hidden, ffn, layers, heads, kv, vocabulary = SIZES[name]
    text = dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads)
    text |= dict(num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=name in TIED)
    with torch.device("meta"):
        if "VL" not in name:
            return tf.Qwen2ForCausalLM(tf.Qwen2Config(**text)).bfloat16()
        vision = dict(depth=32, embed_dim=1280, hidden_size=hidden, num_heads=16, mlp_ratio=4)
        config = tf.Qwen2VLConfig(
            text_config=text | dict(rope_parameters=ROPE), vision_config=vision, tie_word_embeddings=name in TIED
        )
        return tf.Qwen2VLForConditionalGeneration(config).bfloat16()


def row(model: torch.nn.Module, name: str, *, every: int = 1, **options: Any) -> str:
    layers = range(0, SIZES[name][2], every)
    plan = plan_injection(model, layers=layers, **options)
    first = plan.rows[0]
    shared = first.shared_expert_dim or "–"
    cells = (
        f"{name} ({plan.base / 1e9:.2f} B)",
        f"{len(plan.rows)}",
        f"{first.ffn_dim}",
        f"{shared}",
        f"{plan.config.num_experts} × {first.expert_dim}",
        f"{plan.added:,}",
        f"{plan.added / plan.total:.1%}",
        f"{plan.bytes / 2**30:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    models = {name: build(name) for name in SIZES}
    tables = []
    for title, options in CONFIGS.items():
        rows = [row(model, name, **options) for name, model in models.items()]
        head = (
            "| host | layers | FFN | shared | routed | new | of all | GiB |\n|---|---:|---:|---:|---:|---:|---:|---:|"
        )
        tables.append("\n".join([f"## {title[0].upper()}{title[1:]}\n", head, *rows]))
    return PAGE.format(tables="\n\n".join(tables))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page to write; printed without it")
    path = parser.parse_args().write
    path.write_text(page(), encoding="utf-8") if path else print(page())
