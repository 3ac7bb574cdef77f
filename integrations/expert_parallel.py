"""Expert parallelism: each rank of a device mesh's dimension holds a part of every layer's routed experts.

The dimension is a data dimension: each rank brings tokens of its own, in any number, none among them. A token goes to
the ranks that hold its experts and comes back (two all-to-alls a layer), dropless; router, shared expert and static
expert stay where they are, and F and G of the balance loss are those of a rank's own tokens.

Gradients are those of data parallelism, of the mean over ranks of their losses. A sharded expert's is that mean already
when backward ends, for it saw the tokens of all; the others are averaged by what averages them without expert
parallelism: DistributedDataParallel, which is told to leave the experts alone, or FSDP2. Every rank of the dimension
has to run forward and backward as often as the others.

T tokens of this rank, S = T·K slots (token, expert) that it sends, N slots that it receives, R ranks, L local experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moe_adapter.errors import MoEAdapterError
from moe_adapter.experts import Experts
from moe_adapter.objective import dual_path_layers
from moe_adapter.surgery import unwrapped


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the routed experts of an injected model over the ranks of `mesh`, in place; returns the same model.

    Rank r of R keeps experts r·L … (r+1)·L − 1 of every layer, L = ⌈E/R⌉, as DTensors `Shard(0)`; the last may keep
    fewer. As in DDP, the values of the mesh's first rank count. Any backend goes on computing the local experts.

    The order is inject, LoRA, shard, wrap. DDP(model) then works as it is. FSDP2 takes the experts as units of their
    own, over the mesh dimensions that replicate them: `fully_shard(layer.experts, mesh=mesh["dp"])`, then the rest over
    all ranks; where nothing replicates them, `fully_shard(model, ignored_params={*layer.experts.parameters(), …})`.
    An optimizer that is `fused` or `foreach` wants them in a parameter group of their own, and gradients are clipped by
    `clip_grad_norm_` of this module. `save_adapter` and `load_adapter` work on the model as it is, on every rank.

    Args:
        model: injected, not wrapped yet; a PeftModel with its LoRA is fine.
        mesh: of one dimension; of a larger mesh its part, `mesh["ep"]`. A data dimension, as said above.

    Raises:
        MoEAdapterError: a mesh of several dimensions or of another device, no routed experts, fewer than there are
            ranks, experts that are sharded already, or a wrapped model; the model is left as it was.
    """
    owner = unwrapped(model)
    layers = {name: layer.experts for name, layer in dual_path_layers(owner).items() if layer.experts is not None}
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        got = f"{mesh.ndim} dimensions {mesh.mesh_dim_names}" if isinstance(mesh, DeviceMesh) else repr(mesh)
        raise MoEAdapterError(f'shard_experts: got {got}, expected a DeviceMesh of one: pass its part, mesh["ep"].')
    if not layers:
        raise MoEAdapterError(
            f"{type(owner).__name__} has no routed experts to shard: call inject_dual_path_moe(model) first, with "
            "num_experts > 0."
        )
    for name, experts in layers.items():
        _check(name, experts, mesh)
    for experts in layers.values():
        _shard(experts, mesh)
    sharded = {id(parameter) for experts in layers.values() for parameter in experts.parameters(recurse=False)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in sharded]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return model


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters of which some are sharded; returns the norm of all, a scalar.

    Every rank has the same norm. torch's own takes no plain and sharded parameters at once, nor those of two meshes.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    norms = [get_total_norm([p.grad for p in group]) for group in groups.values()]  # pyright: ignore
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total


class ShardedExperts(Experts):
    """Routed experts of which this rank holds a part; called as `Experts` are, on this rank's tokens.

    Every rank of `mesh` takes part in each call. Parameters are DTensors over all experts.
    """

    mesh: DeviceMesh

    @torch.compiler.disable  # how much is sent is known at run time only: the graph breaks here
    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Σ_{i ∈ top-k} g_i(x)·E_i(x) of equation (3), shape (T, D).

        Weights are applied where the tokens come from. A rank to which no token comes runs its experts on none: their
        gradients are zeros, not None, and its backward takes part in the exchange.
        """
        x = x_TD
        if torch.is_autocast_enabled(x.device.type):  # half the bytes to send
            x = x.to(torch.get_autocast_dtype(x.device.type))
        local, group = self._local(), self.mesh.get_group()
        order_S = index_TK.flatten().argsort(stable=True)
        trip = _plan_trip(index_TK, self.num_experts, self.mesh)
        x_SD = x[order_S // index_TK.shape[1]]
        x_ND = all_to_all_single_autograd(x_SD, trip.received, trip.sent, group)
        y_ND = local.forward(x_ND, trip.expert_N[:, None], weights_TK.new_ones(len(x_ND), 1))
        y_SD = all_to_all_single_autograd(y_ND, trip.sent, trip.received, group)
        place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=x.device))
        y_TKD = y_SD[place_S].view(*index_TK.shape, x.shape[1])
        return (weights_TK.to(y_TKD.dtype)[:, None] @ y_TKD)[:, 0].to(x_TD.dtype)

    def _local(self) -> Experts:
        """This rank's experts, as plain ones; their gradients become the mean over ranks."""
        local = Experts.__new__(Experts)
        parts = {name: _plain(parameter, self.mesh) for name, parameter in self._parameters.items()}
        local.__dict__ = {**self.__dict__, "_parameters": parts}
        local.num_experts = len(local.down_proj)
        return local


def _check(name: str, experts: Experts, mesh: DeviceMesh) -> None:
    if isinstance(experts, ShardedExperts):
        raise MoEAdapterError(f"{name}: the experts are sharded already: call shard_experts(model, mesh) once.")
    if not isinstance(experts, Experts):
        raise MoEAdapterError(
            f"{name}: the experts are wrapped in a {type(experts).__name__}, expected plain ones: keep peft's "
            "target_parameters off them."
        )
    device = experts.down_proj.device.type
    if device not in (mesh.device_type, "meta"):
        raise MoEAdapterError(
            f"{name}: the experts are on {device}, the mesh is of {mesh.device_type}: move the model there first."
        )
    if _sizes(experts.num_experts, mesh.size())[-1] == 0:
        raise MoEAdapterError(
            f"{name}: {experts.num_experts} experts in parts of {_sizes(experts.num_experts, mesh.size())[0]} leave a "
            f"rank of {mesh.size()} without any, expected one at least for each: take a smaller mesh, or more experts."
        )


def _shard(experts: Experts, mesh: DeviceMesh) -> None:
    for name, parameter in experts._parameters.items():
        if parameter is not None:
            sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            experts._parameters[name] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
    experts.__class__ = ShardedExperts
    experts.mesh = mesh  # pyright: ignore


def _sizes(experts: int, ranks: int) -> list[int]:
    """How many experts each rank holds: DTensor's parts, those of torch.chunk."""
    part = -(-experts // ranks)
    return [min(part, max(experts - rank * part, 0)) for rank in range(ranks)]


@dataclass(frozen=True, kw_only=True)
class Trip:
    """Where slots go, in the order of their experts."""

    sent: list[int]  # slots to each rank
    received: list[int]  # slots from each rank
    expert_N: Tensor  # the local expert of each slot received


def _plan_trip(index_TK: Tensor, experts: int, mesh: DeviceMesh) -> Trip:
    """Tell the other ranks how many slots their experts get. The one synchronisation with the device."""
    sizes, rank = _sizes(experts, mesh.size()), mesh.get_local_rank()
    flat = index_TK.flatten()
    counts_E = flat.new_zeros(experts).index_add_(0, flat, torch.ones_like(flat))  # bincount would wait for the device
    arriving = all_to_all_single(counts_E, [sizes[rank]] * mesh.size(), sizes, mesh.get_group())
    arriving_RL = arriving.view(mesh.size(), sizes[rank])
    sent_R = torch.stack([counts.sum() for counts in counts_E.split(sizes)])
    sent, received = torch.stack([sent_R, arriving_RL.sum(dim=1)]).tolist()
    local = torch.arange(sizes[rank], device=index_TK.device).repeat(mesh.size())
    expert_N = local.repeat_interleave(arriving_RL.flatten(), output_size=sum(received))
    return Trip(sent=sent, received=received, expert_N=expert_N)


def _plain(parameter: DTensor | None, mesh: DeviceMesh) -> Tensor | None:
    """This rank's part, whose gradient is divided by the ranks that it comes from."""
    if parameter is None:
        return None
    part = parameter.to_local()
    if part.requires_grad:
        part.register_hook(lambda gradient: gradient / mesh.size())
    return part
