"""What the recipe tells: headings, plain lines and wall times on the terminal, the same in the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Account:
    """Prints each step as it runs and keeps its lines and wall time (seconds) for `report.md`."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self._step = ""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of the recipe; steps don't nest."""
        self._step, self.lines[name] = name, []
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        print(f"   {self.seconds[name]:.0f} s", flush=True)

    def say(self, line: str) -> None:
        """A sentence on what the current step does or found."""
        self.lines[self._step].append(line)
        print(f"   {line}", flush=True)
