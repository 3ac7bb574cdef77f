"""The benchmark script at toy size: it runs to the end, and prints no table over a wrong result."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gate, ideal
from benchmarks.__main__ import main
from benchmarks.dispatch import dispatch_share, grouped_mm_dispatch, lean_dispatch
from benchmarks.measure import saved_bytes, train
from benchmarks.shapes import TOY
from benchmarks.subjects import PEERS, PeerLayer, our_layer, peer_experts, sorted_loop
from moe_adapter.backends import run_backend

LIKE = torch.empty(0)


def test_it_writes_a_page_and_a_figure(tmp_path):
    assert main(["--toy", "--seconds", "0.001", "--name", "here", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "here.md").read_text()
    for name in ("ours, auto", *PEERS, "ideal (dense)", "Decoding", "Fine-grained", "Memory kept", "here.png"):
        assert name in page
    assert re.search(r"combining take \d+\.\d% of its training step with `lean`", page)
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_peer_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.subjects.sorted_loop", lambda *given: 1.01 * sorted_loop(*given))
    assert main(["--toy", "--seconds", "0.001", "--name", "here", "--out", str(tmp_path)]) == 1
    assert "sorted loop is off by" in capsys.readouterr().err and not (tmp_path / "here.md").exists()


def test_a_wrong_gradient_stops_the_run():
    layer = our_layer(TOY, LIKE, "auto")
    gate.check("itself", layer, layer)
    with pytest.raises(gate.GateError, match="twice"):
        gate.check("twice", layer, lambda x: layer(x) + (x - x.detach()))


def test_the_ideal_has_the_layers_multiply_adds():
    """Forward and training step of the plain layer, the router's own products aside."""
    layer = our_layer(TOY, LIKE, "auto")
    plain = PeerLayer(layer, peer_experts(layer, "sorted loop"))
    x = torch.randn(TOY.tokens, TOY.hidden, requires_grad=True)
    router = TOY.tokens * TOY.hidden * TOY.experts
    dense = ideal.Dense(TOY, LIKE, routed_only=False)
    for training, routing in ((False, router), (True, 3 * router)):

        def step(training: bool = training) -> None:
            with torch.set_grad_enabled(training):
                y = plain(x)
            if training:
                y.sum().backward()

        expected = sum(m * k * n for m, k, n in dense.products(TOY.tokens, training=training))
        assert ideal.multiply_adds(step) - routing == expected


def test_the_layer_keeps_about_half_of_what_autograd_keeps():
    ours, loop = saved_bytes(TOY.of(tokens=256), LIKE, "auto").values()
    assert ours < 0.52 * loop


@pytest.fixture
def routed():
    """A layer's experts, an input and its routing."""
    layer, x = our_layer(TOY, LIKE, "auto"), torch.randn(TOY.tokens, TOY.hidden)
    _, weights, index = layer.router(x)
    return layer.experts, x, index, weights.detach().requires_grad_()


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_dispatch_of_lean_sorts_gathers_and_combines_as_often_as_lean_does(routed):
    experts, x, index, weights = routed
    with Count() as alone:
        lean_dispatch(experts, x, index, weights)
    with Count() as whole:
        train(lambda given: run_backend("lean", experts, given, index, weights), x)
    for name in ("sort", "bincount", "index", "_embedding_bag_forward_only"):
        assert alone.calls[name] == whole.calls[name] > 0, name
    assert "mm" not in alone.calls and whole.calls["mm"] > 0


def test_dispatch_of_grouped_mm_is_all_but_its_products(routed):
    """Every row comes back to its token, times the sum of its weights."""
    experts, x, index, weights = routed
    with Count() as alone:
        y = grouped_mm_dispatch(experts, x, index, weights)
    torch.testing.assert_close(y, x * weights.sum(1, keepdim=True))
    assert not {"mm", "_grouped_mm", "silu"} & alone.calls.keys() and alone.calls["sort"] == 1
    assert experts._apply_gate(torch.ones(1, 2)).shape == (1, 1)  # the experts are as they were


def test_the_dispatch_share_is_that_of_the_backend_that_runs():
    backend, share = dispatch_share(TOY, LIKE, 0.001)
    assert backend == "lean" and 0 < share < 1
