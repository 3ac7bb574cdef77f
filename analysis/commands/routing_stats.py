"""`moe-adapter routing stats`: a record's statistics as tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._options import add_part, add_record, add_resampling, call, part_of, resampling_of
from moe_adapter.analysis.commands._output import note, print_tables, print_written
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

    from moe_adapter.analysis.reader import RoutingRecord

EXAMPLES = (
    "moe-adapter routing stats routing.parquet",
    "moe-adapter routing stats routing.parquet --by group --tables load balance",
    "moe-adapter routing stats routing.parquet --modalities image --tables specialisation --json",
    "moe-adapter routing stats rank*.parquet --by layer group --csv tables/",
)
TABLES = {  # the function of the record, and what it takes beside it
    "load": ("balance.load_shares", ("by", "where", "resampling")),
    "balance": ("balance.balance", ("by", "where", "resampling")),
    "specialisation": ("specialisation.specialisation", ("where", "resampling")),
    "modality": ("modality.modality_preference", ("where", "resampling")),
    "confidence": ("confidence.confidence", ("by", "where", "resampling")),
    "coactivation": ("coactivation.coactivation", ("where",)),
    "ranks": ("confidence.rank_load", ("by", "where")),
    "tokens": ("vocabulary.token_specialisation", ("where",)),
    "paths": ("paths.path_weights", ()),
}
USUAL = ("load", "balance", "specialisation", "modality", "confidence")
TOP = 10  # tokens of each expert


def add(subparsers: Any) -> None:
    parser = command(subparsers, "stats", run, help="a record's statistics, as tables", examples=EXAMPLES)
    add_record(parser)
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("layer", "group", "modality", "slot"),
        default=["layer"],
        metavar="COLUMN",
        help="rows of load, balance, confidence and ranks: layer, group, modality, slot (default: layer)",
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=(*TABLES, "all"),
        metavar="NAME",
        help=f"{', '.join(TABLES)}, or all (default: {', '.join(USUAL)})",
    )
    parser.add_argument("--csv", type=Path, metavar="DIRECTORY", help="write each table into a CSV file there instead")
    parser.add_argument("--model", help="whose tokenizer names the table tokens: a directory, or a name on the hub")
    add_part(parser)
    add_resampling(parser)


def run(options: argparse.Namespace) -> None:
    from moe_adapter.analysis.reader import RoutingRecord

    record = RoutingRecord.open(options.record)
    offered = {"by": options.by, "where": part_of(options, record), "resampling": resampling_of(options)}
    tables, left_out = _tables(record, offered, options)
    for name, reason in left_out.items():
        note(f"{name} left out: {reason}")
    if options.csv:
        print_written(_write_csv(tables, options.csv), options, left_out=left_out)
    else:
        print_tables(tables, options, record=list(map(str, record.paths)), left_out=left_out)


def _tables(record: RoutingRecord, offered: Mapping[str, Any], options: argparse.Namespace) -> tuple[dict, dict]:
    """Tables by name, and why there is none of those that weren't asked for by name.

    Raises:
        MoEAdapterError: there is none of one that was, or no table at all.
    """
    named = options.tables or ()
    tables: dict[str, pa.Table] = {}
    left_out: dict[str, str] = {}
    for name in TABLES if "all" in named else named or USUAL:
        try:
            tables |= _table(name, record, offered, options)
        except MoEAdapterError as error:
            if name in named:
                raise
            left_out[name] = str(error)
    if not tables:
        raise MoEAdapterError(next(iter(left_out.values())))
    return tables, left_out


def _table(
    name: str, record: RoutingRecord, offered: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, pa.Table]:
    if record.aggregated and name in ("load", "balance"):
        return {name: _counted(name, record, offered)}
    function, takes = TABLES[name]
    arguments = {argument: offered[argument] for argument in takes}
    if name == "tokens" and not options.modalities:
        arguments["where"] = _text(offered["where"])
    found = call(function, record, arguments)
    if name == "tokens":
        return {name: found.top(TOP).to_table(_tokenizer(options))}
    more = {"specialisation_groups": found.groups_table()} if name == "specialisation" else {}
    return {name: found.to_table(), **more}


def _counted(name: str, record: RoutingRecord, offered: Mapping[str, Any]) -> pa.Table:
    """Load, or its balance, of a record that holds counts: without intervals, for it has no cases."""
    from moe_adapter.analysis.statistics import (
        coefficient_of_variation,
        expert_load,
        max_over_mean,
        normalised_entropy,
    )
    from moe_adapter.analysis.tables import cell_table

    load = expert_load(record, by=offered["by"], where=offered["where"])
    if name == "load":
        return load.to_table()
    measures = {"entropy": normalised_entropy, "variation": coefficient_of_variation, "max_over_mean": max_over_mean}
    return cell_table(load.by, load.cells, **{name: of(load.counts_CE) for name, of in measures.items()})


def _text(where: pc.Expression | None) -> pc.Expression:
    """Text within the filter: an image's placeholder is no word."""
    import pyarrow.compute as pc

    from moe_adapter.analysis.summary import TEXT

    text = pc.field("modality").isin(TEXT)
    return text if where is None else where & text


def _tokenizer(options: argparse.Namespace) -> Any:
    """That of --model, None without it."""
    if options.model is None:
        return None
    from moe_adapter.analysis.commands._options import loading

    with loading(options) as pretrained:
        return pretrained.tokenizer_of(pretrained.load_processor(options.model))


def _write_csv(tables: Mapping[str, pa.Table], folder: Path) -> list[Path]:
    from pyarrow import csv

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        csv.write_csv(table, path)
    return paths
