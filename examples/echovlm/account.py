"""What the recipe tells: headings, plain lines and wall times on the terminal, the same in the report.

The account of a finished step is kept in a file, with torch's random states after it: a run that is resumed knows what
it has done, and goes on with the random numbers that it would have drawn.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from examples.echovlm import ranks
from moe_adapter import MoEAdapterError
from moe_adapter.directory import replace_file


class Account:
    """Prints each step as it runs and keeps its lines and wall time (seconds) for `report.md`.

    `file`: where it keeps them for a run that resumes; only the main process writes and prints.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.run: dict[str, Any] = {}
        self.lines: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self._random: dict[str, list[str]] = {}
        self._step = ""

    def start(self, run: dict[str, Any]) -> None:
        """Of a new run, note what it was started with: `run`, of JSON's types; or read what was done of this one.

        Raises: MoEAdapterError if that one was started otherwise.
        """
        assert self.file is not None
        kept = ranks.from_main(json.loads(self.file.read_text()) if ranks.is_main() and self.file.is_file() else None)
        if kept:
            self.run, self.lines, self.seconds, self._random = (
                kept[name] for name in ("run", "lines", "seconds", "random")
            )
        if kept and (different := _differences(self.run, run)):
            raise MoEAdapterError(
                f"--resume: the run in {self.file.parent} was started otherwise: {'; '.join(different)}. Resume it as "
                "it was started, or begin another in a new folder; --stage1 takes a finished stage I over."
            )
        self.run = run

    def finished(self, step: str) -> bool:
        """Whether a step was finished before this run was resumed, or in it."""
        return step in self._random

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of the recipe; steps don't nest. What one that was finished before says again is left out."""
        self._print(f"\n== {name}")
        if self.finished(name):
            self._step = ""
            yield
            _set_random(self._random[name])
            self._print(f"   finished before, in {self.seconds[name]:.0f} s")
            return
        self._step, self.lines[name] = name, []
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self._random[name] = ranks.from_main(_random())
        if ranks.count() > 1:
            _set_random(self._random[name])
        self.keep()
        self._print(f"   {self.seconds[name]:.0f} s")

    def say(self, line: str) -> None:
        """A sentence on what the current step does or found."""
        if self._step:
            self.lines[self._step].append(line)
            self._print(f"   {line}")

    def keep(self) -> None:
        """Write down what is done, be it only that the run has begun: from then on there is something to resume."""
        if self.file is None or not ranks.is_main():
            return
        kept = {"run": self.run, "lines": self.lines, "seconds": self.seconds, "random": self._random}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.file, json.dumps(kept, ensure_ascii=False, indent=1).encode())

    def _print(self, line: str) -> None:
        if ranks.is_main():
            print(line, flush=True)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Each value that differs, as `name: got …, before …`."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        return [text for key in names for text in _differences(before.get(key), now.get(key), f"{name}.{key}")]
    return [] if before == now else [f"{name[1:]}: got {now!r}, before {before!r}"]


def _random() -> list[str]:
    """torch's random states, of the CPU and of the GPU in use, as text."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def _set_random(texts: list[str]) -> None:
    states = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in texts]
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1])
