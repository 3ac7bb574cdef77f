"""Models that are wrapped for training or compiled: refused in one sentence, and right when wrapped after injection."""

from __future__ import annotations

import os

import peft
import pytest
import torch
import torch.distributed as dist
import zoo
from engines import without_compiling
from reference import gradients, perturb
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_adapter import (
    MoEAdapterError,
    balance_loss,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
    static_only,
)

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    before = dict(os.environ)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def deepspeed_engine(model: nn.Module) -> nn.Module:
    import deepspeed

    without_compiling()
    config = dict(train_batch_size=1, zero_optimization=dict(stage=0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def fsdp2(model: nn.Module, *, whole: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh) if whole else model


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "FullyShardedDataParallel": fsdp1,
    "FSDPModule": fsdp2,
    "DeepSpeedEngine": deepspeed_engine,
    "OptimizedModule": lambda model: torch.compile(model, backend="eager"),
}
INSIDE = {"FSDPModule": lambda model: fsdp2(model, whole=False)}
PEFT_AROUND = {
    "OptimizedModule": lambda model: peft.get_peft_model(
        torch.compile(model, backend="eager"), peft.LoraConfig(target_modules=r".*q_proj")
    )
}
ALL = [(name, wrap) for table in (WRAPPERS, INSIDE, PEFT_AROUND) for name, wrap in table.items()]


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    model.backward(loss) if hasattr(model, "backward") else loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(("name", "wrap"), ALL, ids=[f"{i}-{name}" for i, (name, _) in enumerate(ALL)])
def test_a_wrapped_model_is_refused_in_one_sentence(name, wrap, tmp_path):
    save_adapter(inject_dual_path_moe(zoo.build("qwen2"), **SIZES), tmp_path)
    wrapped = wrap(zoo.build("qwen2"))
    modules = {key: id(module) for key, module in wrapped.named_modules()}
    for attempt in (lambda: inject_dual_path_moe(wrapped, **SIZES), lambda: load_adapter(wrapped, tmp_path)):
        with pytest.raises(MoEAdapterError, match=f"wrapped by {name}: inject before wrapping"):
            attempt()
    assert {key: id(module) for key, module in wrapped.named_modules()} == modules


@pytest.mark.parametrize("name", WRAPPERS)
def test_injected_and_then_wrapped_a_model_has_the_same_loss_and_gradients(name):
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), balance_coef=1.0, **SIZES))
    loss, expected = loss_and_gradients(model)
    balance = balance_loss(model)
    model.zero_grad()
    wrapped = WRAPPERS[name](model)
    found, grads = loss_and_gradients(wrapped)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(balance_loss(wrapped).detach(), balance.detach())
    for key, gradient in zip(expected, grads.values(), strict=True):
        if name != "DeepSpeedEngine":  # which keeps its gradients elsewhere
            full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(full.view(expected[key].shape), expected[key], msg=key)
    with pytest.raises(MoEAdapterError, match=f"wrapped by {name}"):
        eject_dual_path_moe(wrapped)


@pytest.mark.parametrize("name", ["DataParallel", "DistributedDataParallel", "DeepSpeedEngine", "OptimizedModule"])
def test_a_wrapped_model_saves_what_the_model_itself_saves(name, tmp_path):
    model = perturb(inject_dual_path_moe(zoo.build("qwen2"), **SIZES))
    save_adapter(model, tmp_path / "plain")
    save_adapter(WRAPPERS[name](model), tmp_path / "wrapped")
    plain, wrapped = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("plain", "wrapped"))
    assert plain == wrapped


def compile_blocks(model: nn.Module) -> nn.Module:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    return model


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compile_blocks, compile_in_place])
def test_a_model_compiled_in_place_can_be_injected_and_ejected(compiled, tmp_path):
    model = compiled(zoo.build("qwen2"))
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        inject_dual_path_moe(model, **SIZES)
        assert torch.equal(model(input_ids=IDS).logits, base)
        perturb(model)
        save_adapter(model, tmp_path)
        plain = load_adapter(zoo.build("qwen2"), tmp_path)
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        again = load_adapter(compiled(zoo.build("qwen2")), tmp_path)
        torch.testing.assert_close(again(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        eject_dual_path_moe(model)
        assert torch.equal(model(input_ids=IDS).logits, base)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "up_proj", "down_proj"]], ids=["attention", "FFN too"])
def test_a_peft_model_is_injected_in_its_base_and_ejected(targets):
    model = peft.get_peft_model(zoo.build("qwen2"), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        answer = model(input_ids=IDS).logits
        assert inject_dual_path_moe(model, **SIZES) is model
        assert len(dual_path_layers(model)) == 2
        assert torch.equal(model(input_ids=IDS).logits, answer)
        with static_only(model):
            assert torch.equal(model(input_ids=IDS).logits, zoo.build("qwen2")(input_ids=IDS).logits)
        perturb(model)
        assert not torch.equal(model(input_ids=IDS).logits, answer)
        assert torch.equal(eject_dual_path_moe(model)(input_ids=IDS).logits, answer)
