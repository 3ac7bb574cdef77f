"""`python -m tests.matrix`: injection checked on every architecture that transformers holds."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from tests.matrix.build import MODEL_TYPES
from tests.matrix.page import page, summary
from tests.matrix.runner import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODEL_TYPES, metavar="NAME", help="these model types alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page of results here")
    options = parser.parse_args()
    start, outcomes = time.monotonic(), []
    for outcome in run(options.only or list(MODEL_TYPES), options.jobs):
        outcomes.append(outcome)
        print(f"{outcome.model_type:32} {outcome.status:10} {outcome.reason}", flush=True)
    outcomes.sort(key=lambda outcome: outcome.model_type)
    print(f"{summary(outcomes)} ({time.monotonic() - start:.0f} s)")
    if options.write:
        options.write.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
