"""`generate`: a language model writes questions and answers about the cases' reports."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    from examples.echovlm.corpus.options import add_server

    server = "--base-url http://localhost:8000/v1 --model Qwen2.5-72B"
    examples = [
        f"generate clean --out generated {server}",
        f"generate clean --out again --again reviewed/again.jsonl {server}",
    ]
    parser = step(
        subparsers,
        "generate",
        run,
        help="instances written by a language model by the expert templates; goes on where it was ended",
        examples=examples,
    )
    parser.add_argument("cases", type=Path, help="folder of an earlier step, or a case file (docs/cases.md)")
    parser.add_argument("--out", type=Path, required=True, help="folder for instances.jsonl, the journal, the manifest")
    parser.add_argument("--kinds", nargs="+", choices=("open", "closed"), default=["open", "closed"])
    parser.add_argument(
        "--templates", type=int, default=1, help="of an organ's three, drawn for each case (default: 1)"
    )
    parser.add_argument("--frames", type=int, default=0, help="of a case that the model sees (default: 0, the report)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="again.jsonl of a review: its sources alone, once more")
    add_server(parser)


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.generation import Choice, generate
    from examples.echovlm.corpus.options import file_of, server_of, tell
    from examples.echovlm.corpus.store import CASES

    choice = Choice(kinds=tuple(options.kinds), templates=options.templates, frames=options.frames, seed=options.seed)
    cases = file_of(options.cases, CASES)
    tell(generate(cases, options.out, server_of(options), choice, options.again), options.out)
