"""The change in loss and in answers of each group, against runs one case at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_adapter import MoEAdapterError, dual_path_layers
from moe_adapter.analysis.effects import CaseBatch, effect
from moe_adapter.analysis.intervene import ForceRoute, KnockOut, UniformWeights, intervene
from moe_adapter.analysis.resampling import Resampling

INTERVENTIONS = {"without 1": KnockOut(experts=1), "all to 2, even": [ForceRoute(experts=2), UniformWeights()]}


@pytest.fixture
def cases() -> dict[str, tuple[str, list[tuple[torch.Tensor, int]]]]:
    """(group, its sequences, each with the length of its prompt) by case; one case has two sequences."""
    generator = torch.Generator().manual_seed(0)
    organs = {"a": "liver", "b": "heart", "c": "liver", "d": "heart", "e": "heart"}
    return {
        case: (
            organ,
            [
                (torch.randint(3, 100, (6 + 2 * number + turn,), generator=generator), 3)
                for turn in range(2 if case == "c" else 1)
            ],
        )
        for number, (case, organ) in enumerate(organs.items())
    }


@pytest.fixture
def batches(cases) -> list[CaseBatch]:
    """Two rows a batch, padded right, labels on the answer alone."""
    rows = [(case, organ, ids, prompt) for case, (organ, turns) in cases.items() for ids, prompt in turns]
    found = []
    for start in range(0, len(rows), 2):
        part = rows[start : start + 2]
        pad = torch.nn.utils.rnn.pad_sequence
        labels = [torch.cat([torch.full((prompt,), -100), ids[prompt:]]) for *_, ids, prompt in part]
        inputs = {
            "input_ids": pad([ids for *_, ids, _ in part], batch_first=True),
            "attention_mask": pad([torch.ones_like(ids) for *_, ids, _ in part], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }
        found.append(CaseBatch(inputs, [row[0] for row in part], [row[1] for row in part]))
    return found


def loss_of(model, ids: torch.Tensor, prompt: int) -> tuple[float, int]:
    with torch.no_grad():
        log_p = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
    losses = -log_p.gather(1, ids[1:, None])[prompt - 1 :, 0]
    return losses.sum().item(), len(losses)


def test_losses_are_those_of_each_case_by_itself(vlm, cases, batches):
    table = effect(vlm, batches, INTERVENTIONS).to_table().to_pylist()
    found = {(row["intervention"], row["group"]): row for row in table}
    assert list(found) == [(name, group) for name in INTERVENTIONS for group in ("heart", "liver", "overall")]
    expected: dict[str, dict[str, list[float]]] = {}
    for name, changes in {"": [], **INTERVENTIONS}.items():
        for case, (_, turns) in cases.items():
            changes = changes if isinstance(changes, list) else [changes]
            with intervene(vlm, *changes):
                sums = np.sum([loss_of(vlm, ids, prompt) for ids, prompt in turns], axis=0)
            expected.setdefault(name, {})[case] = sums[0] / sums[1]
    for (name, group), row in found.items():
        of_group = [case for case, (organ, _) in cases.items() if group in (organ, "overall")]
        baseline = np.mean([expected[""][case] for case in of_group])
        change = np.mean([expected[name][case] - expected[""][case] for case in of_group])
        assert (row["measure"], row["cases"]) == ("loss", len(of_group))
        assert row["baseline"] == pytest.approx(baseline, rel=1e-5)
        assert row["change"] == pytest.approx(change, rel=1e-3, abs=1e-5) and abs(change) > 1e-4
        assert row["change_low"] < row["change"] < row["change_high"]


def test_answers(vlm, batches):
    """Greedy answers: what changed is told case by case; of nothing changed, nothing."""

    def answer(model, inputs):
        prompts = inputs["input_ids"][:, :3]
        return model.generate(prompts, max_new_tokens=6, do_sample=False)[:, 3:].tolist()

    changes = {"none": [], "all to 0": ForceRoute(experts=0)}
    table = effect(vlm, batches, changes, answer=answer).to_table().to_pylist()
    found = {(row["intervention"], row["group"]): row for row in table if row["measure"] == "answers"}
    before = [answer(vlm, batch.inputs) for batch in batches]
    with intervene(vlm, ForceRoute(experts=0)):
        after = [answer(vlm, batch.inputs) for batch in batches]
    differs: dict[str, list[bool]] = {}
    for batch, old, new in zip(batches, before, after, strict=True):
        for case, one, other in zip(batch.case_ids, old, new, strict=True):
            differs.setdefault(case, []).append(one != other)
    expected = np.mean([np.mean(of_case) for of_case in differs.values()])
    assert found["all to 0", "overall"]["change"] == pytest.approx(expected) and expected > 0
    assert all(found["none", group]["change"] == 0 for group in ("heart", "liver", "overall"))
    assert all(row["baseline"] == 0 for row in found.values())


def test_an_expert_that_one_organ_needs(vlm, batches):
    """A planted cause: expert 3 adds the answer's direction to hearts' tokens alone, so only hearts miss it."""
    layer = list(dual_path_layers(vlm).values())[-1]
    hearts = {"b", "d", "e"}
    wanted = torch.randint(3, 100, (1,)).item()
    for batch in batches:
        labels = batch.inputs["labels"]
        labels[labels != -100] = wanted
        for row, case in enumerate(batch.case_ids):
            batch.inputs["input_ids"][row, :] = 50 if case in hearts else 60
    with torch.no_grad():
        layer.alpha_logit.fill_(-4)
        layer.experts.down_proj.zero_()
        layer.router.weight.zero_()
    seen: dict[int, torch.Tensor] = {}
    hook = layer.register_forward_pre_hook(lambda module, args: seen.update({len(seen): args[0]}))
    for token in (50, 60):
        vlm(input_ids=torch.full((1, 6), token))
    hook.remove()
    (heart_SD,), (liver_SD,) = seen.values()
    with torch.no_grad():
        layer.router.weight[3] = heart_SD.mean(0) - liver_SD.mean(0)
        layer.experts.down_proj[3] = vlm.lm_head.weight[wanted][:, None] * 3
        layer.experts.gate_up_proj[3] = 3 * heart_SD.mean(0)
    found = {row["group"]: row for row in effect(vlm, batches, {"out": KnockOut(experts=3)}).to_table().to_pylist()}
    assert found["heart"]["change_low"] > 0.1
    assert abs(found["liver"]["change"]) < 0.1 * found["heart"]["change"]


def test_the_model_comes_back_as_it_was(vlm, batches):
    vlm.train()
    vlm.model.visual.eval()
    modes = [module.training for module in vlm.modules()]
    during: list[bool] = []
    vlm.lm_head.register_forward_pre_hook(
        lambda module, args: during.append(module.training or torch.is_grad_enabled())
    )
    effect(vlm, batches, INTERVENTIONS, resampling=Resampling(resamples=5))
    assert len(during) == 3 * len(batches) and not any(during)
    assert [module.training for module in vlm.modules()] == modes
    with pytest.raises(MoEAdapterError, match="got layers"):
        effect(vlm, batches, {"x": KnockOut(experts=0, layers=9)})
    assert [module.training for module in vlm.modules()] == modes


def test_one_group(vlm, batches):
    alone = [batch._replace(groups=["liver"] * len(batch.case_ids)) for batch in batches]
    assert effect(vlm, alone, INTERVENTIONS).to_table()["group"].to_pylist() == ["liver"] * 2


def test_errors(vlm, batches):
    first = batches[0]
    with pytest.raises(MoEAdapterError, match="got no batch"):
        effect(vlm, [], INTERVENTIONS)
    with pytest.raises(MoEAdapterError, match="a batch has no labels"):
        effect(vlm, [first._replace(inputs={"input_ids": first.inputs["input_ids"]})], INTERVENTIONS)
    with pytest.raises(MoEAdapterError, match="case 'a' is in the groups 'liver' and 'heart'"):
        effect(vlm, [first, first._replace(groups=["heart", "heart"])], INTERVENTIONS)
    with pytest.raises(MoEAdapterError, match="2 rows, 1 case ids and 2 groups"):
        effect(vlm, [first._replace(case_ids=["a"])], INTERVENTIONS)
    first.inputs["labels"][1] = -100
    with pytest.raises(MoEAdapterError, match="row 1 of a batch has no label token"):
        effect(vlm, [first], INTERVENTIONS)
