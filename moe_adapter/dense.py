"""A dense feed-forward block as one operator: the static and the shared expert of equation (3), each with its factor.

y = s·down(act(gate(x))·up(x)), the factor s float32, of shape (1,) or (T, 1). For backward it keeps the
pre-activations alone: no activation, no output, and nothing for the gradient of a frozen weight. Where no weight
trains it goes over the tokens in chunks on a CPU, so that what passes between the maps stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from moe_adapter.activations import activate, activate_backward
from moe_adapter.errors import MoEAdapterError

CHUNK = 512  # tokens


class Maps(NamedTuple):
    """The linear maps of an FFN: weights (out, in), `gate` None where it is ungated, and biases."""

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Maps:
        return Maps(*(None if tensor is None else tensor.to(dtype) for tensor in self))  # pyright: ignore


def dense_ffn(x_TD: Tensor, factor: Tensor, maps: Maps, activation: str) -> Tensor:
    """s·FFN(x), shape (T, D), for a `factor` s (1,) or (T, 1) in float32 and an `activation` in ACTIVATIONS."""
    run = fastest(_forward, DenseFFN, dense_ffn_op, (x_TD, factor, *maps))
    if run is _forward and len(x_TD) <= CHUNK:
        return _at_once(x_TD, factor, maps, activation)
    return run(x_TD, factor, *maps, activation, run is not _forward)[0]


def _at_once(x_TD: Tensor, factor: Tensor, maps: Maps, activation: str) -> Tensor:
    """`_forward` of few tokens, as in decoding, without what chunks cost."""
    gate = None if maps.gate_FD is None else F.linear(x_TD, maps.gate_FD, maps.gate_bias_F)
    a = activate(activation, gate, F.linear(x_TD, maps.up_FD, maps.up_bias_F))
    return F.linear(a, maps.down_DF, maps.down_bias_D).mul_(factor)


def fastest(
    plain: Callable, function: type[Function], operator: Callable, tensors: Sequence[Tensor | None]
) -> Callable:
    """How to run an operator: as one under torch.compile, else without the dispatcher, and plain without gradients."""
    if torch.compiler.is_compiling():
        return operator
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return function.apply if wanted else plain


def _forward(
    x_TD: Tensor,
    factor: Tensor,
    gate_FD: Tensor | None,
    up_FD: Tensor,
    down_DF: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    down_bias_D: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (T, D) and, if `keep`, the pre-activations of gate and up, each (T, F)."""
    y_TD, gate_TF, up_TF = _shapes(x_TD, gate_FD, up_FD, keep)
    for rows in _chunks(x_TD):
        x = x_TD[rows]
        gate = None if gate_FD is None else _linear(x, gate_FD, gate_bias_F, gate_TF[rows])
        up = _linear(x, up_FD, up_bias_F, up_TF[rows])
        y = _linear(activate(activation, gate, up), down_DF, down_bias_D, y_TD[rows])
        y.mul_(_of(factor, rows))
    return y_TD, gate_TF, up_TF


def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    factor: Tensor,
    gate_FD: Tensor | None,
    up_FD: Tensor,
    down_DF: Tensor,
    down_bias_D: Tensor | None,
    gate_TF: Tensor,
    up_TF: Tensor,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, the factor and the maps; a tensor of no elements where `needs` says that none is wanted."""
    trains = any(needs[2:])
    dx_TD, dfactor_T1, *dmaps = _gradients(x_TD, factor, gate_FD, up_FD, down_DF, needs)
    for rows in _chunks(x_TD, whole=trains):
        dy, s, up = dy_TD[rows], _of(factor, rows), up_TF[rows]
        gate = None if gate_FD is None else gate_TF[rows]
        da = torch.mm(dy, down_DF)
        a = activate(activation, gate, up) if trains or gate is None else None
        if trains:
            _down_gradients(dmaps, (dy * s).to(dy.dtype), a)
        if needs[1] and gate is None:
            dfactor_T1[rows, 0] = _dot(a, da)
        dgate, dup = activate_backward(activation, da, gate, up)
        if needs[1] and gate is not None:  # ⟨a, da⟩ without a
            dfactor_T1[rows, 0] = _dot(dup, up)
        if trains:
            _up_gradients(dmaps, (x_TD[rows] * s).to(dy.dtype), dgate, dup, s)
        if needs[0]:
            dx = torch.mm(dup, up_FD, out=dx_TD[rows])
            (dx if dgate is None else dx.addmm_(dgate, gate_FD)).mul_(s)  # pyright: ignore
    if needs[1] and down_bias_D is not None:
        dfactor_T1 += (dy_TD @ down_bias_D)[:, None]
    dfactor = dfactor_T1 if factor.dim() == 2 else dfactor_T1.sum(0)
    return [dx_TD, dfactor, *dmaps]


def _dot(left: Tensor | None, right: Tensor) -> Tensor:
    """Row by row, (T,): ⟨dy, FFN(x)⟩ is ⟨da, a⟩, which takes no output, and no bias of the down map."""
    return torch.linalg.vecdot(left, right)


def _down_gradients(dmaps: list[Tensor], dy: Tensor, a: Tensor | None) -> None:
    """Of the down map, from the scaled gradient of its output, into those of `dmaps` that have elements."""
    ddown_DF, ddown_bias_D = dmaps[2], dmaps[5]
    if ddown_DF.numel() and a is not None:
        torch.mm(dy.T, a, out=ddown_DF)
    if ddown_bias_D.numel():
        torch.sum(dy, 0, out=ddown_bias_D)


def _up_gradients(dmaps: list[Tensor], x: Tensor, dgate: Tensor | None, dup: Tensor, s: Tensor) -> None:
    """Of the gate and the up map, from the scaled input x, into those of `dmaps` that have elements."""
    for dweight_FD, dbias_F, dh in ((dmaps[0], dmaps[3], dgate), (dmaps[1], dmaps[4], dup)):
        if dweight_FD.numel() and dh is not None:
            torch.mm(dh.T, x, out=dweight_FD)
        if dbias_F.numel() and dh is not None:
            dbias_F.copy_((dh * s).sum(0))


def _shapes(x_TD: Tensor, gate_FD: Tensor | None, up_FD: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `_forward` returns; pre-activations that are not kept get no rows."""
    tokens = x_TD.shape[0] if keep else 0
    gate_TF = x_TD.new_empty(0 if gate_FD is None else tokens, up_FD.shape[0])
    up_TF = x_TD.new_empty(tokens, up_FD.shape[0])
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), gate_TF, up_TF


def _gradients(x, factor, gate_FD, up_FD, down_DF, needs: list[bool]) -> list[Tensor]:
    """Memory for the gradients: the factor's one a token, biases as wide as their maps."""
    gate = up_FD[:0] if gate_FD is None else gate_FD
    like = (x, None, gate, up_FD, down_DF, gate[:, 0], up_FD[:, 0], down_DF[:, 0])
    out = [
        x.new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in zip(like, needs, strict=True)
    ]
    out[1] = factor.new_zeros(x.shape[0], 1)
    return out


def _chunks(x_TD: Tensor, *, whole: bool = False) -> Iterator[slice]:
    tokens = max(len(x_TD), 1)  # no tokens are a chunk too: weights' gradients are then zero
    step = tokens if whole or x_TD.device.type != "cpu" else CHUNK
    return (slice(start, start + step) for start in range(0, tokens, step))


def _of(factor: Tensor, rows: slice) -> Tensor:
    return factor[rows] if factor.dim() == 2 else factor


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x·Wᵀ + b into `out`, or into new memory where `out` has no rows."""
    out = out if len(out) else x.new_empty(len(x), len(weight))
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


dense_ffn_op = torch.library.custom_op("moe_adapter::dense_ffn", _forward, mutates_args=())
dense_ffn_backward_op = torch.library.custom_op("moe_adapter::dense_ffn_backward", _backward, mutates_args=())


@dense_ffn_op.register_fake
def _(x_TD, factor, gate_FD, up_FD, down_DF, gate_bias, up_bias, down_bias, activation, keep):
    return _shapes(x_TD, gate_FD, up_FD, keep)


@dense_ffn_backward_op.register_fake
def _(dy, x_TD, factor, gate_FD, up_FD, down_DF, down_bias, gate_TF, up_TF, activation, needs):
    dx, dfactor, *dmaps = _gradients(x_TD, factor, gate_FD, up_FD, down_DF, needs)
    return [dx, dfactor if factor.dim() == 2 else dfactor.sum(0), *dmaps]


def _setup_context(ctx, inputs, output) -> None:
    x, factor, gate, up, down, _, _, down_bias, ctx.activation, _ = inputs
    ctx.save_for_backward(x, factor, gate, up, down, down_bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, dy_TD: Tensor, *_, run: Callable = dense_ffn_backward_op):
    refuse_second_derivative()
    needs = list(ctx.needs_input_grad[:8])
    grads = run(dy_TD, *ctx.saved_tensors, ctx.activation, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def refuse_second_derivative() -> None:
    """Called in a backward: an error if its result is to be differentiated again."""
    if torch.is_grad_enabled():
        raise MoEAdapterError(
            "got backward with create_graph=True through operators that have no second derivative; inject with "
            "backend='eager', which can be differentiated any number of times."
        )


dense_ffn_op.register_autograd(_autograd, setup_context=_setup_context)


class DenseFFN(Function):
    """The operator without the dispatcher's cost, where nothing is compiled."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, *grads):
        return _autograd(ctx, *grads, run=_backward)
