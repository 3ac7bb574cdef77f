"""The layers that are timed: ours by backend, and peers on the same weights: transformers' experts and a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen2Config
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from benchmarks.shapes import Shape
from moe_adapter import DualPathConfig, DualPathMoE, inject_dual_path_moe

BATCHED_BYTES = 2**30
PEERS = ("transformers eager", "transformers grouped_mm", "transformers batched_mm", "sorted loop")


def our_layer(shape: Shape, like: Tensor, backend: str) -> DualPathMoE:
    """A dual-path layer around a real Qwen2 FFN, trained a little: nothing in it is zero."""
    config = Qwen2Config(hidden_size=shape.hidden, intermediate_size=shape.static, hidden_act="silu")
    with torch.device(like.device):
        host = nn.ModuleDict(dict(ffn=Qwen2MLP(config).to(like.dtype)))
        sizes = dict(num_experts=shape.experts, top_k=shape.top_k, expert_dim=shape.expert)
        sizes |= dict(router_softmax="all") if shape.top_k == 1 else {}
        inject_dual_path_moe(host, "ffn", DualPathConfig(shared_expert_dim=shape.shared, backend=backend, **sizes))
    layer = host["ffn"]
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    return layer


class PeerLayer(nn.Module):
    """Equation (3) as one would write it down in torch, on the weights of `layer`, with a peer's experts."""

    def __init__(self, layer: DualPathMoE, experts: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.layer, self.experts = layer, experts

    def forward(self, x: Tensor) -> Tensor:
        _, weights_TK, index_TK = self.layer.router(x)
        routed = self.experts(x, index_TK, weights_TK)
        moe = self.layer.lam.to(x.dtype) * self.layer.shared_expert(x) + routed.to(x.dtype)
        alpha = self.layer.alpha.to(x.dtype)
        return alpha * self.layer.static_scale * self.layer.static_expert(x) + (1 - alpha) * moe


def peers(shape: Shape, like: Tensor) -> tuple[str, ...]:
    """The peers that can run: batched_mm copies an expert's weights for every slot, which takes more than there is."""
    copies = 3 * shape.tokens * shape.top_k * shape.hidden * shape.expert * like.element_size()
    return tuple(name for name in PEERS if "batched" not in name or copies < BATCHED_BYTES)


def peer_experts(layer: DualPathMoE, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The experts function of a peer, on the layer's own expert weights."""
    experts = layer.experts
    if name == "sorted loop":
        return lambda x, index, weights: sorted_loop(experts, x, index, weights)
    sizes = dict(num_local_experts=experts.num_experts, hidden_size=layer.ffn.hidden, hidden_act="silu")
    config = MixtralConfig(**sizes, intermediate_size=experts.down_proj.shape[2])
    config._experts_implementation = name.removeprefix("transformers ")
    with torch.device("meta"):
        theirs = MixtralExperts(config)
    theirs.gate_up_proj, theirs.down_proj = experts.gate_up_proj, experts.down_proj
    theirs.act_fn = nn.SiLU()
    return theirs


def sorted_loop(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What one writes by hand: slots sorted by expert, one expert after another, all under autograd."""
    order = index_TK.flatten().argsort(stable=True)
    counts = index_TK.flatten().bincount(minlength=experts.num_experts).tolist()
    token = order // index_TK.shape[1]
    parts, firsts, downs = [], experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0)
    for expert, rows in enumerate(x_TD[token].split(counts)):
        gate, up = F.linear(rows, firsts[expert]).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up, downs[expert]))
    y_SD = torch.cat(parts) * weights_TK.flatten()[order, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, token, y_SD)
