"""The recipe's command line: python -m examples.echovlm --preset tiny --out DIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safetensors import SafetensorError

from examples.echovlm.command_line import fail, load_recipe, processes
from examples.echovlm.config import ACCOUNT, load_preset
from moe_adapter import MoEAdapterError
from moe_adapter.directory import INDEX


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 2 with one clear line for what the user got wrong."""
    options = _parser().parse_args(arguments)
    try:
        _check_paths(options)
        config = load_preset(options.preset)
        run = load_recipe()
        with processes():
            run(config, cases_file=options.cases, base=options.base, out=options.out, stage1_from=options.stage1)
    except MoEAdapterError as error:
        return fail(error)
    except (OSError, SafetensorError) as error:
        if "No space left" not in str(error):
            raise
        return fail(f"{error}: make room on the disk of {options.out}, and go on with --resume")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.echovlm",
        description="The two-stage EchoVLM recipe: cases, base, stage I, stage II, evaluation, routing figure.",
        epilog="example: python -m examples.echovlm --preset tiny --cases cases.jsonl --base Qwen2-VL-7B --out run",
    )
    presets = "tiny, grid, small, paper, or the path of a YAML file that extends one"
    parser.add_argument("--preset", required=True, help=presets)
    parser.add_argument("--cases", type=Path, help="your cases (docs/cases.md); phantoms are rendered without it")
    parser.add_argument("--base", type=Path, help="checkpoint directory; a small base is made without it")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything the run writes; empty or new")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if one was begun there")
    parser.add_argument("--stage1", type=Path, help="a run's stage1 folder, to go on from in place of training stage I")
    return parser


def _check_paths(options: argparse.Namespace) -> None:
    if options.cases and not options.cases.is_file():
        raise MoEAdapterError(f"--cases {options.cases}: no such file; expected a JSONL file of cases (docs/cases.md)")
    if options.base and not (options.base / "config.json").is_file():
        raise MoEAdapterError(
            f"--base {options.base}: got no checkpoint directory; expected one that holds config.json"
        )
    if options.stage1 and not (options.stage1 / INDEX).is_file():
        raise MoEAdapterError(f"--stage1 {options.stage1}: got no adapter; expected a folder that holds {INDEX}")
    begun = options.resume and (options.out / ACCOUNT).is_file()
    if not begun and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise MoEAdapterError(f"--out {options.out}: it is not empty; name a new folder, so that no run is overwritten")


if __name__ == "__main__":
    sys.exit(main())
