"""`moe-adapter report`: a record as one page to explore in a browser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._options import add_record, add_resampling, loading, resampling_of
from moe_adapter.analysis.commands._output import note, print_written
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from moe_adapter.analysis.reader import RoutingRecord

EXAMPLES = (
    "moe-adapter report routing.parquet -o report.html",
    "moe-adapter report routing.parquet -o report.html --cases answers.jsonl --model Qwen2-VL-7B",
)
TEXTS = ("prompt", "answer", "reference", "response", "findings", "impression")


def add(subparsers: Any) -> None:
    parser = command(subparsers, "report", run, help="a record as one HTML page to explore", examples=EXAMPLES)
    add_record(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page, over an old one")
    parser.add_argument(
        "--cases",
        type=Path,
        metavar="FILE",
        help="JSONL of cases to show: id, images, texts; those not recorded stay out",
    )
    parser.add_argument(
        "--texts", nargs="+", metavar="FIELD", help=f"fields of --cases to show (default: {', '.join(TEXTS)})"
    )
    parser.add_argument(
        "--model", help="whose processor lays experts over images and names tokens: a directory, or a name on the hub"
    )
    parser.add_argument("--title", help="of the page")
    add_resampling(parser)


def run(options: argparse.Namespace) -> None:
    from moe_adapter.analysis.page import write_report
    from moe_adapter.analysis.reader import RoutingRecord

    record, resampling = RoutingRecord.open(options.record), resampling_of(options)
    tokenizer, grids_of = _reading(options) if options.model else (None, None)
    cases = _cases(record, grids_of, options) if options.cases else None
    path = write_report(
        record, options.output, cases=cases, tokenizer=tokenizer, title=options.title, resampling=resampling
    )
    print_written([path], options)


def _reading(options: argparse.Namespace) -> tuple[Any, Callable[[list], list]]:
    """The model's tokenizer, and what tells the grids of images."""
    with loading(options) as pretrained:
        processor = pretrained.load_processor(options.model)
        return pretrained.tokenizer_of(processor), partial(pretrained.image_grids, processor)


def _cases(
    record: RoutingRecord, grids_of: Callable[[list], list] | None, options: argparse.Namespace
) -> dict[str, Mapping[str, Any]]:
    """What the page shows of each recorded case: its images with their grids, and its texts.

    Raises:
        MoEAdapterError: none of the cases was recorded, or one has images without a model to cut them.
    """
    from moe_adapter.analysis.prompts import case_images, open_image, read_lines

    images = case_images(options.cases)
    wanted = options.texts or TEXTS
    lines = [line for _, line in read_lines(options.cases)]
    recorded = set(record.count(["case"])["case"].to_pylist())
    if not recorded & images.keys():
        raise MoEAdapterError(f"{record.name} has none of the cases of {options.cases}: name recorded ones.")
    if others := images.keys() - recorded:
        note(f"{len(others)} of the {len(images)} cases were not recorded and are left out")
    cases = {}
    for (case, paths), line in zip(images.items(), lines, strict=True):
        if case not in recorded:
            continue
        frames = list(map(open_image, paths))
        if frames and grids_of is None:
            raise MoEAdapterError(f"{options.cases} has images: name the --model that cuts them into patches.")
        grids = grids_of(frames) if frames and grids_of else []
        texts = {name: line[name] for name in wanted if isinstance(line.get(name), str)}
        cases[case] = {"frames": frames, "grids": grids, "texts": texts}
    return cases
