"""How soon a record's page is there: `python -m benchmarks.report --name MACHINE` writes results/MACHINE-report.md.

A browser opens the page of a large record beside the page of a small one, in turns: what the small one takes is the
browser's and Vega-Lite's own. Its charts in view are drawn first, then the others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, sync_playwright

from benchmarks.page import machine
from benchmarks.timing import Time, interleaved
from moe_adapter.analysis.page import write_report
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import Resampling
from moe_adapter.analysis.schema import GENERATED, IMAGE, PROMPT, LayerFacts, RecordFacts
from moe_adapter.analysis.writer import RoutedTokens, RoutingWriter

RESULTS = Path(__file__).parent / "results"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
IN_VIEW = "() => document.querySelector('#charts[aria-busy=false]')"
ALL = "() => [...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('svg, canvas'))"
READY = {"charts in view": (IN_VIEW,), "all charts": (IN_VIEW, ALL)}


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A record of random routing."""

    layers: int
    experts: int
    top_k: int
    cases: int
    tokens: int  # of each case
    groups: int

    @property
    def rows(self) -> int:
        return self.layers * self.top_k * self.cases * self.tokens

    def __str__(self) -> str:
        return f"{self.layers} layers × {self.experts} experts, top-{self.top_k}, {self.groups} groups"


SMALL = Routing(layers=2, experts=4, top_k=2, cases=4, tokens=20, groups=2)
LARGE = (
    Routing(layers=28, experts=4, top_k=2, cases=16, tokens=1120, groups=8),
    Routing(layers=48, experts=128, top_k=8, cases=10, tokens=260, groups=5),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the page of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--name", required=True, help="of the machine: the page becomes results/NAME-report.md")
    parser.add_argument("--seconds", type=float, default=300, help="in all (default 300)")
    parser.add_argument("--toy", action="store_true", help="the small record alone, to try the script itself")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    options = parser.parse_args(arguments)
    installed = next((path for path in map(shutil.which, BROWSERS) if path), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        text = run(browser, [SMALL] if options.toy else [SMALL, *LARGE], options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}-report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def run(browser: Browser, records: list[Routing], seconds: float) -> str:
    """Times of every record's page as Markdown; the first is the small one."""
    with tempfile.TemporaryDirectory() as folder:
        quick = Resampling(resamples=20, permutations=99)  # intervals are as many as ever, whatever they are made from
        paths = {
            routing: write_report(written(routing, Path(folder)), Path(folder, f"{number}.html"), resampling=quick)
            for number, routing in enumerate(records)
        }
        calls = {
            f"{routing}: {name}": opening(browser, path, conditions)
            for routing, path in paths.items()
            for name, conditions in READY.items()
        }
        before = os.getloadavg()[1]
        times = interleaved(calls, seconds=seconds, rounds=40)
        load = f"{before:.1f} before and {os.getloadavg()[1]:.1f} after"
        sizes = {routing: path.stat().st_size for routing, path in paths.items()}
        return _page(times, sizes, f"Chromium {browser.version}", load)


def written(routing: Routing, folder: Path) -> RoutingRecord:
    """A record in which a group's tokens prefer some experts; three fifths of them are of images."""
    rng = np.random.default_rng(0)
    writer = RoutingWriter(folder / f"{routing.layers}.parquet", row_group_rows=2**20)
    layer_C, slot_C = np.divmod(np.arange(routing.layers * routing.top_k), routing.top_k)
    modality_T = rng.choice([IMAGE, PROMPT, GENERATED], routing.tokens, p=[0.6, 0.3, 0.1])
    for number in range(routing.cases):
        noise = rng.gumbel(size=(routing.tokens, routing.layers, routing.experts))
        expert_TLE = np.argsort(noise + rng.normal(0, 0.5, routing.experts), axis=-1)
        (case,), (group,) = writer.codes([(f"case {number}", f"group {number % routing.groups}")])
        tokens = RoutedTokens(
            case_T=np.full(routing.tokens, case),
            group_T=np.full(routing.tokens, group),
            modality_T=modality_T,
            position_T=np.arange(routing.tokens),
            token_id_T=rng.integers(3, 100, routing.tokens),
            expert_TC=expert_TLE[..., -routing.top_k :].reshape(routing.tokens, -1),
            weight_TC=np.full((routing.tokens, len(layer_C)), 1 / routing.top_k, np.float32),
            layer_C=tuple(layer_C.tolist()),
            slot_C=tuple(slot_C.tolist()),
        )
        writer.append(tokens)
    layers = [
        LayerFacts(name=f"layers.{i}", num_experts=routing.experts, top_k=routing.top_k) for i in range(routing.layers)
    ]
    groups, cases = tuple(writer.groups), len(writer.cases)
    writer.close(RecordFacts(model="m", layers=tuple(layers), groups=groups, cases=cases, tokens=writer.tokens))
    return RoutingRecord.open(writer.path)


def opening(browser: Browser, path: Path, conditions: tuple[str, ...]) -> Callable[[], object]:
    """Opens a page in a profile of its own, waits until it has what it should, and closes it."""

    def call() -> None:
        context = browser.new_context(viewport={"width": 1280, "height": 720})
        page = context.new_page()
        page.goto(path.as_uri(), wait_until="commit")
        for condition in conditions:
            page.wait_for_function(condition)
        context.close()

    return call


def _page(times: dict[str, Time], sizes: dict[Routing, int], browser: str, load: str) -> str:
    unit = {name: times[f"{next(iter(sizes))}: {name}"].median for name in READY}
    head = ["record", "rows", "page", *(text for name in READY for text in (f"{name} after", "over the small one's"))]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for routing, size in sizes.items():
        cells = [f"{routing.rows:,}", f"{size / 1e6:.1f} MB"]
        for name in READY:
            time = times[f"{routing}: {name}"]
            spread = time.spread / unit[name]
            cells += [f"{time.median:.2f} s", f"{time.median / unit[name]:.2f} ± {spread:.2f}"]
        rows.append([str(routing), *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"""# The page of a record

{machine()}; {browser}, headless. Written by `python -m benchmarks.report`.

The load average of five minutes, other programs of the machine included, was {load}. All pages
take turns, in a new order each round, each in a new profile; seconds are medians of the rounds, and ratios are these
over the small record's, ± the distance between the quartiles.

{table}
"""


if __name__ == "__main__":
    sys.exit(main())
