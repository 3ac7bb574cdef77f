"""The balance loss inside the model's loss, against the float64 reference, wherever other libraries lose it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
import zoo
from reference import (
    assert_same_gradients,
    perturb,
    reference_balance,
    reference_gradients,
    reference_loss,
    reference_model,
)

from moe_adapter import balance_loss, dual_path_layers, inject_dual_path_moe, static_only
from moe_adapter.losses import layer_balance_loss

SIZES = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
GAMMA = 3.0  # large, so that a lost or doubled balance gradient can't hide
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def make_model(name: str = "qwen2", **config) -> torch.nn.Module:
    model = inject_dual_path_moe(zoo.build(name), **{**SIZES, "balance_coef": GAMMA, **config})
    return perturb(model).train()


def make_batch(seed: int = 0, batch: int = 3, length: int = 9, padding: str | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (batch, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = -100
    if padding:
        for row in range(batch):
            pad = slice(0, row + 1) if padding == "left" else slice(length - row - 1, length)
            mask[row, pad], labels[row, pad], ids[row, pad] = 0, -100, 0
    return dict(input_ids=ids, labels=labels, attention_mask=mask)


def checkpoint(model: torch.nn.Module, kind: str) -> None:
    if CHECKPOINTING[kind] is not None:
        model.activation_checkpointing_enable(dict(use_reentrant=CHECKPOINTING[kind]))


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize(
    ("name", "padding"),
    [
        *((name, padding) for name in ("qwen2", "qwen2_vl") for padding in (None, "left", "right")),
        ("bloom", None),  # transformers' own Bloom gives NaN at left padding in float64
        ("bloom", "right"),
    ],
)
def test_gradients_equal_the_reference(name, kind, padding):
    model, batch = make_model(name), make_batch(padding=padding)
    twin = reference_model(model)
    checkpoint(model, kind)
    loss = model(**batch, use_cache=False).loss
    expected = reference_loss(twin, batch, GAMMA)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_two_forwards_before_one_backward_with_weights_of_their_own(kind):
    model, batches = make_model(), [make_batch(0), make_batch(1, batch=2, length=6, padding="left")]
    twin = reference_model(model)
    checkpoint(model, kind)
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    (0.3 * losses[0] + 2.0 * losses[1]).backward()
    expected = [reference_loss(twin, batch, GAMMA) for batch in batches]
    (0.3 * expected[0] + 2.0 * expected[1]).backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_first_of_two_forwards_backward_alone(kind):
    model, batches = make_model(), [make_batch(0), make_batch(1)]
    twin = reference_model(model)
    checkpoint(model, kind)
    first, _second = [model(**batch, use_cache=False).loss for batch in batches]
    first.backward()
    reference_loss(twin, batches[0], GAMMA).backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_balance_loss_added_by_hand(kind):
    model, batch = make_model(balance_coef=0.0), make_batch(padding="left")
    twin = reference_model(model)
    checkpoint(model, kind)
    loss = model(**batch, use_cache=False).loss
    (loss + GAMMA * balance_loss(model)).backward()
    reference_loss(twin, batch, GAMMA).backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_recomputation_counts_nothing_twice(kind):
    model, batch = make_model(), make_batch()
    checkpoint(model, kind)
    model(**batch, use_cache=False).loss.backward()
    assert [len(layer.routing.calls) for layer in dual_path_layers(model).values()] == [1, 1]


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_gradients_of_a_scaled_loss_scale(kind):
    """Loss scaling and accumulation divide or multiply the loss after the model returned it."""
    model, batch = make_model(), make_batch()
    twin = reference_model(model)
    checkpoint(model, kind)
    (model(**batch, use_cache=False).loss * 1024.0).backward()
    (reference_loss(twin, batch, GAMMA) * 1024.0).backward()
    assert_same_gradients(model, twin)


def test_float16_with_a_loss_scaler():
    model, batch = make_model(), make_batch()
    twin = reference_model(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch, use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    reference_loss(twin, batch, GAMMA).backward()
    expected = reference_gradients(twin)
    for name, layer in dual_path_layers(model).items():
        found = layer.router.weight.grad.double()
        gap = found - expected[f"{name}.router.weight"]
        assert gap.norm() / found.norm() < 1e-2


def test_balance_loss_alone_has_a_gradient():
    model, batch = make_model(), make_batch(padding="right")
    twin = reference_model(model)
    model(**batch)
    weights = [layer.router.weight for layer in dual_path_layers(model).values()]
    found = torch.autograd.grad(balance_loss(model), weights)
    twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    loss = reference_balance(twin, batch["attention_mask"])
    names = [name for name, _ in twin.named_parameters() if name.endswith("router/weight")]
    expected = torch.autograd.grad(loss, [twin.get_parameter(name) for name in names])
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-7)


def test_evaluation_adds_nothing():
    model, batch = make_model(), make_batch()
    model.eval()
    loss = model(**batch).loss
    twin = reference_model(model)
    torch.testing.assert_close(loss.double(), reference_loss(twin, batch, 0.0), rtol=1e-5, atol=0)


def test_perfect_balance_gives_k_over_e_and_no_tokens_give_zero():
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        for layer in dual_path_layers(model).values():
            layer.router.weight.zero_()
    model(**batch)
    torch.testing.assert_close(balance_loss(model).item(), SIZES["top_k"] / SIZES["num_experts"])
    batch["attention_mask"].zero_()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert balance_loss(model).item() == 0.0


def test_padding_does_not_change_the_balance_loss():
    model = make_model().eval()
    batch = make_batch(padding="left")
    rows = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    padded = balance_loss(model)
    calls = []
    for row in rows:
        model(input_ids=row[None])
        calls.append([layer.routing.calls[0] for layer in dual_path_layers(model).values()])
    single = torch.stack([layer_balance_loss(list(of_layer)) for of_layer in zip(*calls, strict=True)]).mean()
    torch.testing.assert_close(padded, single, rtol=1e-5, atol=0)


def test_cached_decoding_takes_the_last_columns_of_a_longer_mask():
    model = make_model().eval()
    batch = make_batch(padding="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        step = torch.full((3, 1), 5)
        mask = torch.cat([mask, torch.tensor([[1], [0], [1]])], dim=1)
        model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True)
    for layer in dual_path_layers(model).values():
        assert layer.routing.calls[-1].mask_T.tolist() == [True, False, True]


def test_a_layer_called_after_its_stack_starts_a_pass_of_its_own():
    model = make_model().eval()
    model(**make_batch(padding="left"))
    layer = next(iter(dual_path_layers(model).values()))
    layer(torch.randn(5, 32))
    assert [call.mask_T for call in layer.routing.calls] == [None]


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_vision_blocks_learn_balance_under_checkpointing(kind):
    """Pixels carry no gradient, so under reentrant checkpointing the blocks' inputs must be given one."""
    model = inject_dual_path_moe(zoo.build("qwen2_vl"), r"visual\.blocks\.\d+\.mlp", **SIZES, balance_coef=GAMMA)
    perturb(model).train()
    ids = torch.tensor([[5, 122, *[120] * 4, 123, 7, 8]])
    batch = dict(input_ids=ids, labels=ids, pixel_values=torch.randn(16, 3 * 2 * 14 * 14))
    batch |= dict(image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=(ids == 120).long())
    plain = copy.deepcopy(model)
    checkpoint(model, kind)
    for net in (model, plain):
        net(**batch, use_cache=False).loss.backward()
    for mine, theirs in zip(dual_path_layers(model).values(), dual_path_layers(plain).values(), strict=True):
        torch.testing.assert_close(mine.router.weight.grad, theirs.router.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_an_image_classifier_learns_balance_under_checkpointing(kind):
    """Here transformers itself lets no input of a block require a gradient."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28)
    model = tf.ViTForImageClassification(tf.ViTConfig(**sizes, patch_size=14, num_labels=3))
    inject_dual_path_moe(model, lambda name, module: name.endswith("mlp"), **SIZES, balance_coef=GAMMA)
    perturb(model).train()
    batch = dict(pixel_values=torch.randn(2, 3, 28, 28), labels=torch.tensor([0, 2]))
    plain = copy.deepcopy(model)
    checkpoint(model, kind)
    for net in (model, plain):
        net(**batch).loss.backward()
    for mine, theirs in zip(dual_path_layers(model).values(), dual_path_layers(plain).values(), strict=True):
        torch.testing.assert_close(mine.router.weight.grad, theirs.router.weight.grad, rtol=1e-4, atol=1e-6)


def test_static_only_routes_nothing_and_adds_nothing():
    model, batch = make_model(), make_batch()
    with static_only(model):
        loss = model(**batch).loss
    base = zoo.build("qwen2").train()
    torch.testing.assert_close(loss, base(**batch).loss, rtol=0, atol=0)


def test_an_injected_model_can_be_copied_after_a_forward():
    model, batch = make_model(), make_batch()
    model(**batch)
    twin = copy.deepcopy(model)
    loss, other = model(**batch).loss, twin(**batch).loss
    assert torch.equal(loss, other)
    loss.backward()
    for mine, theirs in zip(dual_path_layers(model).values(), dual_path_layers(twin).values(), strict=True):
        assert mine.routing is not theirs.routing and mine.routing.last is not theirs.routing.last
        assert theirs.router.weight.grad is None
