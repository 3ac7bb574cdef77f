"""`moe-adapter routing`: what has to do with records of routing; its commands are the files `routing_….py`."""

from __future__ import annotations

from typing import Any


def add(subparsers: Any) -> Any:
    help = "records of where tokens go: record, stats, plot, compare"
    parser = subparsers.add_parser(
        "routing", help=help, description=help, epilog="moe-adapter routing COMMAND --help shows examples."
    )
    return parser.add_subparsers(required=True, metavar="COMMAND")
