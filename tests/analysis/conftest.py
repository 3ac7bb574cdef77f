"""Tiny models with routers, a batch with images, and a record of whatever a test runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
import zoo

from moe_adapter import dual_path_layers, inject_dual_path_moe
from moe_adapter.analysis.record import RoutingRecord, record_routing
from moe_adapter.analysis.schema import LayerFacts, RecordFacts
from moe_adapter.analysis.writer import RoutedTokens, RoutingWriter

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


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., RoutingRecord]:
    """written(experts, …): a record of given routing, without a model.

    `experts` has an array (T, L, K) for each case; `groups` a group for each; `weights`, `modalities` and `token_ids`
    an array for each too, (T, L, K), (T,) and (T,).
    """

    def write(
        experts: Sequence[np.ndarray],
        *,
        groups: Sequence[str] | None = None,
        weights: Sequence[np.ndarray] | None = None,
        modalities: Sequence[np.ndarray] | None = None,
        token_ids: Sequence[np.ndarray] | None = None,
        cases: Sequence[str] | None = None,
        num_experts: int = 4,
        name: str = "written.parquet",
        row_group_rows: int = 2**20,
    ) -> RoutingRecord:
        layers, top_k = experts[0].shape[1:]
        writer = RoutingWriter(tmp_path / name, row_group_rows=row_group_rows)
        for number, expert_TLK in enumerate(experts):
            tokens = len(expert_TLK)
            named = (cases[number] if cases else f"case {number:04}", groups[number] if groups else "all")
            (case,), (group,) = writer.codes([named])
            even = np.full(expert_TLK.shape, 1 / top_k, np.float32)
            writer.append(
                RoutedTokens(
                    case_T=np.full(tokens, case),
                    group_T=np.full(tokens, group),
                    modality_T=modalities[number] if modalities else np.zeros(tokens, int),
                    position_T=np.arange(tokens),
                    token_id_T=token_ids[number] if token_ids else np.full(tokens, 7),
                    expert_TC=expert_TLK.reshape(tokens, -1),
                    weight_TC=(weights[number] if weights else even).reshape(tokens, -1),
                    layer_C=tuple(np.repeat(np.arange(layers), top_k)),
                    slot_C=tuple(np.tile(np.arange(top_k), layers)),
                )
            )
        facts = LayerFacts(name="", num_experts=num_experts, top_k=top_k)
        writer.close(
            RecordFacts(
                model="written",
                layers=tuple(replace(facts, name=f"layers.{number}") for number in range(layers)),
                groups=tuple(writer.groups),
                cases=len(writer.cases),
                tokens=writer.tokens,
            )
        )
        return RoutingRecord.open(tmp_path / name)

    return write


@pytest.fixture
def drawn() -> Callable[..., np.ndarray]:
    """drawn(rng, logits_E, (T, L)): experts (T, L, K) without replacement, with odds softmax(logits)."""

    def draw(rng: np.random.Generator, logits_E: np.ndarray, shape: tuple[int, int], top_k: int = 2) -> np.ndarray:
        noisy = logits_E + rng.gumbel(size=(*shape, len(logits_E)))
        return np.argsort(-noisy, axis=-1)[..., :top_k]

    return draw


@pytest.fixture
def clustered(drawn: Callable[..., np.ndarray]) -> Callable[..., list[np.ndarray]]:
    """clustered(rng, cases, spread): cases whose logits differ by `spread`; every expert's true share is 1 / E."""

    def draw(
        rng: np.random.Generator, cases: int, *, spread: float, tokens: int = 30, layers: int = 1, experts: int = 4
    ) -> list[np.ndarray]:
        sizes = rng.integers(tokens // 2, tokens * 2, cases)
        return [drawn(rng, rng.normal(0, spread, experts), (size, layers)) for size in sizes]

    return draw
