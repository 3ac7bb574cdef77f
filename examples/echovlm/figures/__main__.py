"""The figures' command line: python -m examples.echovlm.figures NAME … -o FILE; finds the files that draw one."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Sequence

from examples.echovlm import figures
from moe_adapter.errors import MoEAdapterError


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one figure; 0, or 2 with one line on stderr for what the user got wrong."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the libraries below
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            print(*options.run(options), sep="\n")
    except (MoEAdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.echovlm.figures",
        description="The figures of the EchoVLM paper, from your cases, manifests and runs.",
        epilog="python -m examples.echovlm.figures NAME --help shows a figure's options and examples. "
        "Figure 5 is drawn by each run, and by `moe-adapter routing plot`.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="NAME")
    for module in pkgutil.iter_modules(figures.__path__):
        if hasattr(found := importlib.import_module(f"{figures.__name__}.{module.name}"), "add"):
            found.add(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
