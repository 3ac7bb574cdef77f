"""`deduplicate`: instances that nearly repeat an earlier one are left out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.echovlm.corpus.steps import step

if TYPE_CHECKING:
    from examples.echovlm.corpus.deduplication import RougeL, SimHash
    from examples.echovlm.corpus.deduplication.ordered import Index

SETTINGS = {"rouge-l": ("threshold",), "simhash": ("distance", "features")}


def add(subparsers: Any) -> None:
    parser = step(
        subparsers,
        "deduplicate",
        run,
        help="instances without those that nearly repeat an earlier one (docs/deduplication.md)",
        examples=[
            "deduplicate generated --out unique",
            "deduplicate monday.jsonl --out monday --against kept --state seen.npz",
            "deduplicate generated --out unique --method simhash --features char-4",
        ],
    )
    parser.add_argument("instances", type=Path, help="folder of an earlier step, or JSONL of instances")
    parser.add_argument("--out", type=Path, required=True, help="folder for instances.jsonl and the manifest")
    parser.add_argument("--method", choices=tuple(SETTINGS), default="rouge-l")
    parser.add_argument("--against", choices=("prior", "kept"), default="prior", help="all before it, or the kept")
    parser.add_argument("--tokenizer", choices=("character", "jieba"), default="character", help="of Chinese text")
    parser.add_argument("--threshold", type=float, help="of ROUGE-L F1; a pair at it is no duplicate (default: 0.7)")
    parser.add_argument("--distance", type=int, help="of SimHash, in bits; a pair at it is a duplicate (default: 3)")
    parser.add_argument("--features", help="of SimHash: word-N or char-N (default: word-2)")
    parser.add_argument("--state", type=Path, help="earlier batches: read if it is there, and brought up to date")
    parser.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="search on a Ray cluster, or here")


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.deduplication import Deduplicator, read_instances
    from examples.echovlm.corpus.deduplication.state import load_state, save_state
    from examples.echovlm.corpus.instances import INSTANCES
    from examples.echovlm.corpus.manifest import Manifest
    from examples.echovlm.corpus.options import file_of, tell
    from examples.echovlm.files import replaced
    from moe_adapter.errors import MoEAdapterError

    source, out = file_of(options.instances, INSTANCES), options.out / INSTANCES
    if source.resolve() == out.resolve():
        raise MoEAdapterError(f"--out {options.out}: the instances are read from there; name another folder")
    deduplicator = Deduplicator(_measure(options), against=options.against, index=_index(options))
    if options.state and options.state.exists():
        load_state(deduplicator, options.state)
    earlier, without_tokens = len(deduplicator.ids), deduplicator.without_tokens
    manifest = Manifest(step="deduplicate", given=0, settings=deduplicator.describe())
    with replaced(out) as file:
        for instance, drop in deduplicator.verdicts(read_instances(source)):
            manifest.given += 1
            if drop is None:
                manifest.keep()
                file.write(f"{instance.line}\n".encode())
            else:
                manifest.drop(
                    drop.id,
                    drop.reason,
                    language=instance.language,
                    duplicate_of=drop.duplicate_of,
                    score=round(drop.score, 4),
                )
    kept_without_tokens = deduplicator.without_tokens - without_tokens
    manifest.more = {"earlier instances": earlier, "kept without tokens": kept_without_tokens}
    manifest.write(options.out)
    if options.state:
        save_state(deduplicator, options.state)  # last: after a kill the same command starts from the old one
    tell(manifest, options.out)


def _measure(options: argparse.Namespace) -> RougeL | SimHash:
    from examples.echovlm.corpus.deduplication import RougeL, SimHash
    from examples.echovlm.corpus.deduplication.errors import DeduplicationError

    for method, names in SETTINGS.items():
        for name in names:
            if method != options.method and getattr(options, name) is not None:
                raise DeduplicationError(f"--{name}: it means nothing to --method {options.method}; leave it out")
    names = SETTINGS[options.method]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return (RougeL if options.method == "rouge-l" else SimHash)(tokenizer=options.tokenizer, **given)


def _index(options: argparse.Namespace) -> Index:
    from examples.echovlm.corpus.deduplication.ordered import Index

    if options.ray is None:
        return Index()
    from examples.echovlm.corpus.deduplication.cluster import RayIndex

    return RayIndex(options.ray)
