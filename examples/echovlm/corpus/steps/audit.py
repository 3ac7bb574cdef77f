"""`audit`: which model, prompt, seed and reviewer an instance came from, with the text of the prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    parser = step(
        subparsers,
        "audit",
        run,
        help="an instance's model, prompt, seed and reviewer, with what was sent and what came back",
        examples=["audit generated judged reviewed --id liver-0001:liver/report:open:0:diagnosis"],
    )
    parser.add_argument("folders", type=Path, nargs="+", help="of the steps that it went through, in their order")
    parser.add_argument("--id", required=True, nargs="+", help="instances, also such as were dropped")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.audit import told, trail

    print("\n\n".join(told(trail(options.folders, id)) for id in options.id))
