"""`attach`: the accepted instances become their cases' questions, which the recipe trains on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    parser = step(
        subparsers,
        "attach",
        run,
        help="instances written into the case file as its cases' questions",
        examples=["attach reviewed --cases clean --out clean/with-questions.jsonl"],
    )
    parser.add_argument("instances", type=Path, nargs="+", help="folders of earlier steps, or files of instances")
    parser.add_argument(
        "--cases", type=Path, required=True, help="what they were generated from: a folder or a case file"
    )
    parser.add_argument("--out", type=Path, required=True, help="case file to write, in the same folder")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.cases import CaseError, read_cases, write_cases
    from examples.echovlm.corpus.instances import INSTANCES, attach, read_instances
    from examples.echovlm.corpus.options import file_of
    from examples.echovlm.corpus.store import CASES

    source = file_of(options.cases, CASES)
    if options.out.resolve().parent != source.resolve().parent:
        raise CaseError(f"--out {options.out}: expected a file in {source.parent}, where the images' paths begin")
    before = read_cases(source)
    cases = attach(before, read_instances(*(file_of(path, INSTANCES) for path in options.instances)))
    write_cases(options.out, cases)
    added = sum(len(case.questions) for case in cases) - sum(len(case.questions) for case in before)
    print(f"attach: {added} questions added to {len(cases)} cases; {options.out}")
