"""The watchdog over several processes: what it returns, and that nothing outlives a failure or a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import ProcessesFailed, ProcessesHung, run_command, run_ranks


def total(scale: float) -> float:
    value = torch.full((1,), scale * (dist.get_rank() + 1))
    dist.all_reduce(value)
    return value.item()


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("it broke")
    dist.barrier()


def one_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def alive(mark: str) -> list[Path]:
    """Processes in whose environment `mark` is."""
    return [file for file in Path("/proc").glob("[0-9]*/environ") if mark.encode() in read(file)]


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # gone meanwhile, or another user's
        return b""


def test_each_ranks_result_comes_back():
    assert run_ranks(2, total, scale=2.0) == [6.0, 6.0]


@pytest.mark.parametrize(("function", "message"), [(one_raises, "ValueError: it broke"), (one_dies, "1: -9")])
def test_a_rank_that_fails_fails_the_run(function, message):
    with pytest.raises(ProcessesFailed, match=message):
        run_ranks(2, function)


def test_a_rank_that_hangs_is_killed_and_its_stack_told():
    with pytest.raises(ProcessesHung, match="in one_sleeps"):
        run_ranks(2, one_sleeps, timeout=15)


def test_what_a_launcher_started_is_killed_with_it():
    mark = uuid.uuid4().hex
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    with pytest.raises(ProcessesHung):
        run_command([*launcher, "sleep", "1000"], timeout=10, MARK_OF_THIS_TEST=mark)
    assert not alive(mark)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends the ranks")
def test_a_run_that_is_killed_leaves_no_rank_behind():
    mark = uuid.uuid4().hex
    code = "from distributed import run_ranks; from test_distributed import one_sleeps; run_ranks(2, one_sleeps)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "MARK_OF_THIS_TEST": mark}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment)
    _until(lambda: len(alive(mark)) == 3)
    time.sleep(2)  # for what a rank does first
    run.kill()
    run.wait()
    _until(lambda: not alive(mark))


def _until(true) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
