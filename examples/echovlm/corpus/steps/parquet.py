"""`pack` and `unpack`: cases with their frames as one Parquet file, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    parser = step(
        subparsers, "pack", pack, help="cases and frames into Parquet", examples=["pack clean --out c.parquet"]
    )
    parser.add_argument("cases", type=Path, nargs="+", help="folders of earlier steps, or case files")
    parser.add_argument("--out", type=Path, required=True, help="the Parquet file")
    parser = step(subparsers, "unpack", unpack, help="Parquet into a case file", examples=["unpack c.parquet --out c"])
    parser.add_argument("file", type=Path, help="a Parquet file of pack")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for cases and frames")


def pack(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.parquet import write_parquet
    from examples.echovlm.corpus.store import read_corpus

    corpus = read_corpus(options.cases, seen_from=options.out.parent)
    write_parquet(corpus, options.out)
    print(f"pack: {len(corpus.cases)} cases; {options.out}")


def unpack(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.parquet import read_parquet
    from examples.echovlm.corpus.store import new_folder

    print(f"unpack: {len(read_parquet(options.file, new_folder(options.out)))} cases; {options.out}")
