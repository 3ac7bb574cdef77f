"""The command line, `moe-adapter`: finds the subcommands, which are files of `commands`, and runs one."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence

from moe_adapter.analysis import commands
from moe_adapter.errors import MoEAdapterError

EXTRAS = dict.fromkeys(("numpy", "scipy", "pyarrow", "matplotlib", "PIL", "vl_convert"), "analysis")
EXTRAS |= dict.fromkeys(("transformers", "accelerate", "jinja2", "tqdm"), "transformers") | {"peft": "peft"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 1 with one line on stderr for what the user got wrong, as argparse's 2 for usage."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"moe-adapter: warning: {message}", file=sys.stderr)
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # its reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except (MoEAdapterError, ModuleNotFoundError, OSError) as error:
        if options.debug:
            raise
        print(f"moe-adapter: error: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def _reason(error: Exception) -> str:
    """One line; of a library that is missing, the extra that brings it."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in EXTRAS:
        return f'this needs {missing}: pip install "moe-adapter[{EXTRAS[missing]}]".'
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-adapter",
        description="Turns dense transformers into dual-path mixtures of experts, and shows what they do.",
        epilog="moe-adapter COMMAND --help shows a command's options and examples.",
    )
    version = importlib.metadata.version("moe-adapter")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for module in pkgutil.iter_modules(commands.__path__):  # in order: routing, which has commands, then routing_plot
        if not module.name.startswith("_"):
            group = groups[module.name.rpartition("_")[0]]
            groups[module.name] = importlib.import_module(f"{commands.__name__}.{module.name}").add(group)
    return parser


if __name__ == "__main__":
    sys.exit(main())
