"""`moe-adapter plan`: what an injection would add to a model, and what a training step then takes on each GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from moe_adapter.analysis.commands import command, quiet_libraries
from moe_adapter.analysis.commands._options import add_injection, at_least, injection_of
from moe_adapter.errors import MoEAdapterError

EXAMPLES = (
    "moe-adapter plan Qwen/Qwen2-VL-7B-Instruct",
    "moe-adapter plan config.json --budget 200M",
    "moe-adapter plan Qwen2-VL-7B --gpus 8 --zero 2 --tokens 32768 --images 160 --loss chunked",
    "moe-adapter plan Qwen2-VL-7B --gpus 32 --fsdp --stage 2 --tokens 32768 --images 160 --loss chunked",
)


def add(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "plan",
        run,
        help="what an injection adds to a model, and the memory of a training step",
        examples=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's directory, a config.json, or a name on the hub")
    add_injection(parser)
    step = parser.add_argument_group("training step")
    step.add_argument("--stage", type=int, choices=(1, 2), default=1, help="2 adds the paper's LoRA (default: 1)")
    step.add_argument("--lora-r", type=at_least(1), default=8, metavar="R", help="its rank (default: 8)")
    step.add_argument("--tokens", type=at_least(1), default=2048, help="length of a sequence (default: 2048)")
    step.add_argument("--batch", type=at_least(1), default=1, help="sequences per GPU (default: 1)")
    step.add_argument("--images", type=at_least(0), default=0, help="in the first sequence, its tokens (default: 0)")
    step.add_argument("--image-side", type=at_least(1), default=392, metavar="PIXELS", help="of each (default: 392)")
    step.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the products (default: bf16)")
    step.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of activations")
    step.add_argument("--loss", choices=("full", "chunked"), default="full", help="whole logits, or use_chunked_loss")
    step.add_argument("--attention", default="sdpa", metavar="NAME", help="transformers' attn_implementation")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--gpus", type=at_least(1), default=1, help="GPUs in all (default: 1)")
    chosen = engine.add_mutually_exclusive_group()
    chosen.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="DeepSpeed's stage; 0 is torch's DDP")
    chosen.add_argument("--fsdp", action="store_true", help="FSDP2, a unit a block")
    engine.add_argument("--offload", action="store_true", help="what is sharded waits in the host's memory")


def run(options: argparse.Namespace) -> None:
    engine, changes = _engine(options), injection_of(options)
    with quiet_libraries():
        from moe_adapter.integrations import skeleton
        from moe_adapter.plan import plan_injection

        model = skeleton.load_skeleton(options.model, attention=options.attention)
        plan = plan_injection(model, options.target, budget=options.budget, **changes)
        if not options.json:
            print(plan, flush=True)
        print(f"running a step of {options.batch} × {options.tokens} tokens without data …", file=sys.stderr)
        memory = _memory(model, plan, engine, options)
    print(_as_json(plan, memory, engine, options) if options.json else _as_table(memory, engine, options))


def _memory(model: Any, plan: Any, engine: str, options: argparse.Namespace) -> Any:
    from moe_adapter import set_stage
    from moe_adapter.analysis.engines import computed_by, per_gpu, sizes_of
    from moe_adapter.analysis.memory import simulate_step
    from moe_adapter.integrations import skeleton
    from moe_adapter.integrations.chunked_loss import use_chunked_loss
    from moe_adapter.surgery import apply_plan

    batch = skeleton.training_batch(
        model, options.tokens, rows=options.batch, images=options.images, side=options.image_side
    )
    apply_plan(model, plan)
    model = skeleton.add_stage2_lora(model, options.lora_r) if options.stage == 2 else model
    set_stage(model, options.stage)
    if options.loss == "chunked":
        use_chunked_loss(model)
    if options.checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise MoEAdapterError(f"{error} Use --no-checkpointing.") from error
    bf16 = options.precision == "bf16"
    try:
        step = simulate_step(model.train(), batch, autocast=computed_by(engine, model, bf16=bf16))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # the model's own, as of too long a sequence
        raise MoEAdapterError(
            f"{options.model}: a step of {options.batch} × {options.tokens} tokens does not run "
            f"({str(error).strip().splitlines()[0]}): look at --tokens, and at the sizes in its config."
        ) from error
    width = 2 if bf16 else 4
    return per_gpu(step, sizes_of(model), engine, options.gpus, width=width, offload=options.offload)


def _engine(options: argparse.Namespace) -> str:
    if options.offload and not options.fsdp and options.zero not in (2, 3):
        options.usage_error("--offload goes with --zero 2, --zero 3 or --fsdp")
    if options.fsdp:
        return "fsdp2"
    if options.zero:
        return f"zero{options.zero}"
    return "ddp" if options.gpus > 1 else "alone"


ENGINE_NAMES = {"alone": "", "ddp": ", DDP", "fsdp2": ", FSDP2"}


def _as_table(memory: Any, engine: str, options: argparse.Namespace) -> str:
    name = f"{options.gpus} GPU{'s' * (options.gpus > 1)}{ENGINE_NAMES.get(engine, f', ZeRO-{engine[-1]}')}"
    name += " with offload" if options.offload else ""
    images = f" with {options.images} images of {options.image_side}×{options.image_side}" if options.images else ""
    checkpointing = "checkpointing" if options.checkpointing else "no checkpointing"
    rows = {**dataclasses.asdict(memory), "total": memory.total}
    return "\n".join(
        [
            f"\nGiB per GPU, predicted: {name}; stage {options.stage}, {options.batch} × "
            f"{options.tokens} tokens{images}, {options.precision}, {checkpointing}, {options.loss} loss",
            *(f"  {title:<12}{size / 2**30:>8.2f}" for title, size in rows.items()),
            "The CUDA context, NCCL's buffers and fragmentation come on top: keep some GiB free.",
        ]
    )


def _as_json(plan: Any, memory: Any, engine: str, options: argparse.Namespace) -> str:
    rows = [dataclasses.asdict(row) for row in plan.rows]
    counts = dict(added=plan.added, trainable=plan.trainable, total=plan.total, bytes=plan.bytes)
    return json.dumps(
        {
            "plan": {"config": plan.config.to_dict(), "rows": rows, **counts},
            "engine": {"name": engine, "gpus": options.gpus, "offload": options.offload},
            "bytes_per_gpu": {**dataclasses.asdict(memory), "total": memory.total},
        },
        indent=2,
    )
