"""Which words go where: the experts of each token of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.tables import number_cells
from moe_adapter.errors import MoEAdapterError

UNKNOWN = -1  # the id of a token that was given as an embedding


class Tokenizer(Protocol):
    """What names the ids: any of transformers' tokenizers."""

    def decode(self, token_ids: list[int], /) -> str: ...


@dataclass(frozen=True, kw_only=True)
class TokenSpecialisation:
    """R rows, by layer, expert and falling share: how often a token came, and the share of it that the expert got.

    A token's shares sum to k over the experts of a layer.
    """

    layer_R: np.ndarray
    expert_R: np.ndarray
    token_id_R: np.ndarray
    count_R: np.ndarray
    share_R: np.ndarray

    def top(self, number: int) -> TokenSpecialisation:
        """The tokens with the largest shares, so many for each expert."""
        place_R = self.layer_R.astype(np.int64) * (self.expert_R.max(initial=0) + 1) + self.expert_R
        rank_R = np.arange(len(place_R)) - np.searchsorted(place_R, place_R)
        return TokenSpecialisation(**{field.name: getattr(self, field.name)[rank_R < number] for field in fields(self)})

    def to_table(self, tokenizer: Tokenizer | None = None) -> pa.Table:
        """layer, expert, token_id, token (its text, with a tokenizer), count, share."""
        columns = {name.removesuffix("_R"): getattr(self, name) for name in ("layer_R", "expert_R", "token_id_R")}
        if tokenizer is not None:
            texts = {number: tokenizer.decode([number]) for number in set(self.token_id_R.tolist())}
            columns["token"] = pa.array([texts[number] for number in self.token_id_R.tolist()], pa.string())
        return pa.table({**columns, "count": self.count_R, "share": self.share_R})


def token_specialisation(
    record: RoutingRecord, *, min_count: int = 10, where: pc.Expression | None = None
) -> TokenSpecialisation:
    """Of each token id that goes in, the share of its occurrences that chose an expert: N_{x, expert} / N_x.

    OLMoE's vocabulary specialisation, arXiv 2409.02060, section 5.4. Embeddings without an id are left out.

    Args:
        min_count: leaves out ids that came more rarely, whose shares mean little.
        where: pc.field("modality").isin(["prompt", "generated"]) leaves out the placeholders of images.

    Raises:
        MoEAdapterError: the record holds counts alone, or no row is left.
    """
    known = pc.field("token_id") != UNKNOWN
    where = known if where is None else where & known
    table = record.count(["layer", "token_id", "expert"], where)
    if not len(table):
        raise MoEAdapterError(f"no token of {record.name} has an id and passes the filter.")
    cells, cell_R = number_cells(table, ("layer", "token_id"))
    layer_C, token_id_C = np.array(cells, np.int64).T
    top_k_C = np.array([record.facts.layers[layer].top_k for layer in layer_C])
    count_C = np.bincount(cell_R, weights=table["count"].to_numpy()) / top_k_C
    expert_R, share_R = table["expert"].to_numpy(), table["count"].to_numpy() / count_C[cell_R]
    order = np.lexsort((token_id_C[cell_R], -count_C[cell_R], -share_R, expert_R, layer_C[cell_R]))
    order = order[count_C[cell_R[order]] >= min_count]
    cell_R = cell_R[order]
    return TokenSpecialisation(
        layer_R=layer_C[cell_R],
        expert_R=expert_R[order].astype(np.int64),
        token_id_R=token_id_C[cell_R],
        count_R=count_C[cell_R].round().astype(np.int64),
        share_R=share_R[order],
    )
