"""The steps of the corpus, one file each: `add(subparsers)` enters it, and imports what it needs when it runs.

    def add(subparsers):
        parser = step(subparsers, "judge", run, help="a model's verdict on …", examples=["judge a.jsonl --out b"])
        parser.add_argument("cases", type=Path)

    def run(options): ...

`run` raises MoEAdapterError for what the user got wrong, and prints what it has done in a line or two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def step(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], None], *, help: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A step that calls `run(options)`; `examples` are command lines from the step's name on."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="examples:\n" + "\n".join(f"  python -m examples.echovlm.corpus {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser
