"""Arms of a grid one after the other in this process, or some at once, each with its share of the cores and a log."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from examples.echovlm.command_line import load_recipe
from examples.echovlm.config import RecipeConfig
from moe_adapter import MoEAdapterError


def run_all(
    needs: Mapping[str, Collection[str]],
    start: Callable[[str], dict[str, Any]],
    done: Collection[str],
    jobs: int,
) -> Iterator[str]:
    """Run the arms, as many as `jobs` at once, and yield the name of each when it is done.

    `needs`: of each arm, in order, those that go before it; `start`: an arm's arguments of `run_arm`; `done`: arms to
    be left out. Raises: MoEAdapterError, also where an arm's process has died.
    """
    finished, waiting, running = set(done), [name for name in needs if name not in done], {}
    with _Here() if jobs == 1 else _processes(jobs) as workers:
        while waiting or running:
            ready = [name for name in waiting if finished.issuperset(needs[name])]
            for name in ready[: jobs - len(running)]:
                waiting.remove(name)
                running[workers.submit(run_arm, **start(name))] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    raise MoEAdapterError(
                        f"{name}: its process, or one beside it, has died, as where memory is short; the same command "
                        "goes on: give fewer --jobs"
                    ) from None
                finished.add(name)
                yield name


def run_arm(config: RecipeConfig, log: Path | None, **places: Any) -> None:
    """The recipe of one arm, which says to the file `log` what it would say to the terminal."""
    with contextlib.ExitStack() as stack:
        if log:
            file = stack.enter_context(log.open("a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
            stack.enter_context(contextlib.redirect_stderr(file))
        load_recipe()(config, **places)


class _Here(Executor):
    """Runs at once what it is given, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _processes(jobs: int) -> Executor:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")  # torch's threads don't live through a fork
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,))
