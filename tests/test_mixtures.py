"""Models with experts of their own: told by structure, refused by one sentence, their dense parts open to a target."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_adapter import MoEAdapterError, dual_path_layers, eject_dual_path_moe, inject_dual_path_moe, plan_injection
from moe_adapter.mixture import find_mixtures
from tests.matrix.build import build

SIZES = dict(expert_dim=8, shared_expert_dim=8)

# model type: (the first block of routed experts, a dense part that a target can name, how many there are)
MODELS = {
    "mixtral": (r"model\.layers\.0\.mlp \(MixtralSparseMoeBlock\)", None, 0),
    "gpt_oss": (r"model\.layers\.0\.mlp \(GptOssMLP\)", None, 0),
    "granitemoe": (r"model\.layers\.0\.block_sparse_moe \(GraniteMoeMoE\)", None, 0),
    "qwen2_moe": (r"model\.layers\.0\.mlp \(Qwen2MoeSparseMoeBlock\)", r"mlp\.shared_expert", 2),
    "llama4_text": (r"model\.layers\.0\.feed_forward \(Llama4TextMoe\)", r"feed_forward\.shared_expert", 2),
    "deepseek_v3": (r"model\.layers\.1\.mlp \(DeepseekV3MoE\)", r"layers\.0\.mlp|mlp\.shared_experts", 2),
    "jamba": (r"model\.layers\.1\.feed_forward \(JambaSparseMoeBlock\)", r"layers\.0\.feed_forward", 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_mlp_refuses_a_mixture_of_experts(name):
    model = build(name).model
    before = {key: id(module) for key, module in model.named_modules()}
    mixture, dense, _ = MODELS[name]
    hint = "which this model has none of" if dense is None else r"such as model\.layers\.0\.\w+"
    with pytest.raises(MoEAdapterError, match=rf"{mixture} is a mixture of 4 experts already.*{hint}"):
        inject_dual_path_moe(model, **SIZES)
    assert {key: id(module) for key, module in model.named_modules()} == before


@pytest.mark.parametrize("target", [r"layers\.\d+\.mlp", r"layers\.\d+", r"mlp\.experts", "gate"])
def test_so_does_a_target_that_names_it_or_what_holds_it(target):
    kinds = "is a mixture of 4 experts" if target != "gate" else "is no feed-forward block"
    with pytest.raises(MoEAdapterError, match=kinds):
        plan_injection(build("qwen2_moe").model, target, **SIZES)


@pytest.mark.parametrize("name", [name for name, (_, dense, _) in MODELS.items() if dense])
@torch.no_grad()
def test_a_dense_part_beside_the_experts_can_be_named(name):
    toy = build(name)
    toy.model.requires_grad_(False)  # which alone moves Jamba's logits by 2e-6, as torch takes other kernels
    _, dense, count = MODELS[name]
    base = toy.logits()
    inject_dual_path_moe(toy.model, dense, **SIZES)
    assert len(dual_path_layers(toy.model)) == count
    assert torch.equal(toy.logits(), base)
    for layer in dual_path_layers(toy.model).values():
        layer.experts.down_proj.normal_()
    assert not torch.allclose(toy.logits(), base)
    eject_dual_path_moe(toy.model)
    assert torch.equal(toy.logits(), base)


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)


class OwnMoE(nn.Module):
    """Experts as a list of modules."""

    def __init__(self, router: bool):
        super().__init__()
        self.experts = nn.ModuleList(Feed() for _ in range(3))
        if router:
            self.router = nn.Linear(8, 3, bias=False)


def test_a_list_of_experts_is_told_by_the_router_beside_it():
    (mixture,) = find_mixtures(nn.ModuleList([OwnMoE(router=True)]))
    assert (mixture.name, mixture.kind, mixture.experts, mixture.count) == ("0", "OwnMoE", "0.experts", 3)
    assert find_mixtures(nn.ModuleList([OwnMoE(router=False)])) == []
    assert find_mixtures(build("llama").model) == []
