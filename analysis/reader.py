"""Reads routing records back: their facts, their rows, and sums over them in bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from moe_adapter.analysis.blocks import TokenBlock
from moe_adapter.analysis.schema import METADATA_KEY, SCHEMA, SCHEMA_VERSION, RecordFacts, merge_facts, plain_type
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """A record on disk, of one file or of one for each process; `dataset` is pyarrow's, for filters and streaming.

    A record that `count_routing` wrote has counts in place of tokens: `aggregated`.
    """

    paths: tuple[Path, ...]
    facts: RecordFacts
    dataset: ds.Dataset

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> RoutingRecord:
        """Open what `record_routing` or `count_routing` wrote; several paths are parts of one record.

        Raises:
            MoEAdapterError: no such file, not a routing record, written by a newer version, empty, or parts that
                are not of one model.
        """
        paths = tuple(map(Path, [path] if isinstance(path, str | os.PathLike) else path))
        if not paths:
            raise MoEAdapterError("no path was given; name the record's file, or its files.")
        facts = merge_facts([_read_footer(path) for path in paths])
        dataset = ds.dataset(list(map(str, paths)), format="parquet")
        if not dataset.count_rows():
            names = ", ".join(map(str, paths))
            raise MoEAdapterError(f"{names} holds no routed token; record a forward pass with padding left out.")
        return cls(paths=paths, facts=facts, dataset=dataset)

    @property
    def name(self) -> str:
        """Its files, for messages."""
        return ", ".join(map(str, self.paths)) or "the record in memory"

    @property
    def aggregated(self) -> bool:
        """Whether it holds counts alone, without cases and tokens."""
        return self.facts.aggregated

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rows can be counted by."""
        return tuple(name for name in self.dataset.schema.names if name != "count")

    def table(self, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Rows as an Arrow table, e.g. where=(pc.field("group") == "liver") & (pc.field("layer") == 3)."""
        return self.dataset.to_table(columns=list(columns) if columns else None, filter=where)

    def count(self, by: Sequence[str], where: pc.Expression | None = None) -> pa.Table:
        """Number of rows for each combination of the columns `by` that occurs, sorted: by…, count."""
        if unknown := sorted(set(by) - set(self.columns)):
            raise MoEAdapterError(f"a record has no column {unknown}; it has {', '.join(self.columns)}.")
        columns = [*by, "count"] if self.aggregated else list(by)
        batches = self.dataset.scanner(columns=columns, filter=where, batch_readahead=1).to_batches()
        return add_up(map(_with_counts, batches), by, {"count": pa.int64()})

    def tokens(self, where: pc.Expression | None = None, weights: bool = True) -> Iterator[TokenBlock]:
        """The record's tokens in file order, a row group at a time, each with its experts in every layer.

        Args:
            where: tokens and layers to take: a filter on case, group, modality, position, token_id or layer.
            weights: whether to read the routing weights.

        Raises:
            MoEAdapterError: the record holds counts alone, or the filter leaves out some of a token's slots.
        """
        if self.aggregated:
            raise MoEAdapterError("this needs a record of tokens, by record_routing; the given one holds counts alone.")
        columns = [name for name in SCHEMA.names if weights or name != "weight"]
        for fragment in self.dataset.get_fragments():
            for row_group in fragment.split_by_row_group():
                rows = row_group.to_table(columns=columns, filter=where)
                if len(rows):
                    yield TokenBlock.from_rows(rows)


def add_up(parts: Iterator[pa.Table], by: Sequence[str], values: dict[str, pa.DataType]) -> pa.Table:
    """The sums of the columns `values` for each combination of the columns `by`, sorted: by…, values….

    Each part is summed as it comes, so that what waits in memory is the combinations, not the rows.
    """
    by = list(by)
    plain = pa.schema([*((name, plain_type(name)) for name in by), *values.items()])
    sums = [plain.empty_table(), *(_sum(part, by, plain) for part in parts)]
    total = _sum(pa.concat_tables(sums), by, plain)
    return total.sort_by([(name, "ascending") for name in by]) if by else total


def _sum(table: pa.Table, by: list[str], schema: pa.Schema) -> pa.Table:
    values = [name for name in schema.names if name not in by]
    total = table.group_by(by).aggregate([(name, "sum") for name in values])
    return total.select([*by, *(f"{name}_sum" for name in values)]).rename_columns(schema.names).cast(schema)


def _with_counts(batch: pa.RecordBatch) -> pa.Table:
    table = pa.Table.from_batches([batch])
    return table if "count" in table.column_names else table.append_column("count", pa.repeat(1, len(table)))


def _read_footer(path: Path) -> RecordFacts:
    if not path.is_file():
        raise MoEAdapterError(f"no routing record at {path}; write one with record_routing(model, path).")
    try:
        text = (pq.read_metadata(path).metadata or {})[METADATA_KEY]
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
    return facts
