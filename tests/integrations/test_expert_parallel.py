"""Experts sharded over ranks: outputs and all gradients against one process that sees every rank's tokens.

Ranks are real processes. One launch runs all cases of a kind; the tests read what it found.
"""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run_ranks
from reference import ReferenceLayer, perturb, reference_gradients, reference_loss, reference_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe, set_stage
from moe_adapter.integrations.expert_parallel import clip_grad_norm_, shard_experts

SIZES = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
GAMMA = 3.0  # large, so that a lost or doubled balance gradient can't hide

# For each case: the model, its config, its dtype, tokens of each rank, and which rank's experts these are all for.
LAYERS = {
    "default": {},
    "without gate, with biases": dict(name="gpt2"),
    "experts not divisible by ranks": dict(num_experts=3),
    "many experts": dict(num_experts=32, top_k=5, expert_dim=4),
    "top-1": dict(top_k=1, router_softmax="all"),
    "top-all": dict(top_k=4),
    "token mixing": dict(mixing="token"),
    "no shared expert": dict(shared_expert_dim=0),
    "eager": dict(backend="eager"),
    "grouped_mm": dict(backend="grouped_mm", dtype=torch.float32),
    "batched_mm": dict(backend="batched_mm"),
    "one rank without tokens": dict(tokens=(0, 7)),
    "no tokens at all": dict(tokens=(0, 0)),
    "each rank's tokens for the other's experts": dict(towards=(1, 0)),
    "no tokens for a rank's experts": dict(towards=(1, 1)),
    "no tokens for a rank's experts, grouped_mm": dict(towards=(0, 0), backend="grouped_mm", dtype=torch.float32),
    "bfloat16": dict(dtype=torch.bfloat16),
    "autocast": dict(autocast=torch.bfloat16),
    "bfloat16, one rank without tokens": dict(dtype=torch.bfloat16, tokens=(7, 0)),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
MODELS = {
    "plain": {},
    "checkpointing": dict(reentrant=False),
    "reentrant checkpointing": dict(reentrant=True),
    "top-1": dict(top_k=1, router_softmax="all", reentrant=False),
    "VLM": dict(name="qwen2_vl"),
}
WRAPS = {
    "by hand": dict(wrap="by_hand"),
    "DDP": dict(wrap="ddp"),
    "DDP, fused optimizer": dict(wrap="ddp", fused=True),
    "FSDP2": dict(wrap="fsdp2", fused=True),
}
MISTAKES = {
    "two dimensions": r"got 2 dimensions \('ep', 'dp'\), expected a DeviceMesh of one: pass its part, mesh\[\"ep",
    "no mesh": "got 2, expected a DeviceMesh of one",
    "dense": "no routed experts to shard: call inject_dual_path_moe",
    "no routed experts": "no routed experts to shard",
    "twice": "sharded already: call shard_experts.* once",
    "too few experts": "1 experts in parts of 1 leave a rank of 2 without any.*take a smaller mesh",
    "LoRA on experts": "experts are wrapped in a ParamWrapper, expected plain ones",
    "wrapped": "wrapped by DistributedDataParallel",
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


def mean_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """As data parallelism has it: a sharded parameter's is the mean already."""
    if hasattr(parameter, "full_tensor"):
        return parameter.grad.full_tensor()
    gradient = parameter.grad.clone()
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


def layer_errors(
    name="qwen2", dtype=torch.float64, tokens=(5, 9), towards=None, autocast=None, **config
) -> dict[str, float]:
    """Of each output and gradient, relative to the reference's; what every rank's tokens give it is known here."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = perturb(inject_dual_path_moe(zoo.build(name).to(dtype), **{**SIZES, **config}))
    layer = next(iter(dual_path_layers(model).values()))
    inputs = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)).to(dtype) for n in tokens]
    if towards:  # the first feature alone decides, between the first half of the experts and the second
        with torch.no_grad():
            layer.router.weight[:, 0] = torch.tensor([50.0, 50.0, -50.0, -50.0])
        for x, target in zip(inputs, towards, strict=True):
            x[:, 0] = -1.0 if target else 1.0
    twin = ReferenceLayer(layer)
    shard_experts(model, init_device_mesh("cpu", (ranks,)))
    assert all(p.to_local().shape[0] < layer.experts.num_experts for p in layer.experts.parameters())

    mine = inputs[rank].clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(mine)
    (y.double() ** 2).sum().div(10).backward()
    doubles = [x.double().requires_grad_() for x in inputs]
    expected = [twin(x) for x in doubles]
    (sum((y**2).sum() for y in expected) / 10 / ranks).backward()

    errors = {"output": error(y, expected[rank]), "input": error(mine.grad / ranks, doubles[rank].grad)}
    for key, parameter in layer.new_parameters().items():
        assert parameter.grad is not None, key
        reference = twin[key].grad if twin[key].grad is not None else torch.zeros_like(twin[key])
        errors[key] = error(mean_gradient(parameter), reference)
    return errors


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    """Ranks differ in sequences, lengths and padding."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 100, (3 - rank % 3, 9 + rank), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = -100
    ids[0, : 1 + rank], labels[0, : 1 + rank], mask[0, : 1 + rank] = 0, -100, 0
    return dict(input_ids=ids, labels=labels, attention_mask=mask)


def model_errors(name="qwen2", reentrant=None, **config) -> dict[str, float]:
    """Of the loss and the gradients of all new parameters of a model in training, balance loss included."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = inject_dual_path_moe(zoo.build(name).double(), **{**SIZES, **config}, balance_coef=GAMMA)
    twin = reference_model(perturb(model).train())
    shard_experts(model, init_device_mesh("cpu", (ranks,)))
    if reentrant is not None:
        model.activation_checkpointing_enable(dict(use_reentrant=reentrant))
    loss = model(**batch_of(rank), use_cache=False).loss
    loss.backward()
    expected = [reference_loss(twin, batch_of(r), GAMMA) for r in range(ranks)]
    (sum(expected) / ranks).backward()
    errors = {"loss": error(loss, expected[rank])}
    parameters = dict(model.named_parameters())
    return errors | {n: error(mean_gradient(parameters[n]), g) for n, g in reference_gradients(twin).items()}


def by_hand(model: nn.Module, mesh) -> nn.Module:
    """Nothing but an average of what isn't sharded."""
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
            parameter.register_post_accumulate_grad_hook(average)
    return model


def average(parameter: nn.Parameter) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad.div_(dist.get_world_size())


def ddp(model: nn.Module, mesh) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module, mesh) -> nn.Module:
    """Experts that a mesh dimension "dp" replicates are sharded over it too; others are left alone."""
    everyone = mesh._flatten() if mesh.ndim > 1 else mesh
    experts = [layer.experts for layer in dual_path_layers(model).values()]
    alone = {parameter for part in experts for parameter in part.parameters()}
    if mesh.ndim > 1:
        for part in experts:
            fully_shard(part, mesh=mesh["dp"])
        alone = set()
    for block in model.model.layers:
        fully_shard(block, mesh=everyone, ignored_params=alone)
    return fully_shard(model, mesh=everyone, ignored_params=alone)


def train(model: nn.Module, batches, fused: bool, clip) -> list[float]:
    """Some steps of AdamW under clipping that bites; the norms of the gradients. `batches`, one a backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    experts = {id(p) for layer in dual_path_layers(model).values() for p in layer.experts.parameters()}
    groups = [[p for p in parameters if (id(p) in experts) == among] for among in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=group) for group in groups], lr=1e-2, fused=fused)
    norms = []
    for _ in range(4):
        for batch in batches:
            (model(**batch, use_cache=False).loss / len(batches)).backward()
        norms.append(float(clip(parameters, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def trained(wrap: str, fused: bool = False, dims: tuple[int, ...] = (2,)) -> dict[str, float]:
    """Of norms and parameters after training, relative to a process that accumulates all ranks' batches."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    names = ("dp", "ep")[-len(dims) :]
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=names)
    model = perturb(inject_dual_path_moe(zoo.build("qwen2").double(), **SIZES, balance_coef=GAMMA)).train()
    set_stage(model, 1)
    alone = copy.deepcopy(model)
    shard_experts(model, mesh["ep"])
    norms = train(globals()[wrap](model, mesh), [batch_of(rank)], fused, clip_grad_norm_)
    expected = train(alone, [batch_of(r) for r in range(ranks)], fused, nn.utils.clip_grad_norm_)
    assert min(expected) > 0.5, "nothing was clipped"
    errors = {"norms": error(torch.tensor(norms), torch.tensor(expected))}
    found = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return errors | {name: error(found[name], p) for name, p in alone.named_parameters()}


def refusals() -> dict[str, str]:
    """What `shard_experts` says to each mistake, after which the model has to be as it was."""
    mesh, two = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "dp"))
    model = inject_dual_path_moe(zoo.build("qwen2"), **SIZES)
    on_experts = peft.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    attempts = {
        "two dimensions": (model, two),
        "no mesh": (model, 2),
        "dense": (zoo.build("qwen2"), mesh),
        "no routed experts": (inject_dual_path_moe(zoo.build("qwen2"), num_experts=0), mesh),
        "twice": (shard_experts(copy.deepcopy(model), mesh), mesh),
        "too few experts": (inject_dual_path_moe(zoo.build("qwen2"), num_experts=1, top_k=1), mesh),
        "LoRA on experts": (peft.get_peft_model(copy.deepcopy(model), on_experts), mesh),
        "wrapped": (DistributedDataParallel(model), mesh),
    }
    said = {}
    for name, (attempt, where) in attempts.items():
        before = {key: id(parameter) for key, parameter in attempt.named_parameters()}
        try:
            shard_experts(attempt, where)
        except MoEAdapterError as caught:
            said[name] = str(caught)
        assert {key: id(parameter) for key, parameter in attempt.named_parameters()} == before
    return said


def everything() -> dict[str, dict]:
    """All that two ranks are asked, in one launch; what is printed is seen where it fails."""

    def each(function, cases):
        return {case: function(**arguments) for case, arguments in cases.items() if not print(case)}

    return dict(
        layers=each(layer_errors, LAYERS),
        models=each(model_errors, MODELS),
        trained=each(trained, WRAPS),
        said=refusals(),
    )


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict]]:
    return run_ranks(2, everything, timeout=300)


def assert_small(errors: list[dict[str, float]], tolerance: float) -> None:
    """`errors` of each rank, none of which may be NaN either."""
    for rank, of_rank in enumerate(errors):
        assert of_rank
        large = {key: value for key, value in of_rank.items() if not value < tolerance}
        assert not large, f"rank {rank}"


@pytest.mark.parametrize("case", LAYERS)
def test_a_layers_outputs_and_gradients_equal_the_reference(found, case):
    coarsest = LAYERS[case].get("autocast") or LAYERS[case].get("dtype", torch.float64)
    assert_small([rank["layers"][case] for rank in found], TOLERANCE[coarsest])


@pytest.mark.parametrize("case", MODELS)
def test_a_models_loss_and_gradients_equal_the_reference(found, case):
    """transformers computes the norms and the loss of a float64 model in float32."""
    assert_small([rank["models"][case] for rank in found], 1e-5)


@pytest.mark.parametrize("case", WRAPS)
def test_training_equals_one_process_that_accumulates(found, case):
    assert_small([rank["trained"][case] for rank in found], 1e-7)


@pytest.mark.slow
def test_training_on_a_mesh_of_two_dimensions_equals_one_process_that_accumulates():
    assert_small(run_ranks(4, trained, timeout=300, wrap="fsdp2", fused=True, dims=(2, 2)), 1e-7)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(found, mistake):
    assert re.search(MISTAKES[mistake], found[0]["said"].get(mistake, "nothing was said"))
