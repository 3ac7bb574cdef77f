"""The chunked loss against the plain one: value, gradients, memory, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from distributed import run_ranks
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from moe_adapter import MoEAdapterError, eject_dual_path_moe, inject_dual_path_moe, set_stage
from moe_adapter.analysis.memory import LiveBytes
from moe_adapter.integrations.chunked_loss import use_chunked_loss
from moe_adapter.integrations.deepspeed import zero_config
from moe_adapter.integrations.peft import stage2_lora

FAMILIES = ("qwen2_vl", "llava", "llama", "phi", "gpt2", "bloom")  # with a bias at the head, with a tied one
SIZES = dict(expert_dim=16, shared_expert_dim=24, balance_coef=1.0)


def build(name: str = "qwen2", *, trains_all: bool = False, **text: Any) -> nn.Module:
    model = inject_dual_path_moe(zoo.build(name, **text), **SIZES).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.requires_grad_(True) if trains_all else model


def batch(rows: int = 2, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Random tokens; the labels of the first row are half masked, of the second only the last two count."""
    ids = torch.randint(3, 100, (rows, tokens))
    labels = ids.clone()
    labels[0, : tokens // 2] = -100
    labels[1:, :-2] = -100
    return dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))


def loss_and_gradients(model: nn.Module, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["mean", "items", "items in a tensor"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_plain_ones(name, items):
    model = build(name, trains_all=True)
    inputs = batch() | ({} if items is None else dict(num_items_in_batch=items))
    plain = loss_and_gradients(model, **inputs)
    with use_chunked_loss(model, chunk=3):
        assert_same(loss_and_gradients(model, **inputs), plain)


def test_it_is_the_cross_entropy_of_a_float64_reference():
    model = build("phi", trains_all=True).double()
    inputs = batch()
    output = model(**{**inputs, "labels": None}).logits
    expected = F.cross_entropy(output[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model._forward_hooks.clear()  # γ·L_bal is no part of the reference
    use_chunked_loss(model, chunk=3)
    found = loss_and_gradients(model, **inputs)
    assert_same(found[0], expected.detach(), rtol=1e-12, atol=0)
    assert_same(found[1], gradients, rtol=1e-9, atol=1e-12)


def test_in_bf16_the_loss_stays_float32_and_gradients_agree_to_their_rounding():
    model = build().bfloat16()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    inputs = batch(tokens=64)
    with torch.autocast("cpu", torch.bfloat16):
        plain_loss, plain = loss_and_gradients(model, **inputs)
        with use_chunked_loss(model, chunk=16):
            loss, found = loss_and_gradients(model, **inputs)
    assert loss.dtype == torch.float32
    assert_same(loss, plain_loss)
    for name, gradient in plain.items():
        assert (found[name] - gradient).norm() <= 0.01 * gradient.norm(), name


def test_shifted_labels_as_sequence_parallel_gives_them():
    model, inputs = build(), batch()
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    shifted[1] = torch.randint(3, 100, (9,))  # which no shift of the labels gives
    plain = loss_and_gradients(model, **inputs, shift_labels=shifted)
    with use_chunked_loss(model, chunk=3):
        assert_same(loss_and_gradients(model, **inputs, shift_labels=shifted), plain)


@pytest.mark.parametrize("items", [None, 7])
def test_a_batch_without_labels_that_count_is_as_plain(items):
    model, inputs = build(), batch() | dict(num_items_in_batch=items)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    plain = loss_and_gradients(model, **inputs)
    assert plain[0].isnan() == (items is None)
    with use_chunked_loss(model):
        assert_same(loss_and_gradients(model, **inputs), plain)


def test_without_labels_in_evaluation_and_in_generate_all_is_as_before():
    model, inputs = build(), batch()
    free = {**inputs, "labels": None}

    def answers() -> list[torch.Tensor]:
        trained = model.train()(**free).logits
        output = model.eval()(**inputs)
        written = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
        return [trained, output.logits, output.loss, written]

    before = answers()
    with use_chunked_loss(model):
        assert all(map(torch.equal, answers(), before))
        assert model.train()(**inputs).logits.shape == (2, 9, 0)


def test_remove_leaves_nothing_and_the_layers_can_be_ejected_under_it():
    model, inputs = build(), batch()
    plain, state = loss_and_gradients(model, **inputs), set(vars(model))
    handle = use_chunked_loss(model)
    loss_and_gradients(model, **inputs)
    handle.remove()
    assert set(vars(model)) == state and "forward" not in vars(model.lm_head)
    again = loss_and_gradients(model, **inputs)
    assert torch.equal(again[0], plain[0]) and all(torch.equal(again[1][name], plain[1][name]) for name in plain[1])
    with use_chunked_loss(model):
        eject_dual_path_moe(model)
        assert_same(model(**inputs).loss, zoo.build("qwen2").train()(**inputs).loss)


def test_a_copy_of_the_model_has_a_chunked_loss_of_its_own():
    model, inputs = build(), batch()
    use_chunked_loss(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert copied(**inputs).loss != model(**inputs).loss
    assert copied(**inputs).logits.shape[-1] == 0


def test_peft_wrapped_models_train_with_it():
    model = inject_dual_path_moe(zoo.build("qwen2_vl"), **SIZES)
    tuned = get_peft_model(model, stage2_lora(model, lora_dropout=0.0)).train()
    set_stage(tuned, 2)
    inputs = batch()
    plain = loss_and_gradients(tuned, **inputs)
    with use_chunked_loss(tuned, chunk=3):
        assert_same(loss_and_gradients(tuned, **inputs), plain)


def test_softcapped_logits_are_refused_at_the_first_step():
    model = build("gemma2")
    plain = model(**batch()).loss
    handle = use_chunked_loss(model)
    with pytest.raises(MoEAdapterError, match="Gemma2ForCausalLM changes its logits"):
        model(**batch())
    handle.remove()
    assert model(**batch()).loss.isfinite() and plain.isfinite()


def test_heads_that_are_no_plain_map_and_other_losses_are_refused():
    with pytest.raises(MoEAdapterError, match="got Linear for its head"):
        use_chunked_loss(get_peft_model(zoo.build("qwen2"), LoraConfig(target_modules=["lm_head"])))
    model = build()
    use_chunked_loss(model)
    with pytest.raises(MoEAdapterError, match="not chunked already"):
        use_chunked_loss(model)
    other = build()
    other.loss_function = lambda **_: None
    with pytest.raises(MoEAdapterError, match="ForCausalLMLoss"):
        use_chunked_loss(other)
    with pytest.raises(MoEAdapterError, match="got NoneType for its head"):
        use_chunked_loss(nn.Linear(2, 2))


def test_no_more_logits_than_a_chunks_are_ever_alive():
    vocabulary, tokens, chunk = 4096, 256, 16
    model, inputs = build("qwen2_vl", vocab_size=vocabulary), batch(1, tokens)
    inputs["labels"] = inputs["input_ids"].clone()

    def most() -> int:
        counter = LiveBytes(vocabulary)
        counter.count(model.lm_head.weight, "weights")
        with counter:
            model(**inputs).loss.backward()
        return max(moment.logits for moment in counter.fullest.values())

    assert most() >= 2 * 4 * tokens * vocabulary  # what the plain loss holds: at least log-probabilities and a gradient
    with use_chunked_loss(model, chunk=chunk):
        assert most() <= 3 * 4 * chunk * vocabulary


def trained(chunked: bool, engine: dict[str, Any], uneven: bool = False) -> dict[str, torch.Tensor]:
    """Parameters after four micro-batches of the Trainer; with `uneven` rank 1 has one label where rank 0 has many."""
    torch.manual_seed(0)
    model = build()
    if chunked:
        use_chunked_loss(model, chunk=4)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    rows = [dict(input_ids=torch.randint(3, 100, (40,))) for _ in range(8)]
    for index, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][: 39 if uneven and index % 2 else 4 * index] = -100
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",  # Adam makes a step of a gradient's rounding
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **engine,
    )
    Ordered(model, arguments, train_dataset=rows).train()
    assert rank in (0, 1)
    from moe_adapter.sharding import whole

    return {name: whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}


class Ordered(Trainer):
    """A Trainer that takes the data in their order."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_the_trainer_under_accumulation_trains_the_same_model():
    assert_same(trained(True, {}), trained(False, {}))


@pytest.mark.slow
def test_under_zero3_ranks_with_unequal_numbers_of_labels_neither_hang_nor_differ():
    engine = dict(deepspeed=zero_config(3))
    plain = run_ranks(2, trained, chunked=False, engine=engine, uneven=True)
    found = run_ranks(2, trained, chunked=True, engine=engine, uneven=True)
    assert_same(found[0], plain[0], atol=1e-5)
    assert_same(found[1], found[0])
