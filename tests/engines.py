"""One training run under each engine, on data that is hard on it; the same function runs on every rank, and alone."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
import zoo
from cpu_fsdp import shard_on_cpus
from peft import get_peft_model
from reference import perturb
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from moe_adapter import dual_path_layers, inject_dual_path_moe, set_stage
from moe_adapter.integrations.deepspeed import zero_config
from moe_adapter.integrations.fsdp import fsdp_arguments
from moe_adapter.integrations.peft import stage2_lora
from moe_adapter.integrations.trainer import DualPathMixin
from moe_adapter.sharding import whole

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": dict(deepspeed=zero_config(2)),
    "zero3": dict(deepspeed=zero_config(3)),
    "fsdp2": fsdp_arguments(),
}
RANKS, STEPS, BATCH, RATE = 2, 20, 2, 1e-3
SIDE = 40  # the token ids of "disjoint" lie below it or above it


def micro_batches(case: str, count: int) -> list[list[dict[str, torch.Tensor]]]:
    """`count` micro-batches of BATCH sequences; under RANKS processes the odd ones are rank 1's.

    "uneven": their lengths differ. "disjoint": even and odd ones hold tokens of two kinds (see `split_experts`).
    "padding": every fourth one, always rank 1's, is nothing but padding.
    """
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i in range(count):
        batch = []
        for _ in range(BATCH):
            length = int(torch.randint(3, 12, (1,), generator=generator)) if case == "uneven" else 8
            low, high = (3, 100) if case != "disjoint" else (3, SIDE) if i % RANKS == 0 else (SIDE, 100)
            ids = torch.randint(low, high, (length,), generator=generator)
            empty = case == "padding" and i % 4 == 3
            labels = torch.full_like(ids, -100) if empty else ids.clone()
            batch.append(dict(input_ids=ids, labels=labels, attention_mask=torch.full_like(ids, 0 if empty else 1)))
        batches.append(batch)
    return batches


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Right-padded rows."""
    values = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    pad = nn.utils.rnn.pad_sequence
    return {name: pad([row[name] for row in batch], True, value) for name, value in values.items()}


def without_compiling() -> None:
    """DeepSpeed isn't to compile its own all-reduce, which takes minutes: gloo's will do."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def arguments_of(engine: str) -> dict[str, Any]:
    """The engine's training arguments, once it is ready to be tested here."""
    if engine.startswith("zero"):
        without_compiling()
    if engine == "fsdp2":
        shard_on_cpus()
    return ENGINES[engine]


def split_experts(model: nn.Module) -> None:
    """Let tokens below SIDE choose experts 0 and 1 in every layer, the others 2 and 3."""
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = torch.where(torch.arange(len(embedding)) < SIDE, 20.0, -20.0)
        for layer in dual_path_layers(model).values():
            layer.router.weight[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])


class Ordered(Trainer):
    """A Trainer that takes the data in their order."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class OrderedDualPath(DualPathMixin, Ordered):
    """The same with the mixin."""


def train(
    engine: str,
    stage: int,
    case: str,
    *,
    bf16: bool = False,
    accumulation: int = 1,
    steps: int = STEPS,
    mixin: bool = False,
    arguments: dict[str, Any] | None = None,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """How far `steps` steps move each trained parameter; alone, a process accumulates what RANKS of them take each."""
    torch.manual_seed(0)
    alone = not dist.is_initialized()
    model = zoo.build("qwen2")
    sizes = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24, balance_coef=1.0)
    perturb(inject_dual_path_moe(model, **{**sizes, **config}), 0.05)
    if case == "disjoint":
        split_experts(model)
    if stage == 2:
        model = get_peft_model(model, stage2_lora(model, r=4, lora_dropout=0.0))
    set_stage(model, stage)
    batches = micro_batches(case, RANKS * accumulation * steps)
    settings = dict(
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulation * (RANKS if alone else 1),
        max_steps=steps,
        learning_rate=RATE,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=5,
    )
    settings |= ({} if alone else arguments_of(engine)) | (arguments or {})
    args = TrainingArguments(tempfile.mkdtemp(), **settings)
    data = [row for batch in batches for row in batch]
    before = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = (OrderedDualPath if mixin else Ordered)(model, args, train_dataset=data, data_collator=collate)
    seen = watch_experts(model) if case == "disjoint" else None
    trainer.train()
    if not alone:
        assert_engine(engine, trainer)
    if seen is not None and not alone:
        assert all(chosen == {0, 1} if dist.get_rank() == 0 else chosen == {2, 3} for chosen in seen)
    return {name: whole(p).float() - before[name] for name, p in model.named_parameters() if p.requires_grad}


def assert_engine(engine: str, trainer: Trainer) -> None:
    """That the training ran under the engine: accelerate takes another one without a word where it sees fit."""
    enabled = {"fsdp2": trainer.is_fsdp_enabled, "zero": trainer.is_deepspeed_enabled}
    assert [name for name, on in enabled.items() if on] == [name for name in enabled if engine.startswith(name)]
    sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    assert sharded == (engine == "fsdp2")


def watch_experts(model: nn.Module) -> list[set[int]]:
    """The experts that each call of each router chose."""
    seen: list[set[int]] = []
    for layer in dual_path_layers(model).values():
        layer.router.register_forward_hook(lambda m, a, out: seen.append(set(out[2].flatten().tolist())))
    return seen


def train_all(engine: str, runs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Several runs, one after the other, in the same processes."""
    return [train(engine, **run) for run in runs]
