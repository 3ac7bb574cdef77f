"""Figure 6: which parts of a case's frames spoke for a phrase of the answer, with the expert's boxes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.echovlm.figures import figure, save
from examples.echovlm.figures.generic import find_case
from examples.echovlm.figures.runs import Run
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from moe_adapter.analysis.gradcam import Box


def add(subparsers: Any) -> None:
    parser = figure(
        subparsers,
        "gradcam",
        run,
        help="Figure 6: what the model looked at, by Grad-CAM",
        examples=[
            "gradcam runs/tiny --case liver-0003 --phrase cyst --red 60,40,110,90 --blue 2:50,45,99,90 -o figure6.pdf"
        ],
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--case", metavar="ID", help="a held-out or show case (default: the first held-out one)")
    parser.add_argument("--phrase", help="a part of the answer (default: all of it)")
    parser.add_argument("--answer", metavar="TEXT", help="what it should have been (default: the model's own, greedy)")
    boxes = "left,top,right,bottom in pixels of a frame, which FRAME: before it names, from 1"
    parser.add_argument("--red", action="append", default=[], metavar="BOX", help=boxes)
    parser.add_argument("--blue", action="append", default=[], metavar="BOX", help="likewise, dashed")
    parser.add_argument("--names", nargs=2, default=("red", "blue"), metavar=("RED", "BLUE"), help="for the legend")
    parser.add_argument("--layer", default="merger", help="as for `moe-adapter gradcam` (default: merger)")


def run(options: argparse.Namespace) -> list[Path]:
    from moe_adapter.analysis.gradcam import find_phrase, grad_cam, gradcam_figure
    from moe_adapter.integrations.pretrained import answer_to

    source = Run(options.run_folder)
    example, _ = find_case(source, options.case)
    given = [read_boxes(texts, len(example.images)) for texts in (options.red, options.blue)]
    boxes = dict(zip(options.names, given, strict=True)) if any(map(any, given)) else None
    model, collator = source.load()
    tokenizer = collator.processor.tokenizer
    inputs = collator.prompts([example]).to(model.device)
    ids = answer_to(model, tokenizer, inputs, options.answer, source.config.evaluation.max_new_tokens)
    positions = find_phrase(tokenizer, ids, options.phrase) if options.phrase else None
    layer = int(options.layer) if options.layer.lstrip("-").isdigit() else options.layer
    maps = grad_cam(model, inputs, ids, positions, layer=layer)
    phrase = options.phrase or tokenizer.decode(ids, skip_special_tokens=True).strip()
    return save(gradcam_figure(example.frames(), maps, phrase=phrase, boxes=boxes), options.output)


def read_boxes(texts: Sequence[str], frames: int) -> list[list[Box]]:
    """The boxes of each frame, from texts such as "60,40,110,90" (of the first) and "2:60,40,110,90".

    Raises: MoEAdapterError for what is no box of one of the frames.
    """
    boxes: list[list[Box]] = [[] for _ in range(frames)]
    for text in texts:
        frame, _, corners = text.rpartition(":")
        try:
            number = int(frame or 1)
            left, top, right, bottom = map(float, corners.split(","))
        except ValueError:
            number, left, top, right, bottom = 0, 0, 0, 0, 0
        if not (1 <= number <= frames and left < right and top < bottom):
            raise MoEAdapterError(
                f"got the box {text!r}; expected left,top,right,bottom in pixels, with FRAME: before it, 1 to {frames}"
            )
        boxes[number - 1].append((left, top, right, bottom))
    return boxes
