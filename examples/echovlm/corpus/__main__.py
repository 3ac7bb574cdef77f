"""The corpus's command line: python -m examples.echovlm.corpus STEP …; finds the steps, which are files of `steps`."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from examples.echovlm.corpus import steps
from moe_adapter.errors import MoEAdapterError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step; 0, or 2 with one line on stderr for what the user got wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (MoEAdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.echovlm.corpus",
        description="From hospital exports to an instruction corpus, a step at a time (docs/corpus.md).",
        epilog="python -m examples.echovlm.corpus STEP --help shows a step's options and examples.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="STEP")
    for module in pkgutil.iter_modules(steps.__path__):
        importlib.import_module(f"{steps.__name__}.{module.name}").add(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
