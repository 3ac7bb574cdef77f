"""Where γ·L_bal meets the loss: every shape of output, trainers' own losses, and a word where it can't be added."""

from __future__ import annotations

import logging
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
import zoo
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from moe_adapter import MoEAdapterError, balance_loss, inject_dual_path_moe, set_stage

GAMMA = 100.0
SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24, balance_coef=GAMMA)
Named = namedtuple("Named", ["loss", "logits"])

OUTPUTS = {
    "a scalar": lambda loss, logits: loss,
    "(loss, logits)": lambda loss, logits: (loss, logits),
    "(logits, loss)": lambda loss, logits: (logits, loss),
    "a named tuple": Named,
    "a dict": lambda loss, logits: dict(loss=loss, logits=logits),
    "an object": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
    "a ModelOutput": lambda loss, logits: tf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits),
}


class Net(nn.Module):
    """A user's own model, whose forward gives a loss in any of the usual shapes."""

    def __init__(self, shape):
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.shape = shape

    def forward(self, x):
        y = self.ffn(x)
        return self.shape(y.square().mean(), y)


def loss_in(output) -> torch.Tensor:
    parts = list(output.values()) if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return output.loss if hasattr(output, "loss") else next(part for part in parts if part.dim() == 0)


@pytest.mark.parametrize("shape", OUTPUTS)
def test_every_shape_of_output(shape):
    net = inject_dual_path_moe(Net(OUTPUTS[shape]), target="ffn", **SIZES)
    x = torch.randn(5, 8)
    plain = net.eval()(x)
    trained = net.train()(x)
    assert type(trained) is type(plain)
    torch.testing.assert_close(loss_in(trained), loss_in(plain) + GAMMA * balance_loss(net))


def test_a_model_without_a_loss_is_told_once(caplog):
    net = inject_dual_path_moe(Net(lambda loss, logits: logits), target="ffn", **SIZES).train()
    with caplog.at_level(logging.WARNING, logger="moe_adapter.objective"):
        for _ in range(3):
            net(torch.randn(5, 8))
        with torch.no_grad():
            net(torch.randn(5, 8))
    assert len(caplog.records) == 1 and "balance_loss(model)" in caplog.text


def test_an_injected_part_of_a_model_is_told_that_no_loss_passes(caplog):
    model = zoo.build("qwen2").train()
    inject_dual_path_moe(model.model, **SIZES)
    ids = torch.tensor([[3, 4, 5]])
    with caplog.at_level(logging.WARNING, logger="moe_adapter.objective"):
        model(input_ids=ids, labels=ids)
    assert "γ·L_bal was not added" in caplog.text


def test_moe_blocks_that_peft_froze_are_noticed(caplog):
    model = inject_dual_path_moe(zoo.build("qwen2"), **SIZES)
    set_stage(model, 2)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    ids = torch.tensor([[3, 4, 5]])
    with caplog.at_level(logging.WARNING, logger="moe_adapter.objective"):
        tuned(input_ids=ids, labels=ids)
    assert "set_stage(model, 2)" in caplog.text
    caplog.clear()
    set_stage(tuned, 2)
    tuned(input_ids=ids, labels=ids)
    assert not caplog.records


def test_the_loss_of_a_peft_model_holds_it():
    """peft calls the base model in its own way, by task type; the hook must be passed all the same."""
    model = inject_dual_path_moe(zoo.build("qwen2"), **SIZES)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    set_stage(tuned, 2)
    ids = torch.tensor([[3, 4, 5, 6]])
    plain = tuned.eval()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(tuned.train()(input_ids=ids, labels=ids).loss, plain + GAMMA * balance_loss(tuned))


def train(model, rows, tmp_path, **options) -> float:
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        learning_rate=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_classifiers_labels_are_not_shifted(batch, tmp_path):
    """One label a row: none may be left out of a micro-batch's share."""
    config = tf.Qwen2Config(**{**zoo.TEXT, "num_labels": 3, "pad_token_id": 0})
    model = inject_dual_path_moe(tf.Qwen2ForSequenceClassification(config), **SIZES)
    rows = [dict(input_ids=torch.tensor([3 + i, 4, 5]), labels=torch.tensor(i % 3)) for i in range(2 * batch)]
    loss = train(model, rows, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=2)
    batches = [torch.stack([row["input_ids"] for row in rows[i : i + batch]]) for i in (0, batch)]
    labels = [torch.stack([row["labels"] for row in rows[i : i + batch]]) for i in (0, batch)]
    order = [model.train()(input_ids=ids, labels=label).loss.item() for ids, label in zip(batches, labels, strict=True)]
    assert loss == pytest.approx(sum(order) / 2, rel=0.05)


@pytest.mark.parametrize("own_loss", ["label smoothing", "compute_loss_func"])
def test_a_trainer_with_its_own_loss_runs_and_is_told(own_loss, tmp_path, caplog):
    model = inject_dual_path_moe(zoo.build("qwen2"), **SIZES)
    rows = [dict(input_ids=torch.tensor([3, 4, 5]), labels=torch.tensor([3, 4, 5]))] * 2
    arguments = dict(output_dir=tmp_path, max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    arguments |= dict(label_smoothing_factor=0.1) if own_loss == "label smoothing" else {}
    options = {} if arguments.get("label_smoothing_factor") else dict(compute_loss_func=own)
    with caplog.at_level(logging.WARNING, logger="moe_adapter.objective"):
        Trainer(model, TrainingArguments(**arguments), train_dataset=rows, **options).train()
    assert len(caplog.records) == 1 and "compute_loss_func" in caplog.text


def own(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def test_a_balance_gradient_that_would_be_lost_is_an_error():
    """Reentrant checkpointing, and L_bal alone: nothing recomputes the blocks."""
    model = inject_dual_path_moe(zoo.build("qwen2"), **SIZES).train()
    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids)
    with pytest.raises(MoEAdapterError, match="use_reentrant=False"):
        balance_loss(model).backward()
