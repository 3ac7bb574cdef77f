"""The `lean` backend: the routed experts as one dropless operator that reads each weight once a pass.

Slots (token, expert) are sorted by expert; each expert then multiplies its own rows, with no one-hot, no padding and
no weight indexed under autograd. The routing weight is folded in before the down projection; each token's K results
are summed in one pass. Backward recomputes the activations from the pre-activations that forward kept. Experts with few
slots, as in decoding, are taken together between their products.

It is a custom operator with a shape rule, so torch.compile takes it whole, whatever the number of tokens. S is the
number of slots, T·K; R the rows of the first projection, 2F gated or F.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_adapter.activations import activate, activate_backward
from moe_adapter.dense import fastest, refuse_second_derivative

FEW, BLOCK = 16, 128  # slots: sorted in Python up to here; taken together up to there, see `_blocks`

Members = list[tuple[int, slice]]  # an expert and its rows


def lean(experts, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ_i g_i(x)·E_i(x), shape (T, D): the backend of that name, for activations in `ACTIVATIONS`."""
    weights = [experts.first, experts.down_proj, experts.first_bias, getattr(experts, "down_proj_bias", None)]
    x, device = x_TD, x_TD.device.type
    if torch.is_autocast_enabled(device):
        x, *weights = [None if t is None else t.to(torch.get_autocast_dtype(device)) for t in (x, *weights)]
    run = fastest(_forward, LeanExperts, lean_experts, (x, weights_TK, *weights))
    keep = run is not _forward
    out_TD, _ = run(x, index_TK, weights_TK, *weights, experts.activation, experts.has_gate, keep)
    return out_TD.to(x_TD.dtype)


def refusal(experts, x_TD: Tensor) -> str | None:
    """Why `lean` can't take these experts, or None."""
    return "lean knows no derivative of this activation" if experts.activation is None else None


lean.refusal = refusal  # pyright: ignore


def _forward(
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    first_ERD: Tensor,
    down_EDF: Tensor,
    first_bias_ER: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Output (T, D) and, if `keep`, the sorted slots' pre-activations (S, R) for backward."""
    slot_S, groups = _groups(index_TK, first_ERD.shape[0])
    token_S, weight_S1 = slot_S // index_TK.shape[1], weights_TK.reshape(-1, 1)[slot_S].to(x_TD.dtype)
    y_SD = x_TD.new_empty(len(slot_S), x_TD.shape[1])
    h_SR = x_TD.new_empty(len(slot_S) if keep else 0, first_ERD.shape[1])
    for rows, members in _blocks(groups, BLOCK if gated else 0):
        token, weight, y = token_S[rows], weight_S1[rows], y_SD[rows]
        h = _products(x_TD[token], first_ERD.mT, members, h_SR[rows] if keep else None)
        for expert, own in members if first_bias_ER is not None else ():
            h[own] += first_bias_ER[expert]  # pyright: ignore
        a = activate(activation, *_gate_and_up(h, gated)).mul_(weight)
        _products(a, down_EDF.mT, members, y)
        for expert, own in members if down_bias_ED is not None else ():
            y[own] += weight[own] * down_bias_ED[expert]  # pyright: ignore
    return _combine(y_SD, slot_S, index_TK), h_SR


def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    first_ERD: Tensor,
    down_EDF: Tensor,
    first_bias_ER: Tensor | None,
    down_bias_ED: Tensor | None,
    h_SR: Tensor,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weights and the four parameters; an empty tensor where `needs` says that none is wanted."""
    inputs = (x_TD, weights_TK, first_ERD, down_EDF, first_bias_ER, down_bias_ED)
    slot_S, groups = _groups(index_TK, first_ERD.shape[0])
    token_S, weight_S1 = slot_S // index_TK.shape[1], weights_TK.reshape(-1, 1)[slot_S].to(x_TD.dtype)
    idle = sorted(set(range(first_ERD.shape[0])) - {expert for expert, _ in groups})
    grads = _empty_grads(inputs, needs, idle)
    dx_SD = x_TD.new_empty(len(slot_S) if needs[0] else 0, x_TD.shape[1])
    _, dw_TK, dfirst, ddown, dfirst_bias, ddown_bias = (g if n else None for g, n in zip(grads, needs, strict=True))
    for rows, members in _blocks(groups, BLOCK if gated else 0):
        token, weight = token_S[rows], weight_S1[rows]
        gate, up = _gate_and_up(h_SR[rows], gated)
        dy = grad_TD[token]
        da, a = _products(dy, down_EDF, members), activate(activation, gate, up)
        if dw_TK is not None:
            dw = torch.linalg.vecdot(da, a).to(dw_TK.dtype)
            for expert, own in members if down_bias_ED is not None else ():
                dw[own] += dy[own] @ down_bias_ED[expert]  # pyright: ignore
            dw_TK.view(-1)[slot_S[rows]] = dw
        if ddown is not None:
            _weight_gradients(dy, a.mul_(weight), members, ddown)
        if ddown_bias is not None:
            _bias_gradients(dy * weight, members, ddown_bias)
        dgate, dup = activate_backward(activation, da.mul_(weight), gate, up)
        dh = dup if dgate is None else torch.cat([dgate, dup], dim=1)
        if dfirst_bias is not None:
            _bias_gradients(dh, members, dfirst_bias)
        if dfirst is not None:
            _weight_gradients(dh, x_TD[token], members, dfirst)
        if needs[0]:
            _products(dh, first_ERD, members, dx_SD[rows])
    if needs[0]:
        grads[0] = _combine(dx_SD, slot_S, index_TK)
    return grads


def _products(x: Tensor, weight_E: Tensor, members: Members, out: Tensor | None = None) -> Tensor:
    """Each expert's rows of x times its own matrix, into `out` or new memory."""
    out = x.new_empty(len(x), weight_E.shape[2]) if out is None else out
    for expert, own in members:
        torch.mm(x[own], weight_E[expert], out=out[own])
    return out


def _weight_gradients(dy: Tensor, x: Tensor, members: Members, out_E: Tensor) -> None:
    for expert, own in members:
        torch.mm(dy[own].T, x[own], out=out_E[expert])


def _bias_gradients(dy: Tensor, members: Members, out_E: Tensor) -> None:
    for expert, own in members:
        torch.sum(dy[own], 0, out=out_E[expert])


def _combine(y_SD: Tensor, slot_S: Tensor, index_TK: Tensor) -> Tensor:
    """Each token's sum over its K slots, (T, D), from rows in the order of `slot_S`; added up in float32 at least."""
    place_S = torch.empty_like(slot_S)
    place_S[slot_S] = torch.arange(len(slot_S), device=slot_S.device)
    return F.embedding_bag(place_S.view_as(index_TK), y_SD, mode="sum")


def _groups(index_TK: Tensor, experts: int) -> tuple[Tensor, Members]:
    """Slots ordered by expert, and which of them each expert has that has any."""
    flat = index_TK.reshape(-1)
    if len(flat) <= FEW and flat.device.type == "cpu":  # as in decoding, where three operators cost more than this
        chosen = flat.tolist()
        order = torch.tensor(sorted(range(len(chosen)), key=chosen.__getitem__), dtype=flat.dtype)
        counts = [chosen.count(expert) for expert in range(experts)]
    else:
        order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=experts).tolist()
    ends = itertools.accumulate(counts)
    return order, [(expert, slice(end - n, end)) for expert, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]


def _blocks(groups: Members, limit: int) -> Iterator[tuple[slice, Members]]:
    """Neighbours with few slots together, and where each lies among them: what isn't a product is done for all at once.

    An expert of many slots is a block of its own, so that what passes between its products stays in the cache. So is
    every ungated one: torch takes rows that touch as one line, and its end by other instructions, so that the last bit
    of a result would depend on the neighbours.
    """
    block: Members = []
    for expert, rows in groups:
        if block and rows.stop - block[0][1].start > limit:
            yield _block(block)
            block = []
        block.append((expert, rows))
    if block:
        yield _block(block)


def _block(groups: Members) -> tuple[slice, Members]:
    start = groups[0][1].start
    members = [(expert, slice(rows.start - start, rows.stop - start)) for expert, rows in groups]
    return slice(start, groups[-1][1].stop), members


def _gate_and_up(h: Tensor, gated: bool) -> tuple[Tensor | None, Tensor]:
    return tuple(h.chunk(2, dim=-1)) if gated else (None, h)  # pyright: ignore


def _empty_grads(inputs: tuple[Tensor | None, ...], needs: list[bool], idle: Sequence[int] = ()) -> list[Tensor]:
    """Memory for the gradients, zero for experts that are `idle`; tensors of no elements where none is wanted."""
    x = inputs[0]
    assert x is not None
    grads = [
        x.new_empty(0) if t is None or not n else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, n in zip(inputs, needs, strict=True)
    ]
    for grad, need in zip(grads[2:], needs[2:], strict=True):
        for expert in idle if need else ():
            grad[expert].zero_()  # one by one: indexing by the list takes ten times as long
    return grads


lean_experts = torch.library.custom_op("moe_adapter::lean_experts", _forward, mutates_args=())
lean_experts_backward = torch.library.custom_op("moe_adapter::lean_experts_backward", _backward, mutates_args=())


@lean_experts.register_fake
def _(x_TD, index_TK, weights_TK, first_ERD, down_EDF, first_bias_ER, down_bias_ED, activation, gated, keep):
    slots = index_TK.shape[0] * index_TK.shape[1] if keep else 0
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), x_TD.new_empty(slots, first_ERD.shape[1])


@lean_experts_backward.register_fake
def _(grad, x, index, weights, first, down, first_bias, down_bias, h, activation, gated, needs):
    return _empty_grads((x, weights, first, down, first_bias, down_bias), needs)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.gated, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_TD: Tensor, _, run: Callable = lean_experts_backward):
    refuse_second_derivative()
    x, index, *rest, h = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], *wanted[2:7]]
    grads = run(grad_TD, x, index, *rest, h, ctx.activation, ctx.gated, needs)
    dx, *others = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, None, *others, None, None, None


lean_experts.register_autograd(_autograd, setup_context=_setup_context)


class LeanExperts(torch.autograd.Function):
    """The operator without the dispatcher's cost, where nothing is compiled."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, *grads):
        return _autograd(ctx, *grads, run=_backward)
