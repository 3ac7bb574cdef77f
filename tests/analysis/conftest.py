"""Tiny models with routers, a batch with images, and a record of whatever a test runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
import zoo

from moe_adapter import dual_path_layers, inject_dual_path_moe
from moe_adapter.analysis.record import RoutingRecord, record_routing

IMAGE, VIDEO = 120, 121


@pytest.fixture
def mixtral() -> tf.MixtralForCausalLM:
    config = tf.MixtralConfig(**zoo.TEXT, num_local_experts=4, num_experts_per_tok=2)
    model = tf.MixtralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def vlm() -> tf.PreTrainedModel:
    """A Qwen2-VL with dual-path layers whose routers and experts are not at their start values."""
    model = inject_dual_path_moe(
        zoo.build("qwen2_vl"), num_experts=4, top_k=2, expert_dim=8, shared_expert_dim=8, preserve_base=False
    )
    for layer in dual_path_layers(model).values():
        for parameter in layer.new_parameters().values():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def text_batch() -> Callable[[str], dict[str, torch.Tensor]]:
    """Three rows of 7, 5 and 3 tokens, padded on the given side."""

    def batch(side: str) -> dict[str, torch.Tensor]:
        rows = [
            torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(length)) for length in (7, 5, 3)
        ]
        return padded(rows, side)

    return batch


@pytest.fixture
def image_batch() -> Callable[[str], dict[str, torch.Tensor]]:
    """Two cases, of two images and of one, padded on the given side; 4 and 6 tokens an image."""

    def batch(side: str) -> dict[str, torch.Tensor]:
        def image(tokens: int) -> list[int]:
            return [122, *[IMAGE] * tokens, 123]

        rows = [torch.tensor([5, *image(4), 6, *image(6), 7, 8]), torch.tensor([9, *image(4), 10, 11])]
        inputs = padded(rows, side)
        grids = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 4, 4]])
        pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
        types = (inputs["input_ids"] == IMAGE).int()
        return {**inputs, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}

    return batch


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    def pad(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)

    return {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows])}


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., RoutingRecord]:
    """record(model, run, …): what record_routing writes while run() runs, read back."""

    def run_and_read(model: torch.nn.Module, run: Callable[[], object], **options: object) -> RoutingRecord:
        with record_routing(model, tmp_path / "routing.parquet", **options):  # type: ignore[arg-type]
            run()
        return RoutingRecord.open(tmp_path / "routing.parquet")

    return run_and_read


@pytest.fixture
def routes() -> Callable[[RoutingRecord], set[tuple]]:
    """What each token of a record is and where it went: comparable across ways to run the model."""

    def of(record: RoutingRecord) -> set[tuple]:
        names = ["case", "position", "modality", "token_id", "layer", "slot", "expert"]
        rows = record.table(names).to_pylist()
        found = {tuple(row.values()) for row in rows}
        assert len(found) == len(rows), "a token was recorded twice"
        return found

    return of
