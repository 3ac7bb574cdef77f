"""The page and the figure of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers

from benchmarks.measure import GEMMS, IDEAL, Times

MARKERS = "osD^vPX*"
METHOD = """Each table is one run in which all subjects take turns, in a new order each round; a cell is the median of
its rounds over the ideal's median, ± the distance between its quartiles. *Ideal (dense)* is the frozen static FFN and
one trainable dense FFN with the multiply-adds of the shared expert and the K chosen experts, asserted equal to the
layer's; *its products alone* leaves the activations out as well and writes into memory that is there. A training step
is a forward and a backward to the input and to every parameter that trains. Before anything is timed, every subject's
output and gradients are held against the layer in float64, or there is no table. Peers run on the same weights;
`batched_mm` copies an expert's weights for every slot and is left out (–) where that takes more than a GiB."""


def machine() -> str:
    """What it ran on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    name = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "")
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in flags]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {', '.join(kinds) or 'no flags known'}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def header() -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"# Benchmarks\n\n{machine()}; {versions}. Written by `python -m benchmarks`.\n\n{METHOD}\n"


def ratios(times: Times) -> dict[str, tuple[float, float]]:
    """Subject → (median, quartile distance) over the ideal's median."""
    unit = times[IDEAL].median
    return {name: (time.median / unit, time.spread / unit) for name, time in times.items()}


def table(title: str, columns: dict[str, Times]) -> str:
    """One column for each measurement, one row for each subject."""
    by_column = {column: ratios(times) for column, times in columns.items()}
    rows = [*subjects(columns.values()), IDEAL, GEMMS]
    lines = [f"## {title}\n", f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name in rows:
        found = (by_column[column].get(name) for column in columns)
        cells = ("–" if cell is None else f"{cell[0]:.2f} ± {cell[1]:.2f}" for cell in found)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    milliseconds = (f"{times[IDEAL].median * 1e3:.3g} ms" for times in columns.values())
    lines.append(f"| the ideal's time | {' | '.join(milliseconds)} |")
    return "\n".join(lines) + "\n"


def subjects(columns: Iterable[Times]) -> list[str]:
    """All that were measured, the ideal aside."""
    return [name for name in dict.fromkeys(name for times in columns for name in times) if name not in (IDEAL, GEMMS)]


def scaling_figure(sweeps: dict[str, dict[int, Times]], path: Path) -> None:
    """The routed part over the ideal as tokens, experts and top-k grow, one panel each."""
    figure, axes = plt.subplots(1, len(sweeps), figsize=(3.4 * len(sweeps), 3.4), sharey=True, squeeze=False)
    names = subjects(times for sweep in sweeps.values() for times in sweep.values())
    styles = {name: dict(marker=MARKERS[index], color=f"C{index}") for index, name in enumerate(names)}
    for ax, (what, sweep) in zip(axes[0], sweeps.items(), strict=True):
        for name in names:
            points = [(value, ratios(times)[name][0]) for value, times in sweep.items() if name in times]
            ax.plot([x for x, _ in points], [y for _, y in points], label=name, **styles[name])
        ax.axhline(1, color="0.6", linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel=what)
        ax.set_xticks(list(sweep), [str(value) for value in sweep], minor=False)
        ax.minorticks_off()
    ticks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    axes[0][0].set_yticks(ticks, [str(tick) for tick in ticks])
    axes[0][0].set_ylabel("training step ÷ ideal")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, ncol=len(names), loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=150)
    plt.close(figure)
