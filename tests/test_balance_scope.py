"""balance_scope="global": F over all ranks and the micro-batches of the step so far, against a float64 computation."""

from __future__ import annotations

import pytest
import torch
import zoo
from distributed import run_ranks
from engines import Ordered
from reference import perturb, reference_gradients, reference_layers, reference_model
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainingArguments

from moe_adapter import balance_loss, dual_path_layers, inject_dual_path_moe
from moe_adapter.integrations.trainer import DualPathMixin

SIZES = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


class OrderedDualPath(DualPathMixin, Ordered):
    pass


def make_model(scope: str = "global", **config) -> nn.Module:
    return perturb(inject_dual_path_moe(zoo.build("qwen2"), balance_scope=scope, **SIZES, **config), 0.3).train()


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    """Rows of a random length, the last of them padded."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(4, 12, (1,), generator=generator))
    ids = torch.randint(3, 100, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def expected_loss(twin: nn.Module, groups: list[list[int]], own: int) -> torch.Tensor:
    """L_bal of batch `own` with F over all batches of `groups`, in float64."""
    losses, counts, tokens = {}, {}, 0
    for seed in (seed for group in groups for seed in group):
        batch = make_batch(seed)
        twin(**batch, use_cache=False)
        real = batch["attention_mask"].double().reshape(-1, 1)
        tokens += int(real.sum())
        for name, layer in reference_layers(twin).items():
            (logits,), (chosen,) = layer.logits, layer.chosen
            layer.logits, layer.chosen = [], []
            counts[name] = counts.get(name, 0) + (chosen.reshape(len(real), -1) * real).sum(0).detach()
            if seed == own:
                losses[name] = (logits.softmax(-1).reshape(len(real), -1) * real).sum(0) / real.sum()
    return torch.stack([(counts[name] / tokens * losses[name]).sum() for name in losses]).mean()


def found_loss(model: nn.Module, seed: int) -> torch.Tensor:
    logits = model(**make_batch(seed), use_cache=False).logits
    return balance_loss(model) + 0.0 * logits.sum()  # reentrant checkpointing recomputes for a loss's sake only


def assert_gradients(model: nn.Module, twin: nn.Module) -> None:
    for prefix, layer in dual_path_layers(model).items():
        expected = reference_gradients(twin)[f"{prefix}.router.weight"]
        error = (layer.router.weight.grad.double() - expected).norm() / expected.norm()
        assert error < 2e-5, f"{prefix}: {error:.1e}"


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_micro_batches_of_the_step_so_far(kind):
    model = make_model()
    twin = reference_model(model)
    if CHECKPOINTING[kind] is not None:
        model.activation_checkpointing_enable(dict(use_reentrant=CHECKPOINTING[kind]))
    for seeds in ([0], [0, 1], [0, 1, 2]):
        found, expected = found_loss(model, seeds[-1]), expected_loss(twin, [seeds], seeds[-1])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        found.backward()
        expected.backward()
    assert_gradients(model, twin)


def test_an_optimizers_step_starts_anew():
    model = make_model()
    twin = reference_model(model)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    found_loss(model, 0)
    optimizer.step()
    torch.testing.assert_close(found_loss(model, 1).double(), expected_loss(twin, [[1]], 1), rtol=1e-5, atol=0)


def test_a_step_skipped_for_overflow_starts_anew(tmp_path):
    """A loss scale that overflows float32 in the first step: GradScaler then leaves the optimizer's step out."""
    model, seen = make_model(balance_coef=1e6), []
    twin = reference_model(model)
    model.register_forward_hook(lambda *_: seen.append(balance_loss(model).detach()))
    arguments = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.0)
    arguments |= dict(optim="sgd", max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    batches = [{**make_batch(seed), "labels": make_batch(seed)["input_ids"]} for seed in range(4)]
    take = dict(train_dataset=batches, data_collator=lambda rows: rows[0])
    trainer = OrderedDualPath(model, TrainingArguments(str(tmp_path), **arguments), **take)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117)
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(len(seen)))
    trainer.train()
    hook.remove()
    assert steps == [4], "the first step was to be left out, the second made"
    for found, seeds in zip(seen, ([0], [0, 1], [2], [2, 3]), strict=True):
        torch.testing.assert_close(found.double(), expected_loss(twin, [seeds], seeds[-1]), rtol=1e-5, atol=0)


def test_asking_twice_counts_once():
    model = make_model()
    twin = reference_model(model)
    found_loss(model, 0)
    found_loss(model, 1)
    again = balance_loss(model)
    torch.testing.assert_close(again.double(), expected_loss(twin, [[0, 1]], 1), rtol=1e-5, atol=0)


def test_the_models_loss_holds_it():
    model, batch = make_model(), make_batch(0)
    plain = make_model("micro")
    for one in (model, plain):
        one(**batch, labels=batch["input_ids"])
    labelled = dict(make_batch(1))
    losses = [one(**labelled, labels=labelled["input_ids"]).loss for one in (model, plain)]
    gap = losses[0] - losses[1]
    assert gap.abs() > 1e-9
    torch.testing.assert_close(gap, 1e-3 * (balance_loss(model) - balance_loss(plain)), rtol=1e-2, atol=1e-9)


def over_ranks() -> list[tuple[float, dict[str, torch.Tensor]]]:
    """On each rank, two micro-batches of its own: the losses, and the routers' gradients after each."""
    rank, model, out = torch.distributed.get_rank(), make_model(), []
    for step in range(2):
        loss = found_loss(model, 2 * step + rank)
        loss.backward()
        grads = {name: layer.router.weight.grad.clone() for name, layer in dual_path_layers(model).items()}
        out.append((loss.item(), grads))
    return out


def test_over_ranks_and_micro_batches():
    found = run_ranks(2, over_ranks)
    for rank in range(2):
        twin = reference_model(make_model())
        for step, (loss, grads) in enumerate(found[rank]):
            groups = [[0, 1], [2, 3]][: step + 1]
            expected = expected_loss(twin, groups, 2 * step + rank)
            assert loss == pytest.approx(expected.item(), rel=1e-5)
            expected.backward()
            for name, layer in reference_layers(twin).items():
                torch.testing.assert_close(grads[name].double(), layer["router.weight"].grad, rtol=1e-4, atol=1e-8)
