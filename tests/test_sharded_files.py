"""Adapter files of models whose parameters are spread over ranks: those of the whole model, to the bit, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run_ranks
from engines import without_compiling
from reference import perturb
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_adapter import (
    MoEAdapterError,
    dual_path_layers,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
    set_stage,
)
from moe_adapter.integrations.expert_parallel import shard_experts
from moe_adapter.sharding import has_spread, is_spread, settle, whole

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
CONFIGS = {"plain": {}, "odd": dict(num_experts=3), "lora": {}}


def build(config: str, seed: int) -> nn.Module:
    """An injected model, trained as it were: of its base the last norm, and with "lora" a LoRA in a PeftModel."""
    model = inject_dual_path_moe(zoo.build("qwen2"), **{**SIZES, **CONFIGS[config]})
    if config == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*\.(q|v)_proj", init_lora_weights=False))
    set_stage(perturb(model, seed=seed), 2)
    norm = next(p for name, p in model.named_parameters() if name.endswith("model.norm.weight"))
    norm.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or parameter is norm:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def fsdp2(model: nn.Module, mesh) -> nn.Module:
    """In bfloat16, and run once, after which FSDP2 leaves the parameters of its root whole and in that dtype."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    blocks = model.get_submodule("base_model.model.model" if hasattr(model, "peft_config") else "model").layers
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    with torch.no_grad():
        model(input_ids=IDS)
    return model


def both(model: nn.Module, mesh) -> nn.Module:
    shard_experts(model, mesh["ep"])
    for layer in dual_path_layers(model).values():
        fully_shard(layer.experts, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh._flatten())


def zero3(model: nn.Module, mesh) -> nn.Module:
    import deepspeed

    without_compiling()
    small = dict(stage=3, stage3_param_persistence_threshold=0)  # or all parameters here would stay whole
    deepspeed.zero.Init(module=model, config_dict_or_path=dict(train_batch_size=2, zero_optimization=small))
    return model


# For each case: the model's config, and what spreads its parameters.
CASES = {
    "FSDP2": ("plain", fsdp2),
    "FSDP2 with LoRA": ("lora", fsdp2),
    "expert parallelism": ("plain", shard_experts),
    "expert parallelism, odd number": ("odd", shard_experts),
    "expert parallelism with LoRA": ("lora", shard_experts),
    "ZeRO-3": ("plain", zero3),
    "ZeRO-3 with LoRA": ("lora", zero3),
}
FILES = [(case, which) for case in CASES for which in ("saved", "fresh")]
FILES += [(case, "loaded") for case, (_, spread) in CASES.items() if spread is not zero3]


def save_and_load(folder: Path, config: str, spread) -> None:
    """Save a spread model; load the whole one's file onto another spread model, and save that."""
    mesh = init_device_mesh("cpu", (2,)) if dist.get_world_size() == 2 else None
    mesh = mesh or init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = spread(build(config, seed=7), mesh)
    assert has_spread(model)
    save_adapter(model, folder / "saved")
    fresh = spread(load_adapter(zoo.build("qwen2"), folder / config), mesh)  # the other order: load, then spread
    save_adapter(fresh, folder / "fresh")
    if spread is zero3:
        return
    other = spread(build(config, seed=1), mesh)
    assert load_adapter(other, folder / config) is other
    save_adapter(other, folder / "loaded")
    for (name, found), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert is_spread(found) == is_spread(expected), name
        assert torch.equal(whole(found), whole(expected)), name


def failures(folder: Path) -> dict[str, str]:
    """What each rank says to an error that one of them has."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    model = fsdp2(build("plain", seed=7), mesh)
    settle(model)
    bare = inject_dual_path_moe(zoo.build("qwen2"), **SIZES)
    attempts = {
        "a full disk": lambda: save_adapter(model, folder / "a file"),
        "no file on one rank": lambda: load_adapter(model, folder / ("plain" if rank == 0 else "nowhere")),
        "LoRA for a model without": lambda: load_adapter(fsdp2(bare, mesh), folder / "lora"),
        "ZeRO-3": lambda: load_adapter(zero3(build("plain", seed=1), mesh), folder / "plain"),
        "sharded before injection": lambda: load_adapter(fsdp2(zoo.build("qwen2"), mesh), folder / "plain"),
    }
    said = {}
    for name, attempt in attempts.items():
        before = [whole(parameter).clone() for parameter in model.parameters()]
        try:
            attempt()
        except MoEAdapterError as caught:
            said[name] = str(caught)
        assert all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True)), name
    return said


def data_parallel(folder: Path) -> None:
    """What isn't spread is written by rank 0, whether all ranks call, many times at once, or it alone."""
    model = DistributedDataParallel(build("plain", seed=7))
    for _ in range(20):
        save_adapter(model, folder / "all")
    if dist.get_rank() == 0:
        save_adapter(model, folder / "alone")


def everything(folder: Path) -> dict[str, str]:
    for case, (config, spread) in CASES.items():
        print(case)
        (folder / case).mkdir(exist_ok=True)
        for name in CONFIGS:
            if not (folder / case / name).exists() and dist.get_rank() == 0:
                (folder / case / name).symlink_to(folder / name)
        dist.barrier()
        save_and_load(folder / case, config, spread)
    data_parallel(folder)
    return failures(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the adapter of the whole model of each config."""
    folder = tmp_path_factory.mktemp("adapters")
    for config in CONFIGS:
        save_adapter(build(config, seed=7), folder / config)
    (folder / "a file").touch()
    return folder


@pytest.fixture(scope="module")
def said(folder) -> list[dict[str, str]]:
    return run_ranks(2, everything, folder=folder, timeout=300)


@pytest.mark.parametrize(("case", "which"), FILES)
def test_files_are_those_of_the_whole_model(folder, said, case, which):
    assert content(folder / case / which) == content(folder / CASES[case][0])


def test_the_base_is_told_by_its_hash_when_sharded_too(folder, said):
    index = json.loads((folder / "FSDP2" / "saved" / "moe_adapter.json").read_text())
    assert all(base["hash"] for base in index["base"].values())


@pytest.mark.parametrize("who", ["all", "alone"])
def test_under_data_parallelism_rank_0_writes(folder, said, who):
    assert content(folder / who) == content(folder / "plain")


@pytest.mark.parametrize(
    ("case", "own", "others"),
    [
        ("a full disk", (0, "is a file: an adapter takes a directory"), "rank 0 failed.*is a file"),
        ("no file on one rank", (1, "holds no adapter"), "rank 1 failed.*holds no adapter"),
        ("LoRA for a model without", (0, "has none called 'default': load"), "has none called 'default': load"),
        ("ZeRO-3", (0, "spread by DeepSpeed's ZeRO-3.*then give"), "spread by DeepSpeed's ZeRO-3"),
        ("sharded before injection", (0, "wrapped by FSDPModule: inject before"), "wrapped by FSDPModule"),
    ],
)
def test_an_error_of_one_rank_is_an_error_of_all(said, case, own, others):
    rank, message = own
    with pytest.raises(MoEAdapterError, match=message):
        raise MoEAdapterError(said[rank][case])
    with pytest.raises(MoEAdapterError, match=others):
        raise MoEAdapterError(said[1 - rank][case])


@pytest.mark.slow
def test_files_of_experts_sharded_twice_are_those_of_the_whole_model(folder):
    (folder / "both").mkdir()
    (folder / "both" / "plain").symlink_to(folder / "plain")
    run_ranks(4, save_and_load, timeout=300, folder=folder / "both", config="plain", spread=both)
    assert all(content(folder / "both" / which) == content(folder / "plain") for which in ("saved", "loaded", "fresh"))
