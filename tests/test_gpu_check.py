"""`make gpu-check`'s script at toy size, and its count of FLOPs."""

from __future__ import annotations

import re

import torch

from benchmarks.training import TOY, batch_of, build, main, measure
from moe_adapter import set_stage


def test_it_writes_a_page(tmp_path):
    assert main(["--toy", "--steps", "1", "--name", "here", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "here-training.md").read_text()
    rows = re.findall(r"^\| (1|2) \| .* M of .* M \| \S+ s \| \S+ \| – \| (\S+) \| – \|$", page, re.MULTILINE)
    assert [stage for stage, _ in rows] == ["1", "2"]
    assert float(rows[0][1]) < float(rows[1][1]) < 1.5 * float(rows[0][1])  # LoRA's products, and no recomputation


def test_flops_are_those_of_the_products():
    """Frozen maps of the decoder: 2 forward, 2 back to the input, times parameters and tokens, are most of a step."""
    model, batch = build(TOY, torch.device("cpu")), batch_of(TOY, torch.device("cpu"))
    set_stage(model, 1)
    flops = measure(model, batch, steps=1)["flops"]
    layers = model.model.language_model.layers
    frozen = sum(p.numel() for p in layers.parameters() if p.dim() == 2 and not p.requires_grad)
    trained = sum(layer.mlp.shared_expert.gate_proj.weight.numel() * 3 for layer in layers)
    experts = sum(layer.mlp.experts.down_proj[0].numel() * 3 * 2 for layer in layers)  # top-2
    head = model.lm_head.weight.numel()
    least = TOY.tokens * (4 * (frozen + head) + 6 * (trained + experts))
    assert (
        0.9 * least < flops < 1.6 * least
    )  # the first block has no input gradient; attention, vision tower and router
