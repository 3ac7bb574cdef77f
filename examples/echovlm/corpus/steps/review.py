"""`review`: experts read a share of the batches on a page of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    common = "review judged --cases clean --out reviewed"
    parser = step(
        subparsers,
        "review",
        run,
        help="a share of the batches read by experts on a local page; --close settles it",
        examples=[f"{common} --reviewer r1", f"{common} --close"],
    )
    parser.add_argument("instances", type=Path, nargs="+", help="folders of earlier steps, or files of instances")
    parser.add_argument(
        "--cases", type=Path, required=True, help="what they were generated from: a folder or a case file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the decisions and, once closed, the result")
    parser.add_argument("--share", type=float, default=0.05, help="of the batches that is read (default: 0.05)")
    parser.add_argument("--size", type=int, default=10, help="instances a batch (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--reviewer", help="who decides, for the audit trail: a pseudonym will do")
    todo.add_argument("--close", action="store_true", help="write instances.jsonl and again.jsonl of a finished review")
    parser.add_argument("--allowed", type=int, default=0, help="rejected instances a batch may have (default: 0)")
    parser.add_argument("--port", type=int, default=0, help="of the page on 127.0.0.1 (default: any that is free)")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.instances import INSTANCES
    from examples.echovlm.corpus.options import file_of, tell
    from examples.echovlm.corpus.review import AGAIN, Draw, Review
    from examples.echovlm.corpus.review_server import make_server
    from examples.echovlm.corpus.store import CASES

    draw = Draw(share=options.share, size=options.size, seed=options.seed)
    instances, cases = [file_of(path, INSTANCES) for path in options.instances], file_of(options.cases, CASES)
    with Review(instances, cases, options.out, draw) as review:
        if options.close:
            manifest = review.close(allowed=options.allowed)
            tell(manifest, options.out)
            if failed := manifest.more["failed"]:
                print(f"{len(failed)} batches failed: generate --again {options.out / AGAIN}")
            return
        server = make_server(review, options.reviewer, options.port)
        print(f"{len(review.drawn)} instances to review at http://127.0.0.1:{server.server_port}/ (Ctrl+C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
