"""`judge`: a language model scores the open-ended instances by a rubric."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    from examples.echovlm.corpus.options import add_server

    server = "--base-url http://localhost:8000/v1 --model Qwen2.5-72B"
    parser = step(
        subparsers,
        "judge",
        run,
        help="open-ended instances scored by a language model; those that pass are kept",
        examples=[f"judge generated --cases clean --out judged {server}"],
    )
    parser.add_argument("instances", type=Path, nargs="+", help="folders of earlier steps, or files of instances")
    parser.add_argument(
        "--cases", type=Path, required=True, help="what they were generated from: a folder or a case file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for instances.jsonl, the journal, the manifest")
    parser.add_argument("--threshold", type=int, choices=range(1, 6), default=4, help="lowest score of 5 (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    add_server(parser, temperature=0.0, max_tokens=512)


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.instances import INSTANCES
    from examples.echovlm.corpus.judging import judge
    from examples.echovlm.corpus.options import file_of, server_of, tell
    from examples.echovlm.corpus.store import CASES

    server, seed = server_of(options), options.seed
    instances, cases = [file_of(path, INSTANCES) for path in options.instances], file_of(options.cases, CASES)
    manifest = judge(instances, cases, options.out, server, threshold=options.threshold, seed=seed)
    tell(manifest, options.out)
