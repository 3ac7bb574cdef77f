"""Reads a routing record back: its facts, its rows, and counts of its rows in bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from moe_adapter.analysis.schema import METADATA_KEY, SCHEMA, SCHEMA_VERSION, RecordFacts
from moe_adapter.errors import MoEAdapterError

_PLAIN = {name: pa.string() for name in SCHEMA.names if pa.types.is_dictionary(SCHEMA.field(name).type)}


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """A record on disk. `dataset` is the Parquet file as a pyarrow dataset, for filters and streaming."""

    path: Path
    facts: RecordFacts
    dataset: ds.Dataset

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RoutingRecord:
        """Open what `record_routing` wrote.

        Raises:
            MoEAdapterError: no such file, not a routing record, written by a newer version, or empty.
        """
        path = Path(path)
        facts, rows = _read_footer(path)
        if not rows:
            raise MoEAdapterError(f"{path} holds no routed token; record a forward pass with padding left out.")
        return cls(path=path, facts=facts, dataset=ds.dataset(path, format="parquet"))

    def table(self, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Rows as an Arrow table, e.g. where=(pc.field("group") == "liver") & (pc.field("layer") == 3)."""
        return self.dataset.to_table(columns=list(columns) if columns else None, filter=where)

    def count(self, by: Sequence[str], where: pc.Expression | None = None) -> pa.Table:
        """Number of rows for each combination of the columns `by` that occurs, sorted: by…, count."""
        if unknown := sorted(set(by) - set(SCHEMA.names)):
            raise MoEAdapterError(f"a record has no column {unknown}; it has {', '.join(SCHEMA.names)}.")
        by = list(by)
        plain = pa.schema([(name, _PLAIN.get(name, SCHEMA.field(name).type)) for name in by] + [("count", pa.int64())])
        parts = [plain.empty_table()]
        for batch in self.dataset.scanner(columns=by, filter=where, batch_readahead=1).to_batches():
            counts = pa.Table.from_batches([batch]).group_by(by).aggregate([([], "count_all")])
            parts.append(counts.select([*by, "count_all"]).rename_columns([*by, "count"]).cast(plain))
        total = pa.concat_tables(parts).group_by(by).aggregate([("count", "sum")])
        total = total.select([*by, "count_sum"]).rename_columns([*by, "count"])
        return total.sort_by([(name, "ascending") for name in by])


def _read_footer(path: Path) -> tuple[RecordFacts, int]:
    if not path.is_file():
        raise MoEAdapterError(f"no routing record at {path}; write one with record_routing(model, path).")
    try:
        footer = pq.read_metadata(path)
        text = (footer.metadata or {})[METADATA_KEY]
        version = int(json.loads(text)["version"])
        facts = RecordFacts.from_json(text) if version <= SCHEMA_VERSION else None
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
        raise MoEAdapterError(
            f"{path} is not a routing record; expected a Parquet file that record_routing wrote."
        ) from error
    if facts is None:
        raise MoEAdapterError(
            f"{path} was written in version {version} of the record, and this moe-adapter reads up to "
            f"{SCHEMA_VERSION}; upgrade moe-adapter."
        )
    return facts, footer.num_rows
