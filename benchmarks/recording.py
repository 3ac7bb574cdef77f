"""What it costs to record the routing of a model's forwards, beside the forwards alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import Times
from benchmarks.shapes import Shape
from benchmarks.timing import interleaved
from moe_adapter import inject_dual_path_moe
from moe_adapter.analysis.record import record_routing
from moe_adapter.analysis.tally import count_routing

LAYERS, FORWARDS = 4, 4
PLAIN = "plain"


def recording_times(shape: Shape, like: Tensor, seconds: float) -> Times:
    """FORWARDS forwards of a Qwen2 of the layer's widths: plain, recorded to a file, counted."""
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.static,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.hidden // 32,
        num_key_value_heads=2,
        vocab_size=512,
    )
    sizes = dict(num_experts=shape.experts, top_k=shape.top_k, expert_dim=shape.expert, shared_expert_dim=shape.shared)
    model = inject_dual_path_moe(Qwen2ForCausalLM(config).to(like.device, like.dtype), **sizes).eval()
    ids = torch.randint(0, 512, (2, shape.tokens // 2), device=like.device)
    rows = LAYERS * shape.top_k * shape.tokens  # a row group for each forward, so that compressing it is timed too
    folder = tempfile.TemporaryDirectory()

    @torch.inference_mode()
    def forwards() -> None:
        for _ in range(FORWARDS):
            model(input_ids=ids, use_cache=False)

    def recorded() -> None:
        path = Path(folder.name, "routing.parquet")
        with record_routing(model, path, row_group_rows=rows):
            forwards()

    def counted() -> None:
        with count_routing(model):
            forwards()

    with folder:
        return interleaved(
            {PLAIN: forwards, "record_routing": recorded, "count_routing": counted}, seconds=seconds, rounds=40
        )
