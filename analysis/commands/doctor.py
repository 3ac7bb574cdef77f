"""`moe-adapter doctor`: versions, devices, and which backends there are."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_adapter.analysis.commands import command

LIBRARIES = ("moe-adapter", "torch", "triton", "transformers", "accelerate", "peft", "deepspeed", "trl")
LIBRARIES += ("megablocks", "grouped-gemm", "bitsandbytes", "torchao", "safetensors", "pyarrow", "matplotlib")


def add(subparsers: Any) -> None:
    examples = ["moe-adapter doctor", "moe-adapter doctor --json > environment.json"]
    command(subparsers, "doctor", run, help="versions, GPUs, and backends with why one is missing", examples=examples)


def run(options: argparse.Namespace) -> None:
    found = examine()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for title, entries in found.items():
        print(title)
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            print(f"  {name:<{width}}  {value}")


def examine() -> dict[str, dict[str, str]]:
    """The environment by part: python and libraries, devices, backends of the routed experts."""
    from moe_adapter.backends import doctor

    libraries = {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}
    return {"versions": libraries, "devices": _devices(), "backends": doctor()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if not torch.cuda.is_available():
        return {**devices, "cuda": f"none in reach; torch is built for CUDA {torch.version.cuda or '– (none)'}"}
    for index in range(torch.cuda.device_count()):
        traits = torch.cuda.get_device_properties(index)
        capability = f"compute capability {traits.major}.{traits.minor}"
        devices[f"cuda:{index}"] = f"{traits.name}, {traits.total_memory / 2**30:.0f} GiB, {capability}"
    return devices
