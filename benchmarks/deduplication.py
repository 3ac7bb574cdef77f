"""What deduplication costs: `python -m benchmarks.deduplication` writes benchmarks/results/deduplication.md.

Each measurement is a process of its own on one core, forked once the instances are made, so that its memory is seen.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.instances import REWORDED, generated_instances
from examples.echovlm.corpus.deduplication import Deduplicator, Instance, RougeL, SimHash
from examples.echovlm.corpus.deduplication.tokens import by_character

RESULTS = Path(__file__).parent / "results"
SIZES = (10_000, 50_000, 200_000)
PAPER = 1_800_000  # the instances of the paper, about
SUBJECTS: dict[str, Callable[[], Deduplicator]] = {
    "ROUGE-L > 0.7, any prior": lambda: Deduplicator(RougeL(), against="prior"),
    "ROUGE-L > 0.7, any kept": lambda: Deduplicator(RougeL(), against="kept"),
    "SimHash <= 3 (word-2), any prior": lambda: Deduplicator(SimHash(), against="prior"),
}


@dataclass(frozen=True)
class Cost:
    """CPU seconds, bytes beyond the instances' own at the peak, instances kept."""

    seconds: float
    memory: int
    kept: int


def main(arguments: list[str] | None = None) -> int:
    """Measure every subject at every size, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deduplication", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of instances, ascending")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    options = parser.parse_args(arguments)
    costs: dict[str, dict[int, Cost]] = {name: {} for name in SUBJECTS}
    tokens = 0.0
    for size in options.sizes:
        made = generated_instances(size)
        tokens = sum(len(by_character(instance.text)) for instance in made[:1000]) / len(made[:1000])
        for name in SUBJECTS:
            costs[name][size] = _forked(name, made)
            print(name, size, costs[name][size], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "deduplication.md").write_text(_page(costs, tokens), encoding="utf-8")
    return 0


def _forked(name: str, made: list[Instance]) -> Cost:
    with multiprocessing.get_context("fork").Pool(1, _receive, (made,)) as pool:
        return pool.apply(_measure, (name,))


_made: list[Instance] = []


def _receive(made: list[Instance]) -> None:
    _made[:] = made


def _measure(name: str) -> Cost:
    before, start = _peak(), time.process_time()
    kept = sum(drop is None for _, drop in SUBJECTS[name]().verdicts(_made))
    return Cost(time.process_time() - start, _peak() - before, kept)


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _page(costs: dict[str, dict[int, Cost]], tokens: float) -> str:
    from benchmarks.page import machine  # imports torch, which the measured processes do without

    sizes = list(next(iter(costs.values())))
    head = [f"{size:,}" for size in sizes] + ["exponent", f"{PAPER:,}, extrapolated"]
    rows = []
    for name, by_size in costs.items():
        cells = [_cell(size, cost) for size, cost in by_size.items()]
        rows.append([name, *cells, *_extrapolated(by_size)])
    lines = ["| " + " | ".join(row) + " |" for row in (["", *head], ["---", *("---:" for _ in head)], *rows)]
    return (
        f"""# Deduplication

{machine()}; one core is used. Written by `python -m benchmarks.deduplication`.

Question-answer pairs on the phantoms' reports, a third of them Chinese, {tokens:.0f} tokens on average; in each up to
{REWORDED:.0%} of the words are changed at random. A cell holds the CPU seconds, tokens included, the bytes an instance
that are held at the peak beside the instances themselves, and the share that is kept. The exponent is that of the last
two sizes; the last column goes on from the last size by it and, as an upper bound, by 2, the pairs' own.

"""
        + "\n".join(lines)
        + "\n"
    )


def _cell(size: int, cost: Cost) -> str:
    return f"{cost.seconds:.3g} s, {cost.memory / size:,.0f} B, {cost.kept / size:.0%}"


def _extrapolated(costs: dict[int, Cost]) -> list[str]:
    """The exponent of the last two sizes, and the hours and memory at the paper's size."""
    if len(costs) < 2:
        return ["–", "–"]
    (small, less), (large, more) = list(costs.items())[-2:]
    exponent = math.log(more.seconds / less.seconds) / math.log(large / small)
    hours = sorted(more.seconds * (PAPER / large) ** e / 3600 for e in (exponent, 2))
    return [f"{exponent:.2f}", f"{hours[0]:.2g} to {hours[1]:.2g} h, {more.memory / large * PAPER / 1e9:.1f} GB"]


if __name__ == "__main__":
    sys.exit(main())
