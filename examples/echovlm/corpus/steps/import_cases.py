"""`import`: hospital exports and open sets become cases."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step

SETS = ("busi", "tn3k", "camus", "echonet", "breastmnist")


def add(subparsers: Any) -> None:
    examples = [
        "import dicom export/ --reports reports.csv --private private --out raw",
        "import folders scans/ --reports reports.jsonl --column findings=描述 --private private --out raw",
        "import busi Dataset_BUSI_with_GT --private private --out busi",
    ]
    parser = step(
        subparsers, "import", run, help="exports and open sets become cases and key frames", examples=examples
    )
    parser.add_argument("kind", choices=("dicom", "folders", *SETS), help="what the source holds")
    parser.add_argument("source", type=Path, help="its folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder for cases and frames; goes on if begun")
    parser.add_argument("--private", type=Path, required=True, help="keeps the salt and which file a case comes from")
    parser.add_argument("--reports", type=Path, help="a .csv or .jsonl file with a report a line")
    parser.add_argument("--column", action="append", default=[], metavar="OURS=YOURS", help="a column's own name")
    parser.add_argument("--encoding", default="utf-8-sig", help="of the reports, such as gb18030; UTF-8 by default")
    parser.add_argument("--frames", type=int, default=2, help="key frames of a cine, evenly spread (default 2)")
    parser.add_argument("--organ", default="", help="of all cases whose report has no organ column")
    parser.add_argument("--hospital", default="", help="a pseudonym for where the cases come from")
    parser.add_argument("--test-share", type=float, default=0.1, help="of the patients (default 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.importing import dicom, folders, open_sets, reports
    from examples.echovlm.corpus.importing.build import ImportSettings, build_cases
    from examples.echovlm.corpus.options import tell
    from examples.echovlm.corpus.pseudonyms import read_salt
    from moe_adapter.errors import MoEAdapterError

    if not options.source.is_dir():
        raise MoEAdapterError(f"{options.source}: no such folder; expected the one that holds the source's files")
    settings = ImportSettings(
        frames=options.frames,
        organ=options.organ,
        hospital=options.hospital,
        test_share=options.test_share,
        seed=options.seed,
    )
    columns = dict(_column(entry) for entry in options.column)
    told = reports.read_reports(options.reports, columns, encoding=options.encoding) if options.reports else []
    left: dict[str, str] = {}
    salt = read_salt(options.private, out=options.out)
    if options.kind == "dicom":
        examinations, structured, left = dicom.read_dicom(options.source, salt)
        told += structured
    elif options.kind == "folders":
        examinations, left = folders.read_folders(options.source)
    else:
        examinations = open_sets.read_open_set(options.kind, options.source)
    paths = dict(out=options.out, private=options.private)
    tell(build_cases(examinations, told, left, **paths, salt=salt, settings=settings), options.out)


def _column(entry: str) -> tuple[str, str]:
    from moe_adapter.errors import MoEAdapterError

    ours, equals, yours = entry.partition("=")
    if not (ours and equals and yours):
        raise MoEAdapterError(f"--column {entry}: expected OURS=YOURS, such as findings=Description")
    return ours, yours
