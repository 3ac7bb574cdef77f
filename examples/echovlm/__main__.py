"""The recipe's command line: python -m examples.echovlm --preset tiny --out DIR."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from examples.echovlm.config import load_preset
from moe_adapter import MoEAdapterError


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 2 with one clear line for what the user got wrong."""
    options = _parser().parse_args(arguments)
    try:
        _check_paths(options)
        config = load_preset(options.preset)
        _load_recipe()(config, cases_file=options.cases, base=options.base, out=options.out)
    except MoEAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _load_recipe() -> Callable[..., Path]:
    """The recipe, imported once the libraries below it are told to speak of errors only."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # its level it sets itself
    from transformers.utils.logging import set_verbosity_error

    from examples.echovlm.recipe import run

    set_verbosity_error()
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.echovlm",
        description="The two-stage EchoVLM recipe: cases, base, stage I, stage II, evaluation, routing figure.",
        epilog="example: python -m examples.echovlm --preset tiny --cases cases.jsonl --base Qwen2-VL-7B --out run",
    )
    parser.add_argument("--preset", required=True, help="tiny, paper, or the path of a YAML file that extends one")
    parser.add_argument("--cases", type=Path, help="your cases (docs/cases.md); phantoms are rendered without it")
    parser.add_argument("--base", type=Path, help="checkpoint directory; a small base is made without it")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything the run writes; empty or new")
    return parser


def _check_paths(options: argparse.Namespace) -> None:
    if options.cases and not options.cases.is_file():
        raise MoEAdapterError(f"--cases {options.cases}: no such file; expected a JSONL file of cases (docs/cases.md)")
    if options.base and not (options.base / "config.json").is_file():
        raise MoEAdapterError(
            f"--base {options.base}: got no checkpoint directory; expected one that holds config.json"
        )
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise MoEAdapterError(f"--out {options.out}: it is not empty; name a new folder, so that no run is overwritten")


if __name__ == "__main__":
    sys.exit(main())
