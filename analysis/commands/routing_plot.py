"""`moe-adapter routing plot`: a record's figures, Figure 5 of the paper first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._options import add_part, add_record, add_resampling, call, part_of, resampling_of
from moe_adapter.analysis.commands._output import note, print_written
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_adapter.analysis.reader import RoutingRecord

EXAMPLES = (
    "moe-adapter routing plot runs/tiny/routing.parquet --figure 5 -o figure5.pdf",
    "moe-adapter routing plot routing.parquet --figure 5 --by share --groups liver heart -o 5.pdf -o 5.png",
    "moe-adapter routing plot routing.parquet --figure load --modalities image --width single -o load.svg",
    "moe-adapter routing plot routing.parquet --figure all -o figures/",
    "moe-adapter routing plot runs/a/routing/ --figure saturation -o saturation.pdf",
    "moe-adapter routing plot routing.parquet --figure experts --case 17 --cases cases.jsonl --model Qwen2-VL-7B -o 17",
)


class Drawing(NamedTuple):
    """A function of the record, its arguments beside it, and what it shows."""

    function: str
    takes: tuple[str, ...]
    shows: str


FIGURES = {
    "5": Drawing("figures.figure5", ("layer", "groups", "share"), "load of each expert by group, image and text"),
    "heatmap": Drawing("charts.layer_heatmap", ("groups",), "share of each expert by layer, a panel a group"),
    "load": Drawing("charts.stacked_load", ("where",), "load of each layer, stacked"),
    "coactivation": Drawing("charts.coactivation_matrix", ("where",), "which experts a token chooses together"),
    "specialisation": Drawing(
        "charts.specialisation_by_layer", ("where", "resampling"), "what the group tells of the expert, by layer"
    ),
    "alpha": Drawing("charts.path_weights_by_layer", (), "α and λ by layer"),
    "pathways": Drawing("charts.token_pathways", ("where",), "how tokens move from layer to layer"),
    "saturation": Drawing(
        "snapshots.saturation_curve", ("snapshots",), "how early routing settles: RECORD is a folder of snapshots"
    ),
    "experts": Drawing("overlays.expert_map", ("case",), "which expert each patch of a case's images chose"),
}
APART = ("saturation", "experts")  # need something else than the record, or more
OPTIONS = {  # an argument of a figure, and the options that it is made of
    "layer": {"layers"},
    "groups": {"groups"},
    "share": {"by"},
    "where": {"layers", "groups", "modalities"},
    "resampling": set(),
    "snapshots": {"layers", "groups", "modalities"},
    "case": {"layers", "case", "cases", "model"},
}
FORMATS = ("pdf", "png", "svg")
WIDTHS = {"single": 89.0, "double": 183.0}  # mm


def add(subparsers: Any) -> None:
    parser = command(subparsers, "plot", run, help="a record's figures", examples=EXAMPLES)
    names = "\n".join(f"  {name:<16}{drawing.shows}" for name, drawing in FIGURES.items())
    parser.epilog = (
        f"figures:\n{names}\n  {'all':<16}all of these but saturation and experts, into a directory\n\n{parser.epilog}"
    )
    add_record(parser)
    choices = (*FIGURES, "all")
    parser.add_argument("--figure", required=True, choices=choices, metavar="NAME", help=f"{', '.join(choices)}")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        required=True,
        help="the file, by its name pdf, png or svg; pdf and png without one of these; more than once for more",
    )
    parser.add_argument("--by", choices=("count", "share"), help="bars of figure 5 (default: count)")
    parser.add_argument("--width", choices=tuple(WIDTHS), help="of a journal's column, 89 or 183 mm")
    case = parser.add_argument_group("figure experts")
    case.add_argument("--case", metavar="ID", help="the case; the layer is --layers' one, or the last")
    case.add_argument("--cases", type=Path, metavar="FILE", help="JSONL of cases with their images")
    case.add_argument("--model", help="whose processor cuts images into patches: a directory, or a name on the hub")
    add_part(parser)
    add_resampling(parser)


def run(options: argparse.Namespace) -> None:
    _check(options)
    from moe_adapter.analysis.reader import RoutingRecord

    if options.figure == "saturation":
        figure = _saturation(options)
        print_written([path for output in options.output for path in save(figure, output)], options)
        return
    record = RoutingRecord.open(options.record)
    part_of(options, record)  # for its checks
    if options.figure != "all":
        figure = draw(options.figure, record, options)
        print_written([path for output in options.output for path in save(figure, output)], options)
        return
    (folder,) = options.output
    written, left_out = [], {}
    for name in [name for name in FIGURES if name not in APART]:
        try:
            figure = draw(name, record, options)
        except MoEAdapterError as error:
            left_out[name] = str(error)
            note(f"{name} left out: {error}")
        else:
            written += save(figure, folder / (f"figure{name}" if name == "5" else name))
    print_written(written, options, left_out=left_out)


def draw(name: str, record: RoutingRecord, options: argparse.Namespace) -> Figure:
    """The figure of that name, with the arguments that it takes."""
    drawing = FIGURES[name]
    arguments = _width(options)
    if "case" in drawing.takes:
        arguments |= _case(record, options)
    if "resampling" in drawing.takes:
        arguments["resampling"] = resampling_of(options)
    if "where" in drawing.takes:
        arguments["where"] = part_of(options, record)
    offered = {"layer": (options.layers or [None])[0], "groups": options.groups, "share": options.by == "share"}
    arguments |= {argument: value for argument, value in offered.items() if argument in drawing.takes}
    return call(drawing.function, record, arguments)


def save(figure: Figure, output: Path) -> list[Path]:
    """Write a figure in the format of the file's name, or as PDF and PNG where it names none."""
    from moe_adapter.analysis.style import save_figure

    suffix = output.suffix[1:].lower()
    if suffix in FORMATS:
        return save_figure(figure, output.with_suffix(""), [output.suffix[1:]])
    return save_figure(figure, output, ["pdf", "png"])


def _check(options: argparse.Namespace) -> None:
    """Usage: what goes with which figure."""
    if options.figure == "all":
        if len(options.output) > 1 or options.output[0].suffix[1:] in FORMATS:
            options.usage_error("--figure all writes into one directory: give one -o, without a file's ending")
        return
    takes = FIGURES[options.figure].takes
    taken = set().union(*(OPTIONS[argument] for argument in takes))
    for name in sorted(set().union(*OPTIONS.values()) - taken):
        if getattr(options, name):
            options.usage_error(f"--{name} doesn't go with --figure {options.figure}")
    if "snapshots" in takes and (len(options.record) > 1 or not options.record[0].is_dir()):
        options.usage_error("--figure saturation is of one folder of snapshots, as RoutingSnapshots writes them")
    if {"layer", "case"} & set(takes) and options.layers and len(options.layers) > 1:
        options.usage_error(f"--figure {options.figure} shows one layer, or all without --layers")
    if "case" in takes and not (options.case and options.cases and options.model):
        options.usage_error("--figure experts needs --case, --cases and --model")


def _width(options: argparse.Namespace) -> dict[str, float]:
    return {} if options.width is None else {"width_mm": WIDTHS[options.width]}


def _saturation(options: argparse.Namespace) -> Figure:
    from moe_adapter.analysis.saturation import saturation
    from moe_adapter.analysis.snapshots import open_snapshots, saturation_curve

    records = open_snapshots(options.record[0])
    where = part_of(options, *records.values())
    return saturation_curve(saturation(records, where=where, resampling=resampling_of(options)), **_width(options))


def _case(record: RoutingRecord, options: argparse.Namespace) -> dict[str, Any]:
    """The case's images, their grids and the layer."""
    from moe_adapter.analysis.commands._options import loading
    from moe_adapter.analysis.prompts import case_images, open_image

    images = case_images(options.cases)
    if options.case not in images:
        raise MoEAdapterError(f"{options.cases} has no case {options.case!r}; it has {', '.join(list(images)[:5])}, …")
    frames = list(map(open_image, images[options.case]))
    with loading(options) as pretrained:
        grids = pretrained.image_grids(pretrained.load_processor(options.model), frames) if frames else []
    layer = options.layers[0] if options.layers else len(record.facts.layers) - 1
    return {"case": options.case, "frames": frames, "grids": grids, "layer": layer}
