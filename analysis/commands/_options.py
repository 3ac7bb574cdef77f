"""What several commands ask for in the same words: a model, an injection, a record, its part, how sure to be."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_adapter.analysis.commands import quiet_libraries
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    import pyarrow.compute as pc

    from moe_adapter.analysis.reader import RoutingRecord
    from moe_adapter.analysis.resampling import Resampling

MODALITIES = ("prompt", "image", "video", "audio", "generated")  # schema.MODALITIES, which would load pyarrow


def add_injection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("injection")
    group.add_argument("--target", default="mlp", help="which blocks: mlp, a suffix of names or a regex (default: mlp)")
    group.add_argument(
        "--expert-dim", type=_width, metavar="F", help="a routed expert's width, or its share: 1408, 1/16"
    )
    group.add_argument("--shared-expert-dim", type=_width, metavar="F", help="the shared expert's, in the same way")
    group.add_argument("--budget", metavar="N", help="widths from a number of new parameters, such as 200M")
    group.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of DualPathConfig")


def injection_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of DualPathConfig that the options name."""
    changes: dict[str, Any] = {}
    for setting in options.set:
        field, equals, value = setting.partition("=")
        if not equals:
            options.usage_error(f"--set {setting}: expected FIELD=VALUE")
        try:
            changes[field] = json.loads(value)
        except json.JSONDecodeError:
            changes[field] = value
    widths = {"expert_dim": options.expert_dim, "shared_expert_dim": options.shared_expert_dim}
    return changes | {name: width for name, width in widths.items() if width is not None}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's directory, or a name on the hub")
    group = parser.add_argument_group("model")
    group.add_argument("--adapter", help="a directory of save_adapter, or a repository on the hub")
    add_placement(group)


def add_placement(group: Any) -> None:
    dtypes = ("auto", "float32", "bfloat16", "float16")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: the checkpoint's)")
    group.add_argument("--device", help="cpu, cuda:1, or auto to spread over GPUs (default: cuda where there is one)")


@contextmanager
def loading(options: argparse.Namespace) -> Iterator[Any]:
    """The module `integrations.pretrained`, while libraries are quiet and show no bars of their own under --json."""
    with quiet_libraries():
        from transformers.utils import logging

        from moe_adapter.integrations import pretrained

        bars = logging.is_progress_bar_enabled()
        if bars and not shows_progress(options):
            logging.disable_progress_bar()
        try:
            yield pretrained
        finally:
            if bars:
                logging.enable_progress_bar()


def shows_progress(options: argparse.Namespace) -> bool:
    return sys.stderr.isatty() and not options.json


def add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "record",
        nargs="+",
        type=Path,
        metavar="RECORD",
        help="a record's Parquet file; several are parts of one, as each process wrote them",
    )


def add_part(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("part of the record")
    group.add_argument("--layers", nargs="+", type=at_least(0), metavar="N", help="these layers alone, from 0")
    group.add_argument("--groups", nargs="+", metavar="NAME", help="these groups alone")
    group.add_argument("--modalities", nargs="+", choices=MODALITIES, metavar="M", help=", ".join(MODALITIES))


def part_of(options: argparse.Namespace, *records: RoutingRecord) -> pc.Expression | None:
    """The filter that --layers, --groups and --modalities mean; None for all.

    Raises:
        MoEAdapterError: a record has no such layer, or no such group.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for record in records:
        known = {"layer": range(len(record.facts.layers)), "group": record.facts.groups}
        for name, given in (("layer", options.layers), ("group", options.groups)):
            if unknown := [value for value in given or () if value not in known[name]]:
                there = ", ".join(map(str, sorted(known[name])))
                raise MoEAdapterError(f"{record.name} has no {name} {unknown[0]}; it has {there}.")
    where = None
    kinds = {"layer": pa.int16(), "group": pa.string(), "modality": pa.string()}
    for name, given in zip(kinds, (options.layers, options.groups, options.modalities), strict=True):
        if given:
            chosen = pc.field(name).isin(pa.array(given, kinds[name]))
            where = chosen if where is None else where & chosen
    return where


def add_resampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("uncertainty over cases")
    group.add_argument("--resamples", type=at_least(1), default=1000, help="of the bootstrap (default: 1000)")
    group.add_argument("--permutations", type=at_least(1), default=999, help="of the tests (default: 999)")
    group.add_argument("--level", type=float, default=0.95, help="of confidence intervals (default: 0.95)")
    group.add_argument("--seed", type=a_seed, default=0, help="of both (default: 0)")


def resampling_of(options: argparse.Namespace) -> Resampling:
    from moe_adapter.analysis.resampling import Resampling

    names = ("resamples", "permutations", "level", "seed")
    return Resampling(**{name: getattr(options, name) for name in names})


def call(function: str, record: RoutingRecord, arguments: Mapping[str, Any]) -> Any:
    """A function of the analysis by its module and name, such as "figures.figure5", of the record."""
    module, _, name = function.partition(".")
    return getattr(importlib.import_module(f"moe_adapter.analysis.{module}"), name)(record, **arguments)


def at_least(least: int) -> Callable[[str], int]:
    """A number that argparse takes from `least` on."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least {least}")
        return int(text)

    return number


def a_seed(text: str) -> int:
    """A number that argparse takes, and torch for a seed."""
    if (seed := at_least(0)(text)) >= 2**64:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 64 bits")
    return seed


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raises MoEAdapterError: the file is there and isn't to be overwritten, or it is a directory."""
    if path.is_dir():
        raise MoEAdapterError(f"{path} is a directory; expected a file's name.")
    if path.exists() and not overwrite:
        raise MoEAdapterError(f"{path} is there already; give another name, or --overwrite.")


def _width(text: str) -> int | float:
    """A number of units, or a share: 1408, 0.25, 1/16."""
    try:
        return int(text) if text.isdigit() else float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number or a share: 1408, 0.25, 1/16") from None
