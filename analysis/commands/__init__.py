"""The subcommands of `moe-adapter`, one file each: `add(subparsers)` enters it, and imports what it needs when it runs.

    def add(subparsers):
        parser = command(subparsers, "info", run, help="what an adapter holds", examples=["moe-adapter info runs/a"])
        parser.add_argument("adapter", type=Path)

    def run(options): ...

A command with commands of its own, such as routing, returns its own subparsers from `add`; `routing_plot` is then
`moe-adapter routing plot`. A file whose name begins with "_" is no command.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], None], *, help: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A subcommand that calls `run(options)`; every one has --json, by `options.json`, and --debug.

    `run` prints its answer to stdout, as one JSON value under --json, and raises MoEAdapterError for what the user got
    wrong.
    """
    parser = subparsers.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it, libraries log errors only, and say nothing of what they mean to change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)
