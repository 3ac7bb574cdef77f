"""`filter-texts`: reports that are about the region of their case."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    examples = ["filter-texts images --out texts"]
    parser = step(subparsers, "filter-texts", run, help="keep reports on the region of their case", examples=examples)
    parser.add_argument("cases", type=Path, nargs="+", help="folders of earlier steps, or case files")
    parser.add_argument("--out", type=Path, required=True, help="a new folder; the frames stay where they are")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.options import tell
    from examples.echovlm.corpus.store import new_folder, read_corpus
    from examples.echovlm.corpus.text_filter import filter_texts

    corpus = read_corpus(options.cases, seen_from=options.out)
    tell(filter_texts(corpus, new_folder(options.out)), options.out)
