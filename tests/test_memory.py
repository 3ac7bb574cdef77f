"""Predicted memory of a training step against what torch's allocator gave out in a real one."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from cpu_fsdp import shard_on_cpus
from distributed import run_ranks
from engines import without_compiling
from peft import get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from moe_adapter import MoEAdapterError, dense, dual_path_layers, inject_dual_path_moe, set_stage
from moe_adapter.analysis.engines import ENGINES, computed_by, per_gpu, sizes_of
from moe_adapter.analysis.memory import LiveBytes, simulate_step
from moe_adapter.analysis.pretend import without_data
from moe_adapter.integrations.chunked_loss import use_chunked_loss
from moe_adapter.integrations.deepspeed import zero_config
from moe_adapter.integrations.fsdp import fsdp_arguments
from moe_adapter.integrations.peft import stage2_lora
from moe_adapter.integrations.skeleton import training_batch

TOLERANCE = 0.1
STEP = "the step that is measured"
REGIMES: dict[str, dict[str, Any]] = {  # what most of the memory is
    "activations": dict(tokens=768, vocab_size=256),
    "weights": dict(tokens=128, vocab_size=256, hidden_size=256, intermediate_size=768),
    "logits": dict(tokens=512, vocab_size=8192),
}
FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "phi": lambda sizes: tf.PhiForCausalLM(tf.PhiConfig(**sizes)),
    "qwen2": lambda sizes: tf.Qwen2ForCausalLM(tf.Qwen2Config(**sizes)),
    "qwen2_vl": lambda sizes: zoo.qwen2_vl(**sizes, rope_parameters=dict(zoo.MROPE, mrope_section=[4, 6, 6])),
}
FAST = {
    ("phi", "activations", 1, "bf16", True, "full"),
    ("qwen2", "weights", 2, "fp32", False, "full"),
    ("qwen2_vl", "activations", 2, "bf16", False, "full"),
    ("qwen2", "logits", 2, "bf16", True, "chunked"),
}
MATRIX = [
    (family, regime, stage, precision, checkpointing, "full")
    for family in FAMILIES
    for regime in REGIMES
    for stage in (1, 2)
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
] + [("qwen2", "logits", stage, precision, True, "chunked") for stage in (1, 2) for precision in ("fp32", "bf16")]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that torch's allocator had given out at a time within what `run` records as STEP.

    All that is alive then counts that was made within `run`.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()  # pyright: ignore
    step = next(event for event in events if event.name() == STEP)
    now = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        if step.start_ns() <= event.start_ns() <= step.end_ns():
            peak = max(peak, now)
    return peak


WIDTHS = dict(expert_dim=0.5, shared_expert_dim=1.0)


def build(
    family: str,
    device: str,
    *,
    stage: int,
    checkpointing: bool,
    loss: str = "full",
    widths: dict[str, Any] = WIDTHS,
    **text: Any,
) -> nn.Module:
    sizes = zoo.TEXT | dict(intermediate_size=256, max_position_embeddings=2048) | text
    with torch.device(device):
        model = FAMILIES[family](sizes)
    inject_dual_path_moe(model, **widths)
    if stage == 2:
        model = get_peft_model(model, stage2_lora(model))
    set_stage(model, stage)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if loss == "chunked":
        use_chunked_loss(model, chunk=64)
    return model.train()


def cast(model: nn.Module, precision: str) -> None:
    for parameter in model.parameters():
        wide = parameter.requires_grad or precision == "fp32"
        parameter.data = parameter.data.to(torch.float32 if wide else torch.bfloat16)


def batch_for(model: nn.Module, tokens: int, images: int = 0) -> dict[str, torch.Tensor]:
    """A batch with values: varied tokens, so that experts share them; images, where any, of 16 tokens each."""
    batch = training_batch(model, tokens, images=images, side=112)
    ids = batch["input_ids"]
    batch["input_ids"] = torch.where(ids == 1, torch.randint(3, 100, ids.shape), ids)
    batch["labels"] = batch["input_ids"].clone()
    return {name: torch.randn(value.shape) if value.is_meta else value for name, value in batch.items()}


def sizes_for(regime: str) -> tuple[int, dict[str, Any]]:
    """Tokens, and the sizes of the language model, with heads 32 wide."""
    sizes = dict(hidden_size=128) | REGIMES[regime]
    sizes["num_attention_heads"] = sizes["hidden_size"] // 32
    return sizes.pop("tokens"), sizes


def train(model: nn.Module, batch: dict[str, torch.Tensor], *, autocast: bool) -> None:
    """Two steps, of which the second is measured: the first makes the optimizer's states."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for record in (contextlib.nullcontext(), record_function(STEP)):
        with record:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("family", "regime", "stage", "precision", "checkpointing", "loss"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX],
)
def test_the_predicted_peak_is_the_allocators(family, regime, stage, precision, checkpointing, loss):
    tokens, sizes = sizes_for(regime)
    how = dict(stage=stage, checkpointing=checkpointing, loss=loss, **sizes)
    images = 5 if family == "qwen2_vl" else 0
    autocast = precision == "bf16"

    def run() -> None:
        model = build(family, "cpu", **how)
        cast(model, precision)
        train(model, batch_for(model, tokens, images), autocast=autocast)

    model = build(family, "meta", **how)
    cast(model, precision)
    batch = training_batch(model, tokens, images=images, side=112)
    predicted = simulate_step(model, batch, autocast=autocast, device="cpu")
    assert predicted.peak == pytest.approx(peak_bytes(run), rel=TOLERANCE)
    assert all(parameter.is_meta for parameter in model.parameters()), "the model is as it was"


@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(widths=dict(expert_dim=16, shared_expert_dim=16), intermediate_size=2048)],
    ids=["most is the experts'", "most is the static path's"],
)
def test_what_a_gpu_runs_instead_predicts_the_allocators_peak_too(sizes, monkeypatch):
    """Its backend, and dense blocks that take the tokens at once, run on the CPU."""
    tokens, regime = sizes_for("activations")
    how = dict(stage=1, checkpointing=False, **regime, **sizes)

    def run() -> None:
        model = build("qwen2", "cpu", **how)
        cast(model, "bf16")
        for layer in dual_path_layers(model).values():
            layer.experts.backend = "grouped_mm"
        train(model, batch_for(model, tokens), autocast=True)

    model = build("qwen2", "meta", **how)
    cast(model, "bf16")
    monkeypatch.setattr(dense, "CHUNK", 64)
    predicted = simulate_step(model, training_batch(model, tokens), device="cuda")
    monkeypatch.setattr(dense, "CHUNK", tokens)
    assert predicted.peak == pytest.approx(peak_bytes(run), rel=TOLERANCE)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_layer_norms_of_a_gpus_autocast_are_float32(device, dtype):
    model = build("phi", "meta", stage=1, checkpointing=False).bfloat16()
    norm = model.model.layers[0].input_layernorm
    with without_data(model, device), torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.empty_like(norm.weight)).dtype == dtype


def test_the_parts_of_a_step_are_adamws():
    model = build("qwen2", "meta", stage=1, checkpointing=False)
    step = simulate_step(model, training_batch(model, 256), autocast=False, device="cpu")
    new = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert step.trained == step.gradients == 4 * new
    assert 0 <= step.optimizer - 8 * new < 1000  # and counters
    assert step.peak_moment.gradients < step.gradients, "the peak is within backward, where the states are there too"
    rest = max(moment.gradients + moment.activations + moment.logits for moment in step.moments)
    assert step.peak == step.frozen + 12 * new + rest + (step.optimizer - 8 * new)


def test_live_bytes_of_tensors_known_by_hand():
    counter = LiveBytes(vocabulary=7)
    weight = torch.zeros(10, 100)
    counter.count(weight, "weights")
    with counter:
        first = torch.ones(1000)  # 4000 bytes
        view = first[10:].view(9, 110)  # no more
        first += 1  # nor this
        kept = [torch.zeros(5, 7, dtype=torch.float64)]  # 280, as wide as the vocabulary
        both = weight @ torch.ones(100, 50)  # 20000, and 2000 that stay
        assert counter.now["activations"] == 4000 + 2000 and counter.now["weights"] == 4000
        del first
        assert counter.now["activations"] == 4000 + 2000, "its view still holds it"
        del view, both
        assert counter.now == dict(weights=4000, gradients=0, optimizer=0, activations=0, logits=280) and kept
    (fullest,) = counter.fullest.values()
    assert (fullest.activations, fullest.logits) == (4000 + 20000 + 2000, 280)


def test_the_allocators_peak_of_tensors_known_by_hand():
    def run() -> None:
        held = torch.zeros(1000)  # 4000 bytes
        torch.zeros(9000)
        with record_function(STEP):
            half = torch.zeros(500)  # 2000
            (half + 1).sum() + held.sum()  # 2000 more, then numbers

    assert 8000 <= peak_bytes(run) <= 8100


@pytest.mark.parametrize("name", ["gpt2", "llava"])
def test_other_architectures_run_without_data(name):
    with torch.device("meta"):
        model = zoo.ZOO[name]()
    inject_dual_path_moe(model, expert_dim=16, shared_expert_dim=24)
    step = simulate_step(model.train(), training_batch(model, 64), autocast=False, device="cpu")
    assert step.peak > step.frozen + step.trained + step.optimizer + step.gradients


def test_models_that_cannot_be_simulated_are_refused():
    with pytest.raises(MoEAdapterError, match="holds data; expected one on the meta device"):
        simulate_step(zoo.build("qwen2"), {})
    with torch.device("meta"):
        model = inject_dual_path_moe(zoo.ZOO["qwen2"](), expert_dim=16, shared_expert_dim=24, backend="eager")
    with pytest.raises(MoEAdapterError, match="asks for the values of a tensor"):
        simulate_step(model.train(), training_batch(model, 8))
    with pytest.raises(MoEAdapterError, match="nothing in the model trains"):
        simulate_step(model.requires_grad_(False), training_batch(model, 8))


ENGINE_SIZES = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
ZERO1 = zero_config(2)
ZERO1["zero_optimization"]["stage"] = 1
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {},
    "zero1": dict(deepspeed=ZERO1),
    "zero2": dict(deepspeed=zero_config(2)),
    "zero3": dict(deepspeed=zero_config(3)),
    "fsdp2": fsdp_arguments(),
}


def engines_model(device: str) -> Any:
    with torch.device(device):
        model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**ENGINE_SIZES))
    inject_dual_path_moe(model.bfloat16(), expert_dim=0.25, shared_expert_dim=1.0)
    cast(model, "bf16")
    return model


class Everything(LiveBytes):
    """Counts what is made from the start of a run on; also local parts of DTensors, and storages that FSDP2 resizes.

    Unlike the allocator it leaves out the copies that gloo makes on the CPU and a GPU's collectives don't.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return NotImplemented if DTensor in types else super().__torch_dispatch__(func, types, args, kwargs)

    def count(self, tensor: torch.Tensor, kind: str, **how: bool) -> None:
        if not tensor.is_meta:  # as DeepSpeed notes shapes
            super().count(tensor, kind, **how)

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            before = storage.nbytes()
            self.resize(storage, size)
            self.now["activations"] += storage.nbytes() - before

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def peak(self) -> int:
        return max(moment.gradients + moment.rest for moment in self.fullest.values())


class LastStep(tf.TrainerCallback):
    """Notes the peak of the Trainer's last step."""

    def __init__(self, counter: Everything):
        self.counter, self.peak = counter, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.counter.fullest.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.peak = self.counter.peak()


def trainer_peak(engine: str, tokens: int) -> int:
    """The most bytes alive in the Trainer's third step under an engine, on this rank."""
    without_compiling()
    shard_on_cpus()
    rows = [dict(input_ids=(ids := torch.randint(3, 500, (tokens,))), labels=ids) for _ in range(8)]
    arguments = tf.TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        max_steps=3,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **SETTINGS[engine],
    )
    with Everything() as counter:
        noted = LastStep(counter)
        tf.Trainer(engines_model("cpu"), arguments, train_dataset=rows, callbacks=[noted]).train()
    return noted.peak


@pytest.mark.parametrize(
    ("engine", "tokens"),
    [pytest.param(engine, tokens, marks=pytest.mark.slow) for engine in ENGINES for tokens in (64, 1024)],
)
def test_what_an_engine_leaves_on_a_process_is_measured_there(engine, tokens):
    how = dict(engine=engine, tokens=tokens)
    alone = engine == "alone"
    measured = trainer_peak(**how) if alone else max(run_ranks(2, trainer_peak, timeout=400, **how))
    model = engines_model("meta").train()
    autocast = computed_by(engine, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = simulate_step(model, training_batch(model, tokens), autocast=autocast, device="cpu")
    predicted = per_gpu(step, sizes_of(model), engine, 1 if alone else 2).total
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_peak_of_a_gpu_is_its_allocators(checkpointing):
    sizes = dict(stage=1, checkpointing=checkpointing, hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    sizes |= dict(max_position_embeddings=4096)
    model = build("qwen2", "meta", **sizes)
    cast(model, "bf16")
    predicted = simulate_step(model, training_batch(model, 4096)).peak
    model = build("qwen2", "cpu", **sizes).cuda()
    cast(model, "bf16")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = {name: value.cuda() for name, value in batch_for(model, 4096).items()}
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated(), rel=TOLERANCE)
