"""Many architectures, one process each: a crash or a hang ends one of them, never the run."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

import torch
import transformers as tf

from tests.matrix.build import build
from tests.matrix.checks import Outcome, examine

SECONDS = 120  # for each model; most take less than one, on an idle core


def run(model_types: list[str], jobs: int = 1) -> Iterator[Outcome]:
    """The outcome of each model type, as they come."""
    _warm_up()
    context = multiprocessing.get_context("fork")
    waiting, running = list(model_types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(waiting[0], sender))
            process.start()
            sender.close()
            running[receiver] = (waiting.pop(0), process, time.monotonic() + SECONDS)
        for receiver in wait(list(running), timeout=1.0):
            name, process, _ = running.pop(receiver)
            yield _outcome(name, process, receiver)
        for receiver, (name, process, deadline) in list(running.items()):
            if time.monotonic() > deadline:
                process.kill()
                del running[receiver]
                yield Outcome(model_type=name, status="not built", reason=f"no result within {SECONDS} s")


def _warm_up() -> None:
    """Do once, before forking, what every model's first build does: import, on one thread."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for model_type in ("llama", "llava"):
        build(model_type)


def _child(model_type: str, sender: Connection) -> None:
    sender.send(examine(model_type))


def _outcome(name: str, process: multiprocessing.process.BaseProcess, receiver: Connection) -> Outcome:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Outcome(model_type=name, status="not built", reason=f"its process died (exit code {process.exitcode})")
    finally:
        process.join()
        receiver.close()
