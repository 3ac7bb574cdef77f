"""The paper's Figures 1 to 4 and 6 to 13, a file each: `add(subparsers)` enters one, and imports what it needs late.

def add(subparsers):
    parser = figure(subparsers, "pipeline", run, help="Figure 3: …", examples=["pipeline raw clean -o figure3.pdf"])
    parser.add_argument("manifests", type=Path, nargs="+")

`run(options)` raises MoEAdapterError for what the user got wrong, and returns the paths that it has written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "png", "svg")


def figure(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], list[Path]], *, help: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """The command of one figure, with its -o; `examples` are command lines from its name on."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=f"{help}.",
        epilog="examples:\n" + "\n".join(f"  python -m examples.echovlm.figures {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="its name says the format")
    parser.set_defaults(run=run)
    return parser


def save(drawn: Figure, output: Path) -> list[Path]:
    """Write a figure in the format of the file's name.

    Raises: MoEAdapterError if it is none of FORMATS.
    """
    from moe_adapter.analysis.style import save_figure

    suffix = output.suffix[1:].lower()
    if suffix not in FORMATS:
        raise MoEAdapterError(
            f"-o {output}: got no format that is drawn here; expected a name in .{', .'.join(FORMATS)}"
        )
    return save_figure(drawn, output.with_suffix(""), [suffix])
