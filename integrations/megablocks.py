"""The `megablocks` backend: MegaBlocks' dispatch and combine around grouped_gemm's grouped GEMM, dropless.

Only MegaBlocks' operators are used: router, weights and activations are moe-adapter's own, so the router stays
float32 and no layer of MegaBlocks, with its capacity factor or its global list of losses, is involved. S is the number
of slots, T·K; R the rows of the first projection, 2F gated or F. docs/megablocks.md says how to install both packages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_adapter.errors import MoEAdapterError
from moe_adapter.precision import wide

try:
    from grouped_gemm.ops import gmm
    from megablocks import ops
except Exception as error:  # not ImportError alone: their compiled parts fail in many ways on another torch
    raise MoEAdapterError(
        "backend 'megablocks' needs the packages megablocks and grouped_gemm; importing them gave: "
        f"{str(error).rstrip('.')}. Install them where nvcc is: "
        'pip install "moe-adapter[megablocks]" --no-build-isolation, then '
        "pip install megablocks --no-build-isolation --no-deps; "
        "docs/megablocks.md has the edits that newer CUDA and torch need."
    ) from error

INT32_MAX = 2**31 - 1  # MegaBlocks' kernels compute offsets in int32


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which slot goes where: slots in the order of their experts, and how many each expert has."""

    order_S: Tensor  # the slot, t·K + k, at each place
    expert_S: Tensor  # the expert at each place
    ends_E: Tensor  # one past each expert's last place
    counts_E: Tensor  # int64 on the CPU, as cuBLAS wants them: the backend's one synchronisation
    top_k: int


@torch.compiler.disable  # extensions that it can't trace: the graph breaks here
def megablocks(experts, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ_i g_i(x)·E_i(x), shape (T, D) and dtype as x: the backend of that name.

    The routing weights enter in their own float32; MegaBlocks rounds their gradient to the experts' dtype.

    Raises:
        MoEAdapterError: T·K·D is beyond what MegaBlocks' kernels can address.
    """
    _check_size(index_TK.numel(), x_TD.shape[1])
    routing = _sort(index_TK, experts.num_experts)
    down_bias = experts.down_proj_bias if experts.has_bias else None
    dtype = _compute_dtype(x_TD.dtype, x_TD.device.type)
    # Under autocast MegaBlocks would cast everything, the routing weights too.
    with torch.autocast(x_TD.device.type, enabled=False):
        x_SD = ops.gather(x_TD.to(dtype).contiguous(), routing.order_S, routing.expert_S, routing.ends_E, routing.top_k)
        h_SR = _linear(x_SD, experts.first, experts.first_bias, routing)
        h_SF = experts._apply_gate(h_SR) if experts.has_gate else experts.act_fn(h_SR)
        y_SD = _linear(h_SF, experts.down_proj, down_bias, routing)
        weights_S = weights_TK.contiguous().view(-1)
        y_TD = ops.scatter(y_SD, routing.order_S, routing.expert_S, weights_S, routing.ends_E, routing.top_k)
    return y_TD.to(x_TD.dtype)


def refusal(experts, x_TD: Tensor) -> str | None:
    """Why MegaBlocks can't take this input, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":  # on the CPU, with stand-ins for what is compiled
        return None
    if x_TD.device.type != "cuda":
        return f"megablocks runs on CUDA devices, and this input is on {x_TD.device}"
    dtype = _compute_dtype(experts.first.dtype, x_TD.device.type)
    if dtype != torch.bfloat16:
        return (
            f"megablocks' grouped GEMM takes bfloat16, and the experts compute in {str(dtype).removeprefix('torch.')}"
        )
    return None


megablocks.refusal = refusal


def _compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def _check_size(slots: int, width: int) -> None:
    if slots * width > INT32_MAX:
        raise MoEAdapterError(
            f"backend 'megablocks' addresses 2^31 elements, and {slots} slots of width {width} are "
            f"{slots * width}: give it fewer tokens at once, or use backend='grouped_mm'."
        )


def _sort(index_TK: Tensor, experts: int) -> Routing:
    flat = index_TK.contiguous().view(-1).int()
    expert_S, order_S = ops.sort(flat, max((experts - 1).bit_length(), 1))
    counts_E = ops.histogram(flat, experts)
    ends_E = ops.inclusive_cumsum(counts_E, 0).view(experts)  # it drops the dimension of a single expert
    counts = counts_E.cpu().long()
    return Routing(order_S=order_S, expert_S=expert_S, ends_E=ends_E, counts_E=counts, top_k=index_TK.shape[1])


def _linear(x_SN: Tensor, weight_EMN: Tensor, bias_EM: Tensor | None, routing: Routing) -> Tensor:
    """Each slot through its expert's linear map, shape (S, M)."""
    weight = EmptyGetZero.apply(weight_EMN.to(x_SN.dtype).contiguous(), routing.counts_E)
    y_SM = gmm(x_SN, weight, routing.counts_E, trans_b=True)
    if bias_EM is None:
        return y_SM
    # Looked up in float32, so that the bias's gradient, a sum over slots, is summed in float32.
    return y_SM + bias_EM.to(wide(x_SN.dtype)).index_select(0, routing.expert_S).to(x_SN.dtype)


class EmptyGetZero(torch.autograd.Function):
    """Identity on the weights (E, …) whose gradient is zero for experts without slots, which gmm leaves unwritten."""

    @staticmethod
    def forward(ctx, weight: Tensor, counts_E: Tensor) -> Tensor:
        ctx.empty = (counts_E == 0).nonzero().view(-1)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.empty.numel():
            grad.index_fill_(0, ctx.empty.to(grad.device), 0)
        return grad, None
