"""An intervention equals a model that was built so; the record shows it; and nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import transformers as tf
import zoo
from reference import ReferenceLayer, reference_model

from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe, static_only
from moe_adapter.analysis.intervene import (
    ForceRoute,
    KnockOut,
    ShuffleRouter,
    StaticOnly,
    UniformWeights,
    WithoutShared,
    intervene,
)
from moe_adapter.analysis.record import RoutingRecord

COMMON = dict(moe_intermediate_size=16, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1)
DEEPSEEK = dict(COMMON, **LATENT, n_group=1, topk_group=1, first_k_dense_replace=0, norm_topk_prob=True)
FAMILIES = {  # the config's name for E, and sizes
    "Mixtral": ("num_local_experts", dict(num_experts_per_tok=2)),
    "Qwen2Moe": ("num_experts", dict(COMMON, shared_expert_intermediate_size=16)),
    "Qwen3Moe": ("num_experts", dict(COMMON, head_dim=8, norm_topk_prob=True)),
    "Olmoe": ("num_experts", dict(num_experts_per_tok=3, norm_topk_prob=False)),
    "GptOss": ("num_local_experts", dict(num_experts_per_tok=2, head_dim=8)),
    "DeepseekV2": ("n_routed_experts", DEEPSEEK),
    "DeepseekV3": ("n_routed_experts", DEEPSEEK),
}


def build(family: str, experts: int, **more: int) -> tf.PreTrainedModel:
    name, sizes = FAMILIES[family]
    sizes = {**zoo.TEXT, "num_key_value_heads": 4, **sizes, name: experts, **more}
    model = getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**sizes)).eval()
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.3)
    return model


def without_expert(model: tf.PreTrainedModel, family: str, expert: int, experts: int) -> tf.PreTrainedModel:
    """A model of one expert fewer with the weights of the others."""
    smaller = build(family, experts - 1)
    kept = [number for number in range(experts) if number != expert]
    states = {
        name: tensor[kept] if tensor.shape != smaller.state_dict()[name].shape else tensor
        for name, tensor in model.state_dict().items()
    }
    smaller.load_state_dict(states)
    return smaller


@pytest.mark.parametrize("family", FAMILIES)
def test_a_knock_out_equals_a_model_without_the_expert(family, text_batch):
    model, batch = build(family, 5), text_batch("right")
    before = model(**batch).logits
    with intervene(model, KnockOut(experts=2)):
        found = model(**batch).logits
    expected = without_expert(model, family, 2, 5)(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - before).abs().max() > 1e-3
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("softmax", ["selected", "all"])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("reroute", [True, False])
def test_a_knock_out_is_equation_3_without_the_expert(text_batch, softmax, layers, reroute):
    """Against the float64 reference, its routed sum computed over what is left."""

    class Without(ReferenceLayer):
        def routed(self, x):
            logits = x @ self["router.weight"].T
            if reroute:
                logits[..., 1] = -torch.inf
            chosen = logits.topk(2, dim=-1)
            weights = (logits if softmax == "all" else chosen.values).softmax(-1)
            weights = weights.gather(-1, chosen.indices) if softmax == "all" else weights
            total = 0
            for slot, expert in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
                first, down = (self[f"experts.{name}_proj"][expert] for name in ("gate_up", "down"))
                share = weights[..., slot] * (chosen.indices[..., slot] == expert)
                if expert != 1:
                    total = total + share[..., None] * self.swiglu_or_mlp(x, first, None, down, None)
            return total

    model = inject_dual_path_moe(
        zoo.build("qwen2"), num_experts=4, top_k=2, expert_dim=8, shared_expert_dim=8, preserve_base=False,
        router_softmax=softmax,
    )  # fmt: skip
    for layer in dual_path_layers(model).values():
        for parameter in layer.new_parameters().values():
            torch.nn.init.normal_(parameter, std=0.5)
    twin = reference_model(model)
    for number, layer in enumerate(module for module in twin.modules() if isinstance(module, ReferenceLayer)):
        if layers in (None, number):
            layer.__class__ = Without
    batch = text_batch("left")
    with intervene(model, KnockOut(experts=1, layers=layers, reroute=reroute)), torch.no_grad():
        found = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real].double(), twin(**batch).logits[real], atol=2e-5, rtol=1e-4)


def rows_of(result: RoutingRecord, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(expert, weight), (T, K) each."""
    (rows,) = (block for block in result.tokens())
    return next((expert, weight) for number, expert, weight in rows.by_layer() if number == layer)


INTERVENTIONS = {
    "knock-out": KnockOut(experts=[0, 3]),
    "zeroed": KnockOut(experts=0, reroute=False),
    "forced": ForceRoute(experts=[2]),
    "two forced": ForceRoute(experts=(3, 1)),
    "shuffled": ShuffleRouter(seed=5),
    "uniform": UniformWeights(),
}


@pytest.mark.parametrize("model_name", ["vlm", "mixtral"])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_the_record_shows_the_routing_as_changed(request, text_batch, record, name, model_name):
    model, batch = request.getfixturevalue(model_name), text_batch("left")

    def inside():
        with intervene(model, INTERVENTIONS[name]):
            model(**batch)

    def routing(run: Callable[[], object]) -> list[tuple[np.ndarray, np.ndarray]]:
        result = record(model, run)
        return [rows_of(result, layer) for layer in (0, 1)]

    before, within = routing(lambda: model(**batch)), routing(inside)
    with intervene(model, INTERVENTIONS[name]):
        around = routing(lambda: model(**batch))
    for (expert, weight), (other_expert, other_weight) in zip(within, around, strict=True):
        np.testing.assert_array_equal(expert, other_expert)
        np.testing.assert_allclose(weight, other_weight, rtol=1e-6)
    (expert, weight), (plain, plain_weight) = within[0], before[0]
    same_experts = expert.shape == plain.shape and (np.sort(expert) == np.sort(plain)).all()
    if name != "zeroed":
        np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-5)
    if name == "knock-out":
        assert set(expert.ravel()) == {1, 2}
    elif name == "zeroed":
        assert same_experts and (weight[expert == 0] == 0).all() and (plain == 0).any()
        np.testing.assert_allclose(np.sort(weight[expert != 0]), np.sort(plain_weight[plain != 0]), rtol=1e-6)
    elif name == "forced":
        assert expert.shape[1] == 1 and (expert == 2).all()
    elif name == "two forced":
        assert (np.sort(expert) == [1, 3]).all()
        np.testing.assert_allclose(weight, 0.5, rtol=1e-6)
    elif name == "shuffled":
        assert not same_experts and (expert[:, 0] != expert[:, 1]).all()
        np.testing.assert_allclose(weight, plain_weight, rtol=1e-6)
    else:
        assert same_experts
        np.testing.assert_allclose(weight, 0.5, rtol=1e-6)


def test_a_forced_route_is_the_expert_itself(vlm, text_batch):
    """All tokens through expert 2 alone: equation (3) with Σ g_i E_i = E_2."""
    layer = next(iter(dual_path_layers(vlm).values()))
    x_TD = torch.randn(6, 32)
    with intervene(vlm, ForceRoute(experts=2)):
        found = layer(x_TD)
    h = torch.nn.functional.linear(x_TD, layer.experts.gate_up_proj[2])
    expert = (torch.nn.functional.silu(h[:, :8]) * h[:, 8:]) @ layer.experts.down_proj[2].T
    moe = layer.lam * layer.shared_expert(x_TD) + expert
    expected = layer.alpha * layer.static_expert(x_TD) + (1 - layer.alpha) * moe
    torch.testing.assert_close(found, expected)


def test_shuffling_is_even_seeded_and_the_same_for_every_run(vlm, record):
    ids = torch.randint(3, 100, (4, 300))

    def experts(seed: int) -> np.ndarray:
        with intervene(vlm, ShuffleRouter(seed=seed)):
            result = record(vlm, lambda: vlm(input_ids=ids))
        return np.stack([block.expert_TC for block in result.tokens()])[0]

    one, again, other = experts(1), experts(1), experts(2)
    assert (one == again).all() and (one != other).mean() > 0.5
    assert (one[:, :2] != one[:, 2:]).mean() > 0.5, "layers draw by themselves"
    np.testing.assert_allclose(np.bincount(one.ravel()) / one.size, 0.25, atol=0.02)


def test_changes_go_in_order_and_a_shuffle_spares_the_knocked_out(mixtral, text_batch, record):
    batch = text_batch("left")
    with intervene(mixtral, ShuffleRouter(layers=0), KnockOut(experts=1, layers=0), UniformWeights(layers=[0, 1])):
        result = record(mixtral, lambda: mixtral(**batch))
    assert set(rows_of(result, 0)[0].ravel()) == {0, 2, 3} and 1 in rows_of(result, 1)[0]
    for layer in (0, 1):
        np.testing.assert_allclose(rows_of(result, layer)[1], 0.5, rtol=1e-6)


@pytest.mark.parametrize("layers", [None, [1]])
def test_static_only(vlm, text_batch, layers):
    batch = text_batch("left")
    with intervene(vlm, StaticOnly(layers=layers)):
        found = vlm(**batch).logits
    first, second = dual_path_layers(vlm).values()
    second.static_only, first.static_only = True, layers is None
    assert torch.equal(found, vlm(**batch).logits)
    if layers is None:
        first.static_only = second.static_only = False
        with static_only(vlm):
            assert torch.equal(found, vlm(**batch).logits)


def test_a_switch_that_was_set_before_stays(vlm, text_batch):
    first, second = dual_path_layers(vlm).values()
    first.static_only = True
    with intervene(vlm, StaticOnly()):
        assert second.static_only
    assert first.static_only and not second.static_only


@pytest.mark.parametrize("family", ["vlm", "Qwen2Moe", "DeepseekV3"])
def test_without_the_shared_expert(request, family, text_batch):
    """Equals a shared expert whose output projection is zero."""
    model = request.getfixturevalue("vlm") if family == "vlm" else build(family, 4)
    batch = text_batch("left")
    with torch.no_grad(), intervene(model, WithoutShared(layers=1)):
        found = model(**batch).logits
    zeroed = copy.deepcopy(model)
    shared = [module for name, module in zeroed.named_modules() if name.endswith(("shared_expert", "shared_experts"))]
    torch.nn.init.zeros_(shared[1].down_proj.weight)
    with torch.no_grad():
        assert torch.equal(found, zeroed(**batch).logits)
        assert not torch.equal(found, model(**batch).logits)


def hooks_of(model: torch.nn.Module) -> Iterator[tuple]:
    for module in model.modules():
        yield tuple(map(id, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))


def test_an_error_leaves_the_model_as_it_was(vlm, text_batch):
    batch, before = text_batch("left"), list(hooks_of(vlm))
    logits = vlm(**batch).logits
    with pytest.raises(KeyboardInterrupt), intervene(vlm, KnockOut(experts=0), StaticOnly(layers=1), WithoutShared()):
        raise KeyboardInterrupt
    assert list(hooks_of(vlm)) == before and torch.equal(vlm(**batch).logits, logits)
    list(dual_path_layers(vlm).values())[1].shared_expert = None
    before = list(hooks_of(vlm))
    with pytest.raises(MoEAdapterError, match="no shared expert"), intervene(vlm, KnockOut(experts=0), WithoutShared()):
        pass
    assert list(hooks_of(vlm)) == before


def test_gradients_are_those_of_the_changed_model(vlm, text_batch):
    """Training under an intervention: a knocked-out expert gets none, equal weights tell the router nothing."""
    batch = text_batch("left")
    first, second = dual_path_layers(vlm).values()
    with intervene(vlm, KnockOut(experts=1, layers=0), UniformWeights(layers=1)):
        vlm(**batch).logits.square().sum().backward()
    assert first.experts.down_proj.grad[1].abs().sum() == 0 < first.experts.down_proj.grad[0].abs().sum()
    assert first.router.weight.grad[1].abs().sum() == 0 < first.router.weight.grad[0].abs().sum()
    assert second.router.weight.grad.abs().sum() < 1e-4 * first.router.weight.grad.abs().sum()


def test_generation_under_an_intervention(vlm, text_batch, record):
    batch = text_batch("left")
    with intervene(vlm, KnockOut(experts=[0, 1])):
        result = record(vlm, lambda: vlm.generate(**batch, max_new_tokens=4, do_sample=False))
    assert set(result.table(["expert"])["expert"].to_pylist()) == {2, 3}


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ([KnockOut(experts=4)], r"got experts \[4\]; the layer has experts 0 to 3"),
        ([KnockOut(experts=[])], r"got experts \[\]"),
        ([ForceRoute(experts=-1)], r"got experts \[-1\]"),
        ([KnockOut(experts=0, layers=2)], r"got layers \[2\]; the model has routed layers 0 to 1"),
        ([KnockOut(experts=0), KnockOut(experts=[1, 2])], "so at most 2 can be knocked out, not 3; with reroute=False"),
        ([StaticOnly()], "is a MixtralSparseMoeBlock, which has no static expert"),
        ([WithoutShared()], "has no shared expert to leave out"),
    ],
)
def test_errors(mixtral, text_batch, interventions, message):
    with pytest.raises(MoEAdapterError, match=message), intervene(mixtral, *interventions):
        mixtral(**text_batch("left"))


def test_more_errors(mixtral, text_batch):
    with pytest.raises(MoEAdapterError, match="has no router"), intervene(zoo.build("llama"), UniformWeights()):
        pass
    twice = (intervene(mixtral, UniformWeights()), intervene(mixtral, KnockOut(experts=0)))
    with pytest.raises(MoEAdapterError, match="in force already"), twice[0], twice[1]:
        pass
    mixtral.train().gradient_checkpointing_enable({"use_reentrant": False})
    with intervene(mixtral, ShuffleRouter()), pytest.raises(MoEAdapterError, match="switch checkpointing off"):
        mixtral(**text_batch("left")).logits.sum().backward()


def test_groups_that_leave_too_few_experts_say_so(text_batch):
    """DeepSeek picks one group of two experts, and both of it."""
    model = build("DeepseekV3", 4, n_group=2, topk_group=1)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    message = r"without \[0\] a group that it chose has too few\. Use reroute=False"
    with pytest.raises(MoEAdapterError, match=message), intervene(model, KnockOut(experts=0)):
        model(**text_batch("left"))
    with intervene(model, KnockOut(experts=0, reroute=False)):
        model(**text_batch("left"))
