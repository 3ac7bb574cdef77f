"""A record in several files, one a process, is one record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from torch import nn

from moe_adapter import MoEAdapterError, inject_dual_path_moe
from moe_adapter.analysis.record import RoutingRecord, record_routing
from moe_adapter.analysis.statistics import expert_load
from moe_adapter.analysis.summary import summary
from moe_adapter.analysis.tally import count_routing


class Block(nn.Module):
    """A router and experts in plain torch, which a rank loads in no time."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, _ = self.router(x)
        return self.experts(x) * weights.sum(-1, keepdim=True).view(*x.shape[:-1], 1)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = x.view(-1, 8) @ self.weight.T
        top = logits.topk(2)
        return logits, top.values.softmax(-1), top.indices


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(100, 8), nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def record_share(folder: str, ids: torch.Tensor) -> None:
    """Each rank records its share of the sequences, under DDP, without names."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = nn.parallel.DistributedDataParallel(Model())
    with torch.no_grad(), record_routing(model, Path(folder, f"rank{rank}.parquet")):
        model(input_ids=ids[rank::ranks])
    with torch.no_grad(), count_routing(model) as counts:
        model(input_ids=ids[rank::ranks])
    counts.write(Path(folder, f"counts{rank}.parquet"))


def test_two_processes(tmp_path, record):
    ids = torch.randint(3, 100, (6, 9))
    run_ranks(2, record_share, folder=str(tmp_path), ids=ids)
    model = Model()
    whole = record(model, lambda: model(input_ids=ids))
    parts = RoutingRecord.open([tmp_path / "rank0.parquet", tmp_path / "rank1.parquet"])
    assert set(parts.table()["case"].to_pylist()) == {f"{rank}:{number}" for rank in (0, 1) for number in range(3)}
    assert (parts.facts.tokens, parts.facts.cases) == (54, 6)
    assert parts.facts.layers == whole.facts.layers
    counts = RoutingRecord.open([tmp_path / "counts0.parquet", tmp_path / "counts1.parquet"])
    for found in (parts, counts):
        np.testing.assert_array_equal(expert_load(found).counts_CE, expert_load(whole).counts_CE)
    assert sum(len(block) for block in parts.tokens()) == 54
    assert summary(parts)["load"].equals(summary(whole)["load"])


def test_parts_that_do_not_fit(written, tmp_path, text_batch, mixtral):
    one = written([np.zeros((3, 2, 2), int)], groups=["liver"], name="one.parquet")
    two = written([np.ones((5, 2, 2), int)], groups=["heart"], name="two.parquet")
    both = RoutingRecord.open([*one.paths, *two.paths])
    assert both.facts.groups == ("liver", "heart") and both.count([])["count"].to_pylist() == [32]
    assert both.name == f"{one.paths[0]}, {two.paths[0]}"
    three_layers = written([np.zeros((3, 3, 2), int)], name="layers.parquet")
    with pytest.raises(MoEAdapterError, match=r"not of one model: written with 2 layers and written with 3"):
        RoutingRecord.open([*one.paths, *three_layers.paths])
    of_eight = written([np.zeros((3, 2, 2), int)], num_experts=8, name="eight.parquet")
    with pytest.raises(MoEAdapterError, match=r"layers\.0 has \[4, 8\] experts"):
        RoutingRecord.open([*one.paths, *of_eight.paths])
    with count_routing(mixtral) as counts:
        mixtral(**text_batch("left"))
    counts.write(tmp_path / "counts.parquet")
    with pytest.raises(MoEAdapterError, match="one of the records holds tokens and another counts"):
        RoutingRecord.open([*one.paths, tmp_path / "counts.parquet"])
    with pytest.raises(MoEAdapterError, match="no path was given"):
        RoutingRecord.open([])


def test_a_token_is_never_cut(written, drawn):
    """Row groups smaller than a token's rows hold a token each."""
    experts = [drawn(np.random.default_rng(0), np.zeros(4), (5, 4))]
    result = written(experts, row_group_rows=3)
    blocks = list(result.tokens())
    assert [len(block) for block in blocks] == [1] * 5
    np.testing.assert_array_equal(np.concatenate([block.expert_TC for block in blocks]), experts[0].reshape(5, 8))


def record_sharded(folder: str, ids: torch.Tensor) -> None:
    """The same of a dual-path model under FSDP2 in bf16, whose α and λ lie on rank 0 alone."""
    import zoo
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rank, model, mesh = torch.distributed.get_rank(), dual_path(zoo.build("qwen2")), init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mesh=mesh)
    with torch.no_grad(), record_routing(model, Path(folder, f"rank{rank}.parquet")):
        model(input_ids=ids[rank::2])


def dual_path(model: nn.Module) -> nn.Module:
    inject_dual_path_moe(model, num_experts=4, expert_dim=16, shared_expert_dim=24, alpha_init=0.9, lam_init=0.3)
    return model.eval()


@pytest.mark.slow
def test_two_processes_under_fsdp2(tmp_path):
    ids = torch.randint(3, 100, (6, 9))
    run_ranks(2, record_sharded, timeout=200, folder=str(tmp_path), ids=ids)
    parts = RoutingRecord.open([tmp_path / "rank0.parquet", tmp_path / "rank1.parquet"])
    assert (parts.facts.tokens, parts.facts.cases) == (54, 6)
    for layer in parts.facts.layers:
        assert (layer.alpha, layer.lam) == pytest.approx((0.9, 0.3), abs=1e-6)
