"""`filter-images`: images of one scan, of one part of the body."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step

FILTERS = ("anatomy", "display")


def add(subparsers: Any) -> None:
    examples = ["filter-images raw --out images", "filter-images raw-a raw-b --filters display --out images"]
    parser = step(subparsers, "filter-images", run, help="keep images of one scan, of one region", examples=examples)
    parser.add_argument("cases", type=Path, nargs="+", help="folders of imports, or case files")
    parser.add_argument("--out", type=Path, required=True, help="a new folder; the frames stay where they are")
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=FILTERS, help="both by default")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.image_filter import filter_images
    from examples.echovlm.corpus.options import tell
    from examples.echovlm.corpus.store import new_folder, read_corpus

    corpus = read_corpus(options.cases, seen_from=options.out)
    tell(filter_images(corpus, new_folder(options.out), filters=options.filters), options.out)
