"""`moe-adapter gradcam`: which parts of the images spoke for a phrase of the answer, as in the paper's Figure 6."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._options import add_model, at_least, loading
from moe_adapter.analysis.commands._output import as_json

EXAMPLES = (
    "moe-adapter gradcam Qwen2-VL-7B --adapter runs/a --image 1.png --prompt 'Describe.' --phrase cyst -o cam.png",
    "moe-adapter gradcam Qwen2-VL-7B --image 1.png 2.png --prompt 描述。 --answer 无回声囊肿 --phrase 囊肿 -o cam.pdf",
)


def add(subparsers: Any) -> None:
    help = "which parts of the images spoke for a phrase of the answer"
    parser = command(subparsers, "gradcam", run, help=help, examples=EXAMPLES)
    add_model(parser)
    parser.add_argument("--image", nargs="+", type=Path, required=True, metavar="FILE", help="images of the prompt")
    parser.add_argument("--prompt", required=True, help="what to ask about them")
    parser.add_argument("-o", "--output", type=Path, action="append", required=True, help="pdf, png or svg by its name")
    answer = parser.add_argument_group("answer")
    answer.add_argument("--answer", metavar="TEXT", help="what it should have been (default: the model's own, greedy)")
    answer.add_argument(
        "--max-new-tokens", type=at_least(1), default=128, metavar="N", help="of its own (default: 128)"
    )
    part = answer.add_mutually_exclusive_group()
    part.add_argument("--phrase", help="its first occurrence in the answer (default: the whole answer)")
    part.add_argument(
        "--token", type=at_least(0), nargs="+", metavar="N", help="tokens of the answer by number, from 0"
    )
    layer = "merger, vision.K, a number K for a block of the language model, or a module's name (default: merger)"
    parser.add_argument("--layer", default="merger", metavar="NAME", help=layer)


def run(options: argparse.Namespace) -> None:
    with loading(options) as pretrained:
        from moe_adapter.analysis.gradcam import find_phrase, grad_cam, gradcam_figure
        from moe_adapter.analysis.prompts import open_image

        frames = list(map(open_image, options.image))
        place = dict(adapter=options.adapter, dtype=options.dtype, device=options.device)
        processor, model = pretrained.load_processor(options.model), pretrained.load_model(options.model, **place)
        tokenizer = pretrained.tokenizer_of(processor)
        content = [*({"type": "image", "image": frame} for frame in frames), {"type": "text", "text": options.prompt}]
        inputs = pretrained.encode(model, processor, [[{"role": "user", "content": content}]], answered=False)
        ids = pretrained.answer_to(model, tokenizer, inputs, options.answer, options.max_new_tokens)
        positions = options.token if options.phrase is None else find_phrase(tokenizer, ids, options.phrase)
        layer = int(options.layer) if options.layer.lstrip("-").isdigit() else options.layer
        maps = grad_cam(model, inputs, ids, positions, layer=layer)
    texts = [tokenizer.decode([number]) for number in ids]
    chosen = list(range(len(ids))) if positions is None else positions
    phrase = tokenizer.decode([ids[position] for position in chosen], skip_special_tokens=True).strip()
    figure = gradcam_figure(frames, maps, phrase=options.phrase or phrase)
    _print(_save(figure, options), tokenizer.decode(ids, skip_special_tokens=True), texts, chosen, maps, options)


def _save(figure: Any, options: argparse.Namespace) -> list[Path]:
    from moe_adapter.analysis.commands.routing_plot import save

    return [path for output in options.output for path in save(figure, output)]


def _print(
    written: list[Path], answer: str, tokens: list[str], chosen: list[int], maps: list, options: argparse.Namespace
) -> None:
    if options.json:
        facts = {"answer": answer, "tokens": tokens, "positions": chosen, "layer": options.layer}
        grids = [each.tolist() for each in maps]
        print(as_json({"written": list(map(str, written)), **facts, "maps": grids}))
        return
    print(f"answer: {answer}")
    print("tokens: " + " ".join(f"{number}:{text!r}" for number, text in enumerate(tokens)))
    for path, heat in zip(options.image, maps, strict=True):
        row, column = divmod(int(heat.argmax()), heat.shape[1])
        print(f"{path}: largest in row {row + 1} of {heat.shape[0]}, column {column + 1} of {heat.shape[1]}")
    print(*written, sep="\n")
