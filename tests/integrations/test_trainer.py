"""`DualPathMixin`: γ·L_bal where a trainer computes the loss itself, the routing in its logs, collapse."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
import zoo
from datasets import Dataset
from engines import Ordered, collate, micro_batches
from reference import perturb, reference_balance, reference_gradients, reference_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from moe_adapter import dual_path_layers, inject_dual_path_moe
from moe_adapter.integrations.trainer import CollapseWarning, DualPathMixin, DualPathTrainer

GAMMA = 3.0
SIZES = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
ACCUMULATION = 3


class OrderedDualPath(DualPathMixin, Ordered):
    pass


class OrderedSFT(DualPathMixin, SFTTrainer):
    _get_train_sampler = Ordered._get_train_sampler


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def make_model(gamma: float = GAMMA):
    return perturb(inject_dual_path_moe(zoo.build("qwen2"), balance_coef=gamma, **SIZES))


def own_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy with a squared-logit penalty, by the step's label tokens as compute_loss_func is to do it."""
    logits, target = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    return (loss + 1e-3 * logits.square().sum()) / num_items_in_batch


TRAINERS = {
    "label smoothing": (OrderedDualPath, TrainingArguments, dict(label_smoothing_factor=0.1), {}),
    "compute_loss_func": (OrderedDualPath, TrainingArguments, {}, dict(compute_loss_func=own_loss)),
    "the model's loss": (OrderedDualPath, TrainingArguments, {}, {}),
    "TRL": (OrderedSFT, SFTConfig, dict(max_length=None), {}),
    "TRL, label smoothing": (OrderedSFT, SFTConfig, dict(max_length=None, label_smoothing_factor=0.1), {}),
    "TRL, compute_loss_func": (OrderedSFT, SFTConfig, dict(max_length=None), dict(compute_loss_func=own_loss)),
}


def first_gradients(tmp_path, trainer: str, gamma: float, scaler=None, **more) -> dict[str, torch.Tensor]:
    kind, arguments_class, settings, keywords = TRAINERS[trainer]
    arguments = arguments_class(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **{"gradient_checkpointing": False, **settings, **more},
    )
    keep = KeepGradients()
    data = [row for batch in micro_batches("uneven", ACCUMULATION) for row in batch]
    if arguments_class is SFTConfig:
        data = Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in data])
        keywords = {**keywords, "processing_class": zoo_tokenizer(), "data_collator": collate_lists}
    else:
        keywords = {**keywords, "data_collator": collate}
    made = kind(make_model(gamma), arguments, train_dataset=data, callbacks=[keep], **keywords)
    made.accelerator.scaler = scaler
    made.train()
    return keep.gradients


def collate_lists(rows: list[dict]) -> dict[str, torch.Tensor]:
    """TRL drops the masks, which are all ones in these rows."""
    rows = [{name: torch.tensor(row[name]) for name in ("input_ids", "labels")} for row in rows]
    return collate([{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows])


def zoo_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(zoo.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t2")


def expected_balance_gradients() -> dict[str, torch.Tensor]:
    """Of γ·Σ share·L_bal over the step's micro-batches, in float64; shares by label tokens."""
    twin = reference_model(make_model())
    batches = [collate(rows) for rows in micro_batches("uneven", ACCUMULATION)]
    items = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    for batch, count in zip(batches, items, strict=True):
        twin(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        (GAMMA * count / sum(items) * reference_balance(twin, batch["attention_mask"])).backward()
    return reference_gradients(twin)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_adds_the_balance_loss_once(tmp_path, trainer, caplog):
    with caplog.at_level(logging.WARNING, "moe_adapter"):
        with_it, without = (first_gradients(tmp_path, trainer, gamma) for gamma in (GAMMA, 0.0))
    assert "γ·L_bal was not added" not in caplog.text
    for name, expected in expected_balance_gradients().items():
        if name.endswith("router.weight"):
            found = with_it[name] - without[name]
            assert (found - expected).norm() / expected.norm() < 1e-4, name


@pytest.mark.parametrize("trainer", ["label smoothing", "the model's loss", "TRL"])
def test_a_loss_scaler_scales_it_with_the_rest(tmp_path, trainer):
    """torch's own, as for float16: by a power of two, so that nothing is rounded."""
    plain, scaled = (
        first_gradients(tmp_path, trainer, GAMMA, scaler)
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0))
    )
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], 1024.0 * value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trainer", ["label smoothing", "TRL"])
def test_under_checkpointing(tmp_path, trainer, reentrant):
    settings = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    plain, checkpointed = (
        first_gradients(tmp_path, trainer, GAMMA),
        first_gradients(tmp_path, trainer, GAMMA, **settings),
    )
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trainer", ["label smoothing", "compute_loss_func", "TRL"])
def test_without_it_one_warning_says_so(tmp_path, caplog, monkeypatch, trainer):
    plain = SFTTrainer if trainer == "TRL" else Trainer
    monkeypatch.setitem(TRAINERS, trainer, (plain, *TRAINERS[trainer][1:]))
    with caplog.at_level(logging.WARNING, "moe_adapter"):
        first_gradients(tmp_path, trainer, GAMMA)
    assert caplog.text.count("γ·L_bal was not added") == 1 and "moe_adapter.integrations.trainer" in caplog.text


def train_logged(tmp_path, model, steps: int = 4, **settings) -> Trainer:
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=steps,
        logging_steps=2,
        use_cpu=True,
        report_to=["tensorboard"],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    data = [row for batch in micro_batches("uneven", steps) for row in batch]
    trainer = OrderedDualPath(model, arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    return trainer


def test_tensorboard_holds_the_routing(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = make_model()
    by_hand = reference_model(model)
    trainer = train_logged(tmp_path, model, learning_rate=0.0)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    found = {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}

    layers = [name for name, _ in dual_path_layers(model).items()]
    batches = [collate(rows) for rows in micro_batches("uneven", 4)]
    for point in range(2):
        counts, tokens, losses = {}, 0, {}
        for batch in batches[2 * point : 2 * point + 2]:
            by_hand(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            real = batch["attention_mask"].double().reshape(-1, 1)
            tokens += real.sum()
            for i, name in enumerate(layers):
                layer = by_hand.get_submodule(name)
                (logits,), (chosen,) = layer.logits, layer.chosen
                layer.logits, layer.chosen = [], []
                routed = (chosen.reshape(len(real), -1) * real).sum(0)
                counts[i] = counts.get(i, 0) + routed
                mean = (logits.softmax(-1).reshape(len(real), -1) * real).sum(0) / real.sum()
                losses[i] = losses.get(i, 0) + (routed / real.sum() * mean).sum() / 2
        for i in range(len(layers)):
            assert found[f"train/balance_loss/{i}"][point] == pytest.approx(losses[i].item(), rel=1e-5)
            for e in range(4):
                assert found[f"train/expert_load/{i}/{e}"][point] == pytest.approx((counts[i][e] / tokens).item())
        entry = trainer.state.log_history[point]
        assert entry["balance_loss"] == pytest.approx(sum(losses.values()).item() / len(losses), rel=1e-5)
        assert entry["max_load"] == pytest.approx(max((c / tokens).max().item() for c in counts.values()))
    assert found["train/alpha/0"] == pytest.approx([model.model.layers[0].mlp.alpha.item()] * 2)
    assert found["train/lambda/1"] == pytest.approx([model.model.layers[1].mlp.lam.item()] * 2)


def test_collapse_names_layer_and_expert(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.router.weight.zero_()  # topk of equal logits takes the same two
        model.model.layers[1].mlp.router.weight.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_logged(tmp_path, model, steps=8, learning_rate=0.0)
    said = [str(w.message) for w in caught if issubclass(w.category, CollapseWarning)]
    assert len(said) == 4 and all("of layer 1" in text for text in said)
    assert sum("100.0%" in text for text in said) == 2 and sum(" 0.0%" in text for text in said) == 2


def test_evaluation_and_prediction_count_nothing(tmp_path):
    model = make_model()
    trainer = train_logged(tmp_path, model)
    trainer.eval_dataset = [row for batch in micro_batches("uneven", 2) for row in batch]
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics and not trainer._statistics.sums


def test_dual_path_trainer_is_a_trainer():
    assert issubclass(DualPathTrainer, Trainer) and DualPathTrainer.__mro__[1] is DualPathMixin
