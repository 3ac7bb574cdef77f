"""`deidentify`: burned-in text masked, identifiers out of the reports."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    examples = ["deidentify texts --out clean", "deidentify texts --blank --out clean"]
    parser = step(subparsers, "deidentify", run, help="mask text in frames, scrub the reports", examples=examples)
    parser.add_argument("cases", type=Path, nargs="+", help="folders of earlier steps, or case files")
    parser.add_argument("--out", type=Path, required=True, help="a folder for cases and frames; goes on if begun")
    parser.add_argument("--blank", action="store_true", help="paint everything outside the scan, not the text alone")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.deidentify import JOURNAL, deidentify
    from examples.echovlm.corpus.options import tell
    from examples.echovlm.corpus.store import new_folder, read_corpus

    corpus = read_corpus(options.cases, seen_from=options.out)
    out = options.out if (options.out / JOURNAL).is_file() else new_folder(options.out)
    tell(deidentify(corpus, out, blank=options.blank), options.out)
