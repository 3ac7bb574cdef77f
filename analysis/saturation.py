"""How early in training routing settles: the same tokens through several checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.blocks import TokenBlock
from moe_adapter.analysis.cases import CaseSums, estimate_cells, means
from moe_adapter.analysis.reader import RoutingRecord, add_up
from moe_adapter.analysis.resampling import DEFAULT, Estimate, Resampling, estimate_columns
from moe_adapter.analysis.schema import GENERATED, MODALITIES
from moe_adapter.analysis.tables import cell_table, in_layer, number_cells, sum_cells
from moe_adapter.errors import MoEAdapterError

GIVEN = pc.field("modality") != MODALITIES[GENERATED]


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """Mean over tokens of |top-k at a checkpoint ∩ top-k at the last| / k, (S, L), with intervals over cases.

    `chance_L` is k / E, what two routers that know nothing of each other share.
    """

    checkpoints: tuple[str, ...]
    layers: tuple[int, ...]
    chance_L: np.ndarray
    saturation_SL: Estimate

    def to_table(self) -> pa.Table:
        """checkpoint, layer, saturation, saturation_low, saturation_high, chance."""
        cells = [(checkpoint, layer) for checkpoint in self.checkpoints for layer in self.layers]
        chance = np.tile(self.chance_L, len(self.checkpoints))
        columns = estimate_columns(saturation=self.saturation_SL)
        return cell_table(("checkpoint", "layer"), cells, **columns, chance=chance)


def saturation(
    records: Mapping[str, RoutingRecord], *, where: pc.Expression | None = None, resampling: Resampling = DEFAULT
) -> Saturation:
    """Router saturation at each checkpoint but the last, layer by layer; OLMoE, arXiv 2409.02060, section 5.1.

    Args:
        records: by checkpoint, in the order of training, each of the same cases in the same order. Text that a
            checkpoint generated differs from the others' and is left out.
        where: tokens and layers to compare, as in `RoutingRecord.tokens`.

    Raises:
        MoEAdapterError: fewer than two records, or they differ in their tokens, layers or k.
    """
    if len(records) < 2:
        raise MoEAdapterError(f"got {len(records)} record; saturation sets checkpoints against the last, so give two.")
    *checkpoints, last = records
    where = GIVEN if where is None else where & GIVEN
    overlaps = [_overlaps(records[checkpoint], records[last], where) for checkpoint in checkpoints]
    estimates = [next(estimate_cells(sums, ("layer",), means, resampling).each()) for sums in overlaps]
    layers = tuple(layer for (layer,) in overlaps[0].cells)
    facts = [records[last].facts.layers[layer] for layer in layers]
    return Saturation(
        checkpoints=tuple(checkpoints),
        layers=layers,
        chance_L=np.array([layer.top_k / layer.num_experts for layer in facts]),
        saturation_SL=Estimate(*map(np.stack, zip(*estimates, strict=True))),
    )


def _overlaps(record: RoutingRecord, last: RoutingRecord, where: pc.Expression) -> CaseSums:
    by, values = ["case", "group", "layer"], {"overlap": pa.float64(), "tokens": pa.int64()}
    parts = (part for pair in _in_step(record, last, where) for part in _compared(*pair, [*by, *values]))
    return CaseSums.of(add_up(parts, by, values), ("layer",), list(values))


def _compared(block: TokenBlock, last: TokenBlock, columns: list[str]) -> Iterator[pa.Table]:
    """For each layer, sums over the tokens of each case: case, group, layer, |top-k ∩ top-k| / k, tokens."""
    if (block.layer_C.tolist(), block.slot_C.tolist()) != (last.layer_C.tolist(), last.slot_C.tolist()):
        raise MoEAdapterError("the records differ in their layers or in k; saturation needs checkpoints of one model.")
    by = ["case", "group"]
    cells, cell_T = number_cells(block.facts, by)
    for (layer, expert_TK, _), (_, last_TK, _) in zip(block.by_layer(), last.by_layer(), strict=True):
        overlap_T = (expert_TK[:, :, None] == last_TK[:, None, :]).sum(axis=(1, 2)) / expert_TK.shape[1]
        sums = sum_cells(by, cells, cell_T, overlap=overlap_T, tokens=np.ones(len(block)))
        yield in_layer(sums, layer, columns)


def _in_step(
    record: RoutingRecord, last: RoutingRecord, where: pc.Expression
) -> Iterator[tuple[TokenBlock, TokenBlock]]:
    """Blocks of the same tokens of two records, however their row groups are cut."""
    streams = [iter(each.tokens(where, weights=False)) for each in (record, last)]
    ours = theirs = None
    while True:
        ours = ours if ours is not None and len(ours) else next(streams[0], None)
        theirs = theirs if theirs is not None and len(theirs) else next(streams[1], None)
        if ours is None and theirs is None:
            return
        if ours is None or theirs is None or not _same_tokens(ours, theirs):
            raise MoEAdapterError(
                f"{record.name} and {last.name} do not hold the same tokens in the same order; run every checkpoint on "
                "the same batches, with the answers given, not generated."
            )
        tokens = min(len(ours), len(theirs))
        yield ours[:tokens], theirs[:tokens]
        ours, theirs = ours[tokens:], theirs[tokens:]


def _same_tokens(ours: TokenBlock, theirs: TokenBlock) -> bool:
    """Whether the blocks hold the same tokens, as far as the shorter one goes."""
    tokens = min(len(ours), len(theirs))
    of_us, of_them = (block[:tokens].facts.select(["case", "position", "token_id"]) for block in (ours, theirs))
    return of_us.equals(of_them)
