"""One measurement each: the layer, its routed part, decoding, memory, a whole model's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import gate, ideal
from benchmarks.shapes import Shape
from benchmarks.subjects import PeerLayer, our_layer, peer_experts, peers
from benchmarks.timing import Time, interleaved
from moe_adapter import DualPathMoE, inject_dual_path_moe, set_stage
from moe_adapter.backends import run_backend

Times = dict[str, Time]
IDEAL, GEMMS = "ideal (dense)", "its products alone"


def layer_times(shape: Shape, like: Tensor, backends: list[str], seconds: float) -> dict[str, Times]:
    """Forward and training step of the whole layer: what → subject → time."""
    layers = {backend: our_layer(shape, like, backend) for backend in backends}
    calls: dict[str, Callable[[Tensor], Tensor]] = {f"ours, {name}": layer for name, layer in layers.items()}
    first = next(iter(layers.values()))
    for name in peers(shape, like):
        calls[name] = PeerLayer(first, peer_experts(first, name))
    for name, call in calls.items():
        gate.check(name, layers.get(name.removeprefix("ours, "), first), call)
    dense = ideal.Dense(shape, like, routed_only=False)
    _assert_equal_work(shape, like, first, dense)
    calls[IDEAL] = dense
    x = torch.randn(shape.tokens, shape.hidden, device=like.device).to(like.dtype)
    return {what: _times(calls, dense, x, what, seconds) for what in ("forward", "training")}


def routed_times(shape: Shape, like: Tensor, backends: list[str], seconds: float, *, training: bool = True) -> Times:
    """The routed experts alone, given the router's choice: a forward with its backward, or the forward."""
    layer = our_layer(shape, like, "eager")
    x = torch.randn(shape.tokens, shape.hidden, device=like.device).to(like.dtype)
    with torch.no_grad():
        _, weights, index = layer.router(x)
    calls: dict[str, Callable] = {}
    for backend in backends:
        calls[f"ours, {backend}"] = _with_backend(layer, backend)
    calls |= {name: peer_experts(layer, name) for name in peers(shape, like)}
    for name, call in calls.items():
        gate.check_routed(name, layer, call)
    ready = {name: (lambda given, call=call: call(given, index, weights)) for name, call in calls.items()}
    dense = ideal.Dense(shape, like, routed_only=True)
    ready[IDEAL] = dense
    return _times(ready, dense, x, "training" if training else "forward", seconds)


def decode_times(shape: Shape, like: Tensor, backends: list[str], seconds: float) -> Times:
    """One token through the whole layer, without gradients."""
    return layer_times(shape.of(tokens=1), like, backends, seconds)["forward"]


def saved_bytes(shape: Shape, like: Tensor, backend: str) -> dict[str, int]:
    """Bytes that a training forward keeps for backward, weights and input aside: ours, and the sorted loop's."""
    layer = our_layer(shape, like, backend)
    calls = {f"ours, {backend}": layer, "sorted loop": PeerLayer(layer, peer_experts(layer, "sorted loop"))}
    x = torch.randn(shape.tokens, shape.hidden, device=like.device).to(like.dtype).requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    found = {}
    for name, call in calls.items():
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call(x)
        found[name] = sum(kept.values())
        del output
    return found


def model_step_times(shape: Shape, like: Tensor, backends: list[str], seconds: float) -> Times:
    """A training step of a two-layer Qwen2 of the layer's widths, by backend."""
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.static,
        num_hidden_layers=2,
        num_attention_heads=shape.hidden // 32,
        num_key_value_heads=2,
        vocab_size=512,
    )
    sizes = dict(num_experts=shape.experts, top_k=shape.top_k, expert_dim=shape.expert, shared_expert_dim=shape.shared)
    ids = torch.randint(0, 512, (2, shape.tokens // 2), device=like.device)
    calls = {}
    for backend in backends:
        model = Qwen2ForCausalLM(config).to(like.device, like.dtype)
        set_stage(inject_dual_path_moe(model, backend=backend, **sizes), 1)
        calls[backend] = lambda model=model: model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return interleaved(calls, seconds=seconds)


def _with_backend(layer: DualPathMoE, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, index, weights: run_backend(backend, layer.experts, x, index, weights)


def _times(calls: dict[str, Callable], dense: ideal.Dense, x: Tensor, what: str, seconds: float) -> Times:
    ready: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        ready[name] = (lambda call=call: train(call, x)) if what == "training" else (lambda call=call: infer(call, x))
    ready[GEMMS] = ideal.gemms(dense, x, training=what == "training")
    return interleaved(ready, seconds=seconds)


def infer(call: Callable, x: Tensor) -> None:
    """Forward alone."""
    with torch.no_grad():
        call(x)


def train(call: Callable, x: Tensor) -> None:
    """Forward and backward to x and every parameter that trains; gradients are dropped, as an optimizer would."""
    given = x.detach().requires_grad_()
    call(given).backward(x)
    if isinstance(call, nn.Module):
        call.zero_grad(set_to_none=True)


def _assert_equal_work(shape: Shape, like: Tensor, layer: DualPathMoE, dense: ideal.Dense) -> None:
    """The ideal's products have the multiply-adds of the layer's, the router's own aside."""
    x = torch.randn(shape.tokens, shape.hidden, device=like.device).to(like.dtype)
    plain = PeerLayer(layer, peer_experts(layer, "sorted loop"))
    with torch.no_grad():
        work = ideal.multiply_adds(lambda: plain(x)) - shape.tokens * shape.hidden * shape.experts
    expected = sum(m * k * n for m, k, n in dense.products(shape.tokens, training=False))
    assert work == expected == ideal.multiply_adds(lambda: infer(dense, x)), (work, expected)
