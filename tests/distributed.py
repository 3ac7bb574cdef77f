"""Runs a function, or a command, on several processes under a watchdog: a test that hangs is killed and fails.

    def job(steps):
        return torch.distributed.get_rank() * steps

    assert run_ranks(2, job, steps=3) == [0, 3]

Each rank is a fresh interpreter with one thread, seeded, and in a gloo process group of all ranks; deepspeed and
accelerate find the launcher's variables that they look for. `job` lies at the top of its file, which each rank loads;
arguments and results are pickled, so they are tensors and plain values.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "MOE_ADAPTER_TEST_RUN"  # a variable by which processes that a launcher started, or left behind, are known
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
TAIL = 6000  # characters of a failed process's output that its error shows


class ProcessesFailed(AssertionError):
    """A process ended with an error; the message holds its traceback."""


class ProcessesHung(ProcessesFailed):
    """The watchdog's time was up; the message holds each thread's stack."""


def run_ranks(n: int, function: Callable[..., Any], *, timeout: float = 120, **arguments: Any) -> list[Any]:
    """What `function(**arguments)` returns on each of `n` ranks.

    Raises:
        ProcessesFailed: a rank raised, or died; the others are killed.
        ProcessesHung: not all were done within `timeout` seconds; all are killed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun does: no race for the port
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((function.__code__.co_filename, function.__name__, arguments)))
        commands = [[sys.executable, __file__, folder, f"result{rank}"] for rank in range(n)]
        _watch(commands, [_launched(rank, n, store.port) for rank in range(n)], Path(folder), timeout)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(n)]


def run_command(command: Sequence[str | os.PathLike], *, timeout: float = 120, **environment: str) -> str:
    """The output of a command, torchrun's or deepspeed's for one, which is killed with all that it started.

    Raises:
        ProcessesFailed, ProcessesHung: as for `run_ranks`.
    """
    with tempfile.TemporaryDirectory() as folder:
        _watch([[os.fspath(part) for part in command]], [environment], Path(folder), timeout)
        return Path(folder, "output0").read_text(errors="replace")


def _watch(commands: list[list[str]], environments: list[dict[str, str]], folder: Path, timeout: float) -> None:
    """Run commands side by side until all are done, one fails or the time is up; none is left running."""
    outputs = [folder / f"output{i}" for i in range(len(commands))]
    processes: list[subprocess.Popen] = []
    end = time.monotonic() + timeout
    try:
        for command, environment, output in zip(commands, environments, outputs, strict=True):
            environment = _surroundings() | environment | {MARK: str(folder)}
            with output.open("wb") as file:
                processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file))
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            if time.monotonic() > end:
                _signal_all(processes, folder, signal.SIGABRT)  # Python's fault handler then writes the stacks
                time.sleep(1)
                raise ProcessesHung(f"not done in {timeout:g} s:\n{_tails(outputs)}")
            time.sleep(0.02)
        failed = [i for i, process in enumerate(processes) if process.returncode]
        if failed:
            codes = ", ".join(f"{i}: {processes[i].returncode}" for i in failed)
            raise ProcessesFailed(f"process failed ({codes}):\n{_tails([outputs[i] for i in failed])}")
    finally:
        _signal_all(processes, folder, signal.SIGKILL)
        for process in processes:
            process.wait()


def _signal_all(processes: list[subprocess.Popen], folder: Path, number: int) -> None:
    """To the processes, and on Linux to all that they started."""
    for process in processes:
        process.send_signal(number)
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={folder}".encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), number)
        except OSError:  # gone already, or another user's
            continue


def _tails(outputs: list[Path]) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-TAIL:]}" for path in outputs)


def _surroundings() -> dict[str, str]:
    """The environment, with the repository's modules in reach, one thread, no network and no GPU."""
    return os.environ | {
        # deepspeed compiles at first use, by the ninja beside it; with another one in turn it would compile each time.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "TORCH_EXTENSIONS_DIR": str(ROOT / "build" / "torch_extensions"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _launched(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in variables.items()}


def _rank(folder: Path, result: str) -> None:
    if sys.platform == "linux":  # a test run that is killed leaves no rank behind, which would keep its memory
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    import torch
    import torch.distributed as dist

    file, name, arguments = pickle.loads((folder / "call").read_bytes())
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    spec.loader.exec_module(module)
    (folder / result).write_bytes(pickle.dumps(getattr(module, name)(**arguments)))
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early would break the connections of the others
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2])
