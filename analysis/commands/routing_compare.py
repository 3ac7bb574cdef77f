"""`moe-adapter routing compare`: two records side by side, with what their cases can and can't tell apart."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._options import add_part, add_resampling, part_of, resampling_of
from moe_adapter.analysis.commands._output import note, print_tables

EXAMPLES = (
    "moe-adapter routing compare stage1.parquet stage2.parquet",
    "moe-adapter routing compare north.parquet south.parquet --by layer group --unpaired -o difference.pdf",
)


def add(subparsers: Any) -> None:
    help = "two records side by side, with significance"
    parser = command(subparsers, "compare", run, help=help, examples=EXAMPLES)
    for name, meaning in (("a", "the first record's Parquet file"), ("b", "the second's: differences are B − A")):
        parser.add_argument(name, type=Path, metavar=name.upper(), help=meaning)
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("layer", "group", "modality", "slot"),
        default=["layer"],
        metavar="COLUMN",
        help="cells to compare: layer, group, modality, slot (default: layer)",
    )
    pairing = parser.add_mutually_exclusive_group()
    pairing.add_argument(
        "--paired",
        action="store_true",
        default=None,
        help="the records are of the same cases (default: whether their ids are the same)",
    )
    pairing.add_argument("--unpaired", dest="paired", action="store_false", help="they are of different cases")
    parser.add_argument(
        "-o", "--output", type=Path, action="append", default=[], help="a figure: pdf, png or svg by its name"
    )
    add_part(parser)
    add_resampling(parser)


def run(options: argparse.Namespace) -> None:
    from moe_adapter.analysis.commands.routing_plot import save
    from moe_adapter.analysis.compare import compare
    from moe_adapter.analysis.differences import comparison_figure
    from moe_adapter.analysis.reader import RoutingRecord

    records = RoutingRecord.open(options.a), RoutingRecord.open(options.b)
    where, resampling = part_of(options, *records), resampling_of(options)
    found = compare(*records, by=options.by, where=where, paired=options.paired, resampling=resampling)
    names = [str(path) for path in (options.a, options.b)]
    written = []
    if options.output:
        short = options.a.stem, options.b.stem
        figure = comparison_figure(found, names=short if len(set(short)) == 2 else names)
        written = [str(path) for output in options.output for path in save(figure, output)]
    note(f"a is {names[0]}, b is {names[1]}; {'the same' if found.paired else 'different'} cases")
    tables = {"cells": found.cells_table(), "experts": found.to_table()}
    print_tables(tables, options, a=names[0], b=names[1], paired=found.paired, written=written)
