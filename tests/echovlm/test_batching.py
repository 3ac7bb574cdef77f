"""Batches of long inputs: packed into one row they are what they were padded; grouped by length they keep an order."""

from __future__ import annotations

import copy

import pytest
import torch
from echovlm.recipe_parts import TEXTS, collator, example, small_config, tokenizer
from torch import nn
from transformers.trainer_pt_utils import LengthGroupedSampler

from examples.echovlm.batching import CASE_IDS, LengthGrouped, Packed, WithCases, lengths
from examples.echovlm.families import build_model
from moe_adapter import balance_loss, dual_path_layers, inject_dual_path_moe, set_stage
from moe_adapter.losses import routed_fraction

TURNS = [example(frames=3), example("And this?", TEXTS[1], frames=1), example("Anything else?", "No.", frames=2)]
GAMMA = 3.0  # so that the balance loss is seen in the gradients


def _model(attention: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(small_config(attention=attention), tokenizer())
    inject_dual_path_moe(model, num_experts=4, expert_dim=16, shared_expert_dim=16, balance_coef=GAMMA)
    for layer in dual_path_layers(model).values():  # else the experts start at zero and their routers learn nothing
        nn.init.normal_(layer.experts.down_proj, std=0.1)
        nn.init.normal_(layer.shared_expert.down_proj.weight, std=0.1)
        nn.init.normal_(layer.router.weight, std=1.0)
    set_stage(model, 1)
    return model.train()


def _run(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], dict]:
    """Loss, L_bal, F_e of each layer, gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    fractions = [routed_fraction(layer.routing.calls) for layer in dual_path_layers(model).values()]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), balance_loss(model).detach(), fractions, gradients


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_equals_padded(attention: str) -> None:
    """Loss, L_bal, what is routed where, and all gradients, over the same tokens (|B| without padding)."""
    model = _model(attention)
    padded, packed = collator()(TURNS), Packed(collator(), model)(TURNS)
    assert padded["attention_mask"].numel() > padded["attention_mask"].sum() == packed["input_ids"].numel()
    expected, found = _run(model, padded), _run(model, packed)
    for before, after in zip(expected[:3], found[:3], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    assert any("router" in name for name in found[3])
    for name, gradient in expected[3].items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[3][name] / scale, gradient / scale, rtol=0, atol=1e-4, msg=name)


def test_packed_rows_need_not_be_alike_to_the_mean_of_their_own_losses() -> None:
    """F and G of (6) and (7) are over the pack: Σ F·G of the whole is not the mean of the parts'."""
    model = _model("eager")
    whole = _run(model, Packed(collator(), model)(TURNS))[1]
    parts = [_run(model, collator()([turn])) for turn in TURNS]
    sizes = torch.tensor([collator()([turn])["input_ids"].numel() for turn in TURNS], dtype=torch.float32)
    together = sum(size * fractions[0] for size, (_, _, fractions, _) in zip(sizes, parts, strict=True)) / sizes.sum()
    torch.testing.assert_close(_run(model, collator()(TURNS))[2][0], together)
    assert not torch.isclose(whole, sum(part[1] for part in parts) / len(parts), rtol=1e-4)


def test_a_batch_names_its_cases() -> None:
    batch = WithCases(collator())([example(), tokenizer()(TEXTS[0])["input_ids"]])
    assert batch[CASE_IDS] == ["1", ""]
    assert WithCases(Packed(collator(), _model("eager")))(TURNS)[CASE_IDS] == ["1"] * 3


def test_lengths_are_those_of_the_batches() -> None:
    assert lengths(TURNS, collator()) == [collator()([turn])["input_ids"].numel() for turn in TURNS]
    texts = [example(frames=0), example(answer=TEXTS[1], frames=0)]
    assert lengths(texts, collator()) == [collator()([turn])["input_ids"].numel() for turn in texts]


def test_grouped_batches_hold_like_lengths_in_an_order_of_seed_and_epoch() -> None:
    sizes = torch.randint(10, 1000, (400,)).tolist()
    sampler = LengthGrouped(4, sizes, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(400))
    spread = [max(part) - min(part) for part in _batches([sizes[i] for i in order])]
    assert sum(spread) < sum(max(part) - min(part) for part in _batches(sizes)) / 5
    torch.manual_seed(99)
    again = copy.deepcopy(sampler)
    again.set_epoch(0)
    assert list(again) == order
    again.set_epoch(1)
    assert list(again) != order
    plain = LengthGroupedSampler(4, lengths=sizes)
    assert list(plain) != list(plain), "transformers' own draws from the global random numbers"


def _batches(values: list[int]) -> list[list[int]]:
    return [values[start : start + 4] for start in range(0, len(values), 4)]
