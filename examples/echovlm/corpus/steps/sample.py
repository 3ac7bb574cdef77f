"""`sample`: instances drawn so that rare organs are not drowned."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.steps import step


def add(subparsers: Any) -> None:
    parser = step(
        subparsers,
        "sample",
        run,
        help="a sample of instances, organs by count^temperature and weight",
        examples=["sample judged --out sampled --total 5000 --temperature 0.5 --weight vessel=2"],
    )
    parser.add_argument("instances", type=Path, nargs="+", help="folders of earlier steps, or files of instances")
    parser.add_argument("--out", type=Path, required=True, help="folder for instances.jsonl and the manifest")
    parser.add_argument("--total", type=int, required=True, help="instances to draw; none is drawn twice")
    parser.add_argument("--temperature", type=float, default=1.0, help="1: as they are, 0: equal (default: 1)")
    parser.add_argument("--weight", action="append", default=[], metavar="ORGAN=NUMBER", help="may be given repeatedly")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    from examples.echovlm.corpus.instances import INSTANCES, read_instances, write_instances
    from examples.echovlm.corpus.manifest import Manifest
    from examples.echovlm.corpus.options import file_of, tell
    from examples.echovlm.corpus.sampling import balanced

    instances = read_instances(*(file_of(path, INSTANCES) for path in options.instances))
    settings = {"temperature": options.temperature, "weights": _weights(options.weight), "seed": options.seed}
    organs = [instance.organ for instance in instances]
    drawn = set(balanced(organs, options.total, **settings, repeat=False))
    manifest = Manifest(step="sample", given=len(instances), settings=settings | {"total": options.total})
    manifest.keep(len(drawn))
    for index, instance in enumerate(instances):
        if index not in drawn:
            manifest.drop(instance.id, "not drawn")
    write_instances(options.out / INSTANCES, [instances[index] for index in sorted(drawn)])
    manifest.write(options.out)
    tell(manifest, options.out)


def _weights(texts: list[str]) -> dict[str, float]:
    from moe_adapter.errors import MoEAdapterError

    try:
        return {name: float(number) for name, number in (text.rsplit("=", 1) for text in texts)}
    except ValueError:
        raise MoEAdapterError(f"--weight: got {', '.join(texts)}; expected ORGAN=NUMBER, such as vessel=2") from None
