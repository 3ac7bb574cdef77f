"""`python -m benchmarks.training`: stage I and stage II of a medium Qwen2-VL on one device, in bf16 with checkpointing.

It is the smoke test for a GPU (`make gpu-check`) and writes benchmarks/results/<machine>-training.md: time of a step,
tokens a second, peak memory, and model FLOPs utilisation, which counts each multiply-add of the step once and
recomputation not at all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.page import machine
from benchmarks.timing import now
from moe_adapter import dual_path_layers, inject_dual_path_moe, set_stage
from moe_adapter.integrations.peft import stage2_lora

RESULTS = Path(__file__).parent / "results"
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bf16 FLOP/s by the vendor's sheets


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Qwen2-VL and a batch: one sequence with as many images as fill its first half."""

    text: dict[str, Any]
    vision: dict[str, Any]
    tokens: int
    side: int  # patches along an image's edge, merged 2×2


MEDIUM = Size(
    text=dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_parameters=dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6),
    ),
    vision=dict(depth=16, embed_dim=1024, num_heads=16, hidden_size=2048),
    tokens=8192,
    side=28,
)
TOY = Size(
    text=dict(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4),
    ),
    vision=dict(depth=2, embed_dim=32, num_heads=4, hidden_size=64),
    tokens=128,
    side=4,
)
IMAGE, START, END = 5, 6, 7  # token ids


def build(size: Size, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """The base in bf16, injected in Table 8's proportions; what trains in float32, as the recipe keeps it."""
    ids = dict(image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END, video_token_id=8)
    config = Qwen2VLConfig(text_config=size.text, vision_config=size.vision, **ids)
    torch.manual_seed(0)
    with device:
        model = Qwen2VLForConditionalGeneration(config).bfloat16()
    inject_dual_path_moe(model, **proportions(size.text["intermediate_size"]))
    return model.train()


def proportions(ffn: int) -> dict[str, int]:
    """Table 8's widths beside 18944, for another FFN, in multiples of 8."""
    return {
        name: round(ffn * width / 18944 / 8) * 8 for name, width in (("expert_dim", 1408), ("shared_expert_dim", 5632))
    }


def batch_of(size: Size, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens and pixels, labels on the second half, the response."""
    generator = torch.Generator().manual_seed(0)
    per_image = size.side**2 // 4
    ids = torch.randint(10, size.text["vocab_size"], (1, size.tokens), generator=generator)
    images = max(1, size.tokens // 2 // (per_image + 2))
    kind = torch.zeros_like(ids)
    for start in (i * (per_image + 2) for i in range(images)):
        span = slice(start + 1, start + 1 + per_image)
        ids[0, start], ids[0, span], ids[0, span.stop], kind[0, span] = START, IMAGE, END, 1
    labels = ids.clone()
    labels[:, : size.tokens // 2] = -100
    pixels = torch.randn(images * size.side**2, 3 * 2 * 14 * 14, generator=generator)
    grid = torch.tensor([[1, size.side, size.side]] * images)
    batch = dict(input_ids=ids, mm_token_type_ids=kind, labels=labels, pixel_values=pixels, image_grid_thw=grid)
    return {name: value.to(device) for name, value in batch.items()}


def measure(model: nn.Module, batch: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """Median seconds of a training step, peak bytes on the device, and FLOPs of a step."""
    device = batch["input_ids"].device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        if not loss.isfinite():
            raise SystemExit(f"the loss is {loss.item()}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    flops = _flops(model, step)
    times = []
    for turn in range(steps + 2):  # two that warm up
        if turn == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = now()
        step()
        times.append(now() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else float("nan")
    return dict(seconds=statistics.median(times[2:]), bytes=peak, flops=flops)


def _flops(model: nn.Module, step: Any) -> int:
    """Of one step without recomputation; by `lean`, whose products the counter knows."""
    model.gradient_checkpointing_disable()  # pyright: ignore
    layers = dual_path_layers(model).values()
    backends = [layer.experts.backend for layer in layers]  # pyright: ignore
    for layer in layers:
        layer.experts.backend = "lean"  # pyright: ignore
    with FlopCounterMode(display=False) as counter:
        step()
    for layer, backend in zip(layers, backends, strict=True):
        layer.experts.backend = backend  # pyright: ignore
    model.gradient_checkpointing_enable(dict(use_reentrant=False))  # pyright: ignore
    return counter.get_total_flops()


def run(size: Size, steps: int) -> str:
    """Both stages as a page."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = next((flops for name, flops in PEAK.items() if name in machine()), None)
    model, batch, rows = build(size, device), batch_of(size, device), []
    for stage in (1, 2):
        model = get_peft_model(model, stage2_lora(model)) if stage == 2 else model
        counts = set_stage(model, stage)
        found = measure(model, batch, steps)
        used = f"{found['flops'] / found['seconds'] / peak:.1%}" if peak else "–"
        memory = f"{found['bytes'] / 2**30:.1f} GiB" if device.type == "cuda" else "–"
        speed = f"{size.tokens / found['seconds']:,.0f}"
        trained = f"{counts['trainable'] / 1e6:,.1f} M of {counts['total'] / 1e6:,.1f} M"
        rows.append(
            f"| {stage} | {trained} | {found['seconds']:.3g} s | {speed} | {memory} | {found['flops']:.3g} | {used} |"
        )
        print(rows[-1], flush=True)
    head = "| stage | parameters that train | step | tokens/s | peak memory | FLOPs | MFU |\n| --- |" + " ---: |" * 6
    what = f"hidden {size.text['hidden_size']}, {size.text['num_hidden_layers']} blocks, {size.tokens} tokens a step"
    return (
        f"# Training on one device\n\n{machine()}; torch {torch.__version__}. Written by `python -m "
        f"benchmarks.training`.\n\nQwen2-VL, {what}, bf16 autocast, checkpointing, AdamW.\n\n{head}\n"
        + "\n".join(rows)
        + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--name", required=True, help="of the machine: the page becomes results/NAME-training.md")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each stage (default 10)")
    parser.add_argument("--toy", action="store_true", help="minuscule sizes, to try the script itself")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    options = parser.parse_args(arguments)
    page = run(TOY if options.toy else MEDIUM, options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}-training.md").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
