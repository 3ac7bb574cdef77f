"""`moe-adapter inject`: a fresh adapter for a model, to train from."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._options import a_seed, add_injection, add_placement, injection_of, loading
from moe_adapter.analysis.commands._output import as_json
from moe_adapter.errors import MoEAdapterError

EXAMPLES = (
    "moe-adapter inject Qwen2-VL-7B-Instruct -o adapters/fresh",
    "moe-adapter inject Qwen2-VL-7B-Instruct -o adapters/small --budget 200M --set num_experts=8",
)


def add(subparsers: Any) -> None:
    parser = command(subparsers, "inject", run, help="a fresh adapter for a model, to train from", examples=EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's directory, or a name on the hub")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the adapter's directory, new or empty")
    add_injection(parser)
    group = parser.add_argument_group("model")
    add_placement(group)
    group.add_argument("--seed", type=a_seed, default=0, help="of the new parameters (default: 0)")


def run(options: argparse.Namespace) -> None:
    changes, out = injection_of(options), options.output
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MoEAdapterError(f"{out} is no empty directory; give a new one.")
    with loading(options) as pretrained:
        import torch

        from moe_adapter import plan_injection, save_adapter
        from moe_adapter.surgery import apply_plan

        model = pretrained.load_model(options.model, dtype=options.dtype, device=options.device)
        plan = plan_injection(model, options.target, budget=options.budget, **changes)
        torch.manual_seed(options.seed)
        apply_plan(model, plan)
        save_adapter(model, out)
    if options.json:
        rows = [dataclasses.asdict(row) for row in plan.rows]
        counts = dict(added=plan.added, total=plan.total, bytes=plan.bytes)
        print(as_json({"adapter": str(out), "config": plan.config.to_dict(), "rows": rows, **counts}))
    else:
        print(f"{plan}\nwritten to {out}")
