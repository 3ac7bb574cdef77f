"""Streams routed tokens to a Parquet file in bounded memory; the file appears, whole, on close."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_adapter.analysis.schema import METADATA_KEY, MODALITIES, SCHEMA, RecordFacts

PER_TOKEN = ("case_T", "group_T", "modality_T", "position_T", "token_id_T", "expert_TC", "weight_TC")


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """T tokens and where C = Σ K (layer, slot) pairs sent each of them."""

    case_T: np.ndarray  # index into the names given to the writer, as group_T
    group_T: np.ndarray
    modality_T: np.ndarray  # index into MODALITIES
    position_T: np.ndarray
    token_id_T: np.ndarray
    expert_TC: np.ndarray
    weight_TC: np.ndarray
    layer_C: tuple[int, ...]
    slot_C: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.case_T)

    def __getitem__(self, tokens: slice) -> RoutedTokens:
        return replace(self, **{name: getattr(self, name)[tokens] for name in PER_TOKEN})

    @property
    def columns(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.layer_C, self.slot_C


class RoutingWriter:
    """Collects tokens and writes a row group whenever `row_group_rows` rows are there."""

    def __init__(self, path: Path, *, row_group_rows: int):
        self.path = path
        self.row_group_rows = row_group_rows
        self.cases: dict[str, int] = {}
        self.groups: dict[str, int] = {}
        self.tokens = 0
        self._pending: list[RoutedTokens] = []
        self._waiting = 0  # tokens in _pending
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        self._parquet = pq.ParquetWriter(
            self._partial,
            SCHEMA,
            compression="zstd",
            use_dictionary=[name for name in SCHEMA.names if name != "weight"],  # type: ignore[arg-type]
            use_byte_stream_split=["weight"],  # type: ignore[arg-type]
        )

    def codes(self, named: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers that stand for the case and the group of each sequence of a batch."""
        case_N = [self.cases.setdefault(case, len(self.cases)) for case, _ in named]
        group_N = [self.groups.setdefault(group, len(self.groups)) for _, group in named]
        return np.array(case_N, int), np.array(group_N, int)

    def append(self, routed: RoutedTokens) -> None:
        """Take tokens in; at most `row_group_rows` rows (one token at least) wait in memory."""
        if self._pending and self._pending[0].columns != routed.columns:
            self._flush()
        self.tokens += len(routed)
        limit = max(1, self.row_group_rows // len(routed.layer_C))
        start = 0
        while start < len(routed):
            part = routed[start : start + limit - self._waiting]
            self._pending.append(part)
            self._waiting += len(part)
            start += len(part)
            if self._waiting == limit:
                self._flush()

    def close(self, facts: RecordFacts) -> None:
        """Write what waits and the footer, and put the file in its place."""
        self._flush()
        self._parquet.add_key_value_metadata({METADATA_KEY.decode(): facts.to_json()})
        self._parquet.close()
        os.replace(self._partial, self.path)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._parquet.close()
        self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        first = self._pending[0]
        whole = {name: np.concatenate([getattr(part, name) for part in self._pending]) for name in PER_TOKEN}
        self._pending, self._waiting = [], 0
        table = self._table(replace(first, **whole))
        self._parquet.write_table(table, row_group_size=len(table))  # a token's rows stay together

    def _table(self, routed: RoutedTokens) -> pa.Table:
        """The rows of T tokens, token by token: (T·C) rows."""
        tokens, columns = routed.expert_TC.shape

        def per_token(values_T: np.ndarray) -> np.ndarray:
            return np.repeat(values_T, columns)

        def named(codes_T: np.ndarray, names: tuple[str, ...]) -> pa.DictionaryArray:
            used, codes_T = np.unique(codes_T, return_inverse=True)
            return pa.DictionaryArray.from_arrays(per_token(codes_T.astype(np.int32)), [names[code] for code in used])

        arrays = [
            named(routed.case_T, tuple(self.cases)),
            named(routed.group_T, tuple(self.groups)),
            named(routed.modality_T, MODALITIES),
            per_token(routed.position_T),
            per_token(routed.token_id_T),
            np.tile(routed.layer_C, tokens),
            np.tile(routed.slot_C, tokens),
            routed.expert_TC.reshape(-1),
            routed.weight_TC.reshape(-1),
        ]
        return pa.table([pa.array(a).cast(f.type) for a, f in zip(arrays, SCHEMA, strict=True)], schema=SCHEMA)
