"""`python -m tests.scale`: the tables of docs/scale.md, whose cells are what `moe-adapter plan` says of Qwen2-VL-7B."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from moe_adapter.analysis import cli, memory
from tests import sizing

MODEL = "Qwen2-VL-7B"
STEP = "--tokens 32768 --images 160"
ENGINES = {"ZeRO-2": "--zero 2", "ZeRO-3": "--zero 3", "FSDP2": "--fsdp"}
OFFLOAD = {"": (), ", offload": ("--offload",)}
HEAD = "| GiB per GPU | stage I, 8 GPUs | stage I, 32 | stage II, 8 | stage II, 32 |\n|---|---:|---:|---:|---:|"


def totals(options: str) -> list[list[int]]:
    """Bytes per GPU by the command, without and with offload, of 8 and of 32; they share the simulation of the step."""
    torch.set_num_threads(1)
    simulate, steps = memory.simulate_step, []

    def once(*args: Any, **kwargs: Any) -> memory.StepMemory:
        steps.append(steps[0] if steps else simulate(*args, **kwargs))
        return steps[0]

    with tempfile.TemporaryDirectory() as folder, patch.object(memory, "simulate_step", once):
        sizing.build(MODEL).config.save_pretrained(folder)  # pyright: ignore
        command = ["plan", folder, *options.split(), "--json"]
        return [[_total([*command, *extra, "--gpus", gpus]) for gpus in ("8", "32")] for extra in OFFLOAD.values()]


def _total(arguments: list[str]) -> int:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(arguments) == 0
    return json.loads(said.getvalue())["bytes_per_gpu"]["total"]


def table(loss: str) -> str:
    jobs = [f"{STEP} --loss {loss} --stage {stage} {flags}" for flags, stage in product(ENGINES.values(), (1, 2))]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        stages = iter(pool.map(totals, jobs))
        rows = [
            (f"{engine}{suffix}", *first, *second)
            for engine in ENGINES
            for suffix, first, second in zip(OFFLOAD, next(stages), next(stages), strict=True)
        ]
    return "\n".join(
        [HEAD, *(f"| {name} | {' | '.join(f'{size / 2**30:.1f}' for size in row)} |" for name, *row in rows)]
    )


if __name__ == "__main__":
    print(*(f"{loss} loss\n\n{table(loss)}\n" for loss in ("chunked", "full")), sep="\n")
