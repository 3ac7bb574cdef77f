"""How sure a router is of its choice, and which experts come first and second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.blocks import FACTS, TokenBlock
from moe_adapter.analysis.cases import CaseSums, estimate_cells, inner, means
from moe_adapter.analysis.reader import RoutingRecord, add_up
from moe_adapter.analysis.resampling import DEFAULT, Estimate, Resampling, estimate_columns
from moe_adapter.analysis.statistics import ExpertLoad, normalised_entropy, num_experts, shares
from moe_adapter.analysis.tables import cell_table, expert_table, in_layer, number_cells, sum_cells
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Means over tokens by cell, (C,) each, with intervals over cases.

    With w the K recorded weights of a token, made to sum to 1, largest first: `gap_C` is w₁ − w₂, `entropy_C`
    −Σ w log w / log K.
    """

    by: tuple[str, ...]
    cells: tuple[tuple, ...]
    cases_C: np.ndarray
    gap_C: Estimate
    entropy_C: Estimate

    def to_table(self) -> pa.Table:
        """by…, cases, and gap, entropy, each followed by its _low and _high."""
        columns = estimate_columns(gap=self.gap_C, entropy=self.entropy_C)
        return cell_table(self.by, self.cells, cases=self.cases_C, **columns)


def confidence(
    record: RoutingRecord,
    *,
    by: Sequence[str] = ("layer",),
    where: pc.Expression | None = None,
    resampling: Resampling = DEFAULT,
) -> Confidence:
    """How sure the routers are, by "layer", "group", "modality": the gap of the first two weights, and the entropy.

    A record keeps the K weights of equation (4) and no logits. They say how sure the router is among the experts that
    it chose: log(w₁/w₂) is the difference of the two logits, for softmax over the selected and over all experts alike
    (not for sigmoid scores). How near the first expert left out came, and the entropy over all E, they don't say.
    Tokens whose weights sum to 0 don't count.

    Raises:
        MoEAdapterError: a layer is top-1, the record holds no cases, or no token is left.
    """
    columns = ["case", "group", *token_columns(inner(by))]
    values = {"gap": pa.float64(), "entropy": pa.float64(), "tokens": pa.int64()}
    parts = (part for block in record.tokens(where) for part in _measured(block, columns))
    table = add_up(parts, columns, values)
    if not len(table):
        raise MoEAdapterError(f"no token of {record.name} passes the filter {where}.")
    found = estimate_cells(CaseSums.of(table, inner(by), list(values)), by, means, resampling)
    gap, entropy = found.each()
    return Confidence(by=found.by, cells=found.cells, cases_C=found.cases_C, gap_C=gap, entropy_C=entropy)


def rank_load(
    record: RoutingRecord, *, by: Sequence[str] = ("layer",), where: pc.Expression | None = None
) -> ExpertLoad:
    """Expert load by rank: how often each expert has a token's largest weight, its second largest, ….

    The cells are `by` and "rank", from 0. Slots are in the router's own order, which is not by weight in every model.

    Raises:
        MoEAdapterError: no token is left, or layers have different numbers of experts.
    """
    columns, experts = token_columns(by), num_experts(record, where)
    parts = (part for block in record.tokens(where) for part in _ranked(block, columns, experts))
    table = add_up(parts, [*columns, "rank", "expert"], {"count": pa.int64()})
    return ExpertLoad.of(table, [*columns, "rank"], experts)


def token_columns(by: Sequence[str]) -> list[str]:
    """`by`, checked to be columns of a token and its layer."""
    known = [*FACTS.names, "layer"]
    if unknown := sorted(set(by) - set(known)):
        raise MoEAdapterError(f"a token has no {unknown}; it has {', '.join(known)}.")
    return list(by)


def _measured(block: TokenBlock, columns: list[str]) -> Iterator[pa.Table]:
    """For each layer, sums over the tokens of each cell: columns…, gap, entropy, tokens."""
    by = [name for name in columns if name != "layer"]
    cells, cell_T = number_cells(block.facts, by)
    for layer, _, weight_TK in block.by_layer():
        assert weight_TK is not None
        if weight_TK.shape[1] < 2:
            raise MoEAdapterError(f"layer {layer} routes each token to one expert, which leaves no gap to measure.")
        w_TK = shares(weight_TK.astype(np.float64))
        known_T = np.isfinite(w_TK).all(axis=1)
        w_TK = w_TK[known_T]
        values = dict(gap=w_TK[:, 0] - w_TK[:, 1], entropy=normalised_entropy(w_TK), tokens=np.ones(len(w_TK)))
        yield in_layer(sum_cells(by, cells, cell_T[known_T], **values), layer, [*columns, *values])


def _ranked(block: TokenBlock, columns: list[str], experts: int) -> Iterator[pa.Table]:
    """For each layer and rank, tokens of each cell and expert: columns…, rank, expert, count."""
    by = [name for name in columns if name != "layer"]
    cells, cell_T = number_cells(block.facts, by)
    for layer, expert_TK, _ in block.by_layer():
        for rank, expert_T in enumerate(expert_TK.T):
            counts = np.bincount(cell_T * experts + expert_T, minlength=len(cells) * experts)
            table = expert_table(by, cells, experts, count=counts).append_column("rank", pa.repeat(rank, len(counts)))
            yield in_layer(table, layer, [*columns, "rank", "expert", "count"])
