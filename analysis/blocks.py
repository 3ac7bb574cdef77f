"""Tokens read back from a record, a block of them at a time, each with its experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from moe_adapter.analysis.schema import plain_type
from moe_adapter.errors import MoEAdapterError

FACTS = pa.schema([(name, plain_type(name)) for name in ("case", "group", "modality", "position", "token_id")])


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """T tokens: `facts` has a row for each, columns `FACTS`; C = Σ K (layer, slot) pairs say where it went."""

    facts: pa.Table
    expert_TC: np.ndarray
    weight_TC: np.ndarray | None
    layer_C: np.ndarray
    slot_C: np.ndarray

    @classmethod
    def from_rows(cls, rows: pa.Table) -> TokenBlock:
        """From the rows of a record, those of a token together; all tokens with the same layers and slots."""
        layer, slot = (rows[name].to_numpy() for name in ("layer", "slot"))
        starts = np.flatnonzero((layer == layer[0]) & (slot == slot[0]))
        columns = starts[1] if len(starts) > 1 else len(rows)
        whole = len(rows) % columns == 0
        for values in (layer, slot):
            whole = whole and (values.reshape(-1, columns) == values[:columns]).all()
        slots = {number: slot[:columns][layer[:columns] == number] for number in np.unique(layer[:columns])}
        if not whole or any((found != np.arange(len(found))).any() for found in slots.values()):
            raise MoEAdapterError(
                "the filter leaves out some of a token's slots; filter by case, group, modality, position, token_id "
                "or layer."
            )
        weights = rows["weight"].to_numpy().reshape(-1, columns) if "weight" in rows.column_names else None
        return cls(
            facts=rows.select(FACTS.names).take(np.arange(0, len(rows), columns)).cast(FACTS),
            expert_TC=rows["expert"].to_numpy().reshape(-1, columns),
            weight_TC=weights,
            layer_C=layer[:columns],
            slot_C=slot[:columns],
        )

    def __len__(self) -> int:
        return len(self.expert_TC)

    def __getitem__(self, tokens: slice) -> TokenBlock:
        weights = None if self.weight_TC is None else self.weight_TC[tokens]
        return replace(self, facts=self.facts[tokens], expert_TC=self.expert_TC[tokens], weight_TC=weights)

    def by_layer(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """(layer, expert_TK, weight_TK) of each layer, strongest expert first where the weights were read."""
        for layer in np.unique(self.layer_C).tolist():
            of_layer = self.layer_C == layer
            expert_TK = self.expert_TC[:, of_layer]
            weight_TK = None if self.weight_TC is None else self.weight_TC[:, of_layer]
            if weight_TK is not None and (weight_TK[:, :-1] < weight_TK[:, 1:]).any():
                order_TK = np.argsort(-weight_TK, axis=1, kind="stable")
                expert_TK, weight_TK = (np.take_along_axis(each, order_TK, axis=1) for each in (expert_TK, weight_TK))
            yield layer, expert_TK, weight_TK
