"""`python -m benchmarks`: measure, and write benchmarks/results/<machine>.md with its figure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import dispatch, measure, page, recording
from benchmarks.gate import GateError
from benchmarks.shapes import FINE, LARGE, SMALL, TOY, Shape
from moe_adapter.backends import doctor

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 1 where a subject computes something else."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--name", required=True, help="of the machine: the page becomes results/NAME.md")
    parser.add_argument("--seconds", type=float, default=20, help="for each table's column (default 20)")
    parser.add_argument("--toy", action="store_true", help="minuscule sizes, to try the script itself")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page and the figure")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        text = run(options.seconds, options.out / f"{options.name}.png", toy=options.toy)
    except GateError as error:
        print(f"No table: {error}.", file=sys.stderr)
        return 1
    (options.out / f"{options.name}.md").write_text(text)
    return 0


def run(seconds: float, figure: Path, *, toy: bool) -> str:
    """All sections as a page; prints each when it is done."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtypes = (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16)
    backends = ["auto"] + [name for name in ("lean", "megablocks") if cuda and doctor()[name] == "available"]
    large, small, fine = (TOY, TOY, TOY.of(experts=8, top_k=4)) if toy else (LARGE, SMALL, FINE)
    if cuda and not toy:
        large, small = large.of(tokens=8192), small.of(tokens=8192)
    tokens = (16, 64) if toy else (large.tokens,) if cuda else (512, 2048)
    parts = [page.header()]

    def add(text: str) -> None:
        print(text, flush=True)
        parts.append(text)

    for shape in (small, large):
        columns, decode, routed = {}, {}, {}
        for dtype in dtypes:
            like, name = torch.empty(0, dtype=dtype, device=device), str(dtype).removeprefix("torch.")
            for count in tokens:
                times = measure.layer_times(shape.of(tokens=count), like, backends, seconds)
                columns |= {f"{name}, {count} tokens, {what}": found for what, found in times.items()}
                routed[f"{name}, {count} tokens"] = measure.routed_times(
                    shape.of(tokens=count), like, backends, seconds
                )
            decode[name] = measure.decode_times(shape, like, backends, seconds)
        sizes = f"hidden {shape.hidden}, static {shape.static}, shared {shape.shared}, "
        experts = f"{shape.experts} experts of {shape.expert}, top-{shape.top_k}"
        add(page.table(f"Whole layer: {sizes}{experts}", columns))
        add(page.table(f"Decoding, one token: {sizes}{experts}", decode))
        add(page.table(f"Routed experts, training step: hidden {shape.hidden}, {experts}", routed))
    like = torch.empty(0, dtype=dtypes[0], device=device)
    add(
        page.table(
            f"Fine-grained, training step: {fine.routed}", {"": measure.routed_times(fine, like, backends, seconds)}
        )
    )
    add(_memory(large, small, dtypes, device))
    add(_rest(small, large if cuda else small, like, ["auto", "grouped_mm", "eager"], seconds))
    add(_recording(small.of(tokens=min(small.tokens, 512)), like, seconds))
    sweeps = _sweeps(fine, like, backends, seconds / 4, toy=toy)
    page.scaling_figure(sweeps, figure)
    image = f"![Training step over the ideal]({figure.name})"
    add(f"## Scaling of the routed part\n\n{image}\n\n{fine.routed}, one of them varied.\n")
    return "\n".join(parts)


def _memory(large: Shape, small: Shape, dtypes: tuple[torch.dtype, ...], device: torch.device) -> str:
    lines = ["## Memory kept for backward\n", "| | bytes a token | of the sorted loop's |", "| --- | ---: | ---: |"]
    for shape in (small.of(tokens=256), large.of(tokens=256)):
        for dtype in dtypes:
            ours, loop = measure.saved_bytes(shape, torch.empty(0, dtype=dtype, device=device), "auto").values()
            name = f"hidden {shape.hidden}, {str(dtype).removeprefix('torch.')}"
            lines.append(f"| {name} | {ours / shape.tokens:,.0f} | {ours / loop:.2f} |")
    return "\n".join(lines) + "\n"


def _rest(small: Shape, shape: Shape, like: torch.Tensor, backends: list[str], seconds: float) -> str:
    router = dispatch.router_share(shape, like, seconds)
    backend, share = dispatch.dispatch_share(shape, like, seconds)
    steps = measure.model_step_times(small.of(tokens=min(small.tokens, 512)), like, backends, seconds)
    unit = steps["auto"].median
    cells = ", ".join(f"{name} {time.median / unit:.2f} ± {time.spread / unit:.2f}" for name, time in steps.items())
    return (
        f"## Router and whole step\n\nThe router takes {router:.1%} of the layer's forward ({shape.layer}). Sorting, "
        f"gathering rows and combining take {share:.1%} of its training step with `{backend}`, which `auto` is here. A "
        f"training step of a two-layer Qwen2 of hidden {small.hidden}, over `auto`'s: {cells}.\n"
    )


def _recording(shape: Shape, like: torch.Tensor, seconds: float) -> str:
    times = recording.recording_times(shape, like, seconds)
    plain = times.pop(recording.PLAIN)
    cells = (f"`{name}` {t.median / plain.median:.3f} ± {t.spread / plain.median:.3f}" for name, t in times.items())
    return (
        f"## Recording\n\n{recording.FORWARDS} forwards of a Qwen2 of {recording.LAYERS} layers, hidden "
        f"{shape.hidden}, {shape.tokens} tokens, over the same forwards alone "
        f"(± {plain.spread / plain.median:.3f}): {', '.join(cells)}.\n"
    )


def _sweeps(fine: Shape, like: torch.Tensor, backends: list[str], seconds: float, *, toy: bool) -> dict:
    tokens = (8, 32) if toy else (16, 64, 256, 1024, 4096)
    experts = (4, 8) if toy else (8, 16, 32, 64, 128)
    top_k = (1, 2) if toy else (1, 2, 4, 8, 16)
    return {
        "tokens": {n: measure.routed_times(fine.of(tokens=n), like, backends, seconds) for n in tokens},
        "experts": {n: measure.routed_times(fine.of(experts=n), like, backends, seconds) for n in experts},
        "top-k": {n: measure.routed_times(fine.of(top_k=n), like, backends, seconds) for n in top_k},
    }


if __name__ == "__main__":
    sys.exit(main())
