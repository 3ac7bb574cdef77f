"""The benchmark script at toy size: it runs to the end, and prints no table over a wrong result."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gate, ideal
from benchmarks.__main__ import main
from benchmarks.measure import saved_bytes
from benchmarks.shapes import TOY
from benchmarks.subjects import PEERS, PeerLayer, our_layer, peer_experts, sorted_loop

LIKE = torch.empty(0)


def test_it_writes_a_page_and_a_figure(tmp_path):
    assert main(["--toy", "--seconds", "0.001", "--name", "here", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "here.md").read_text()
    for name in ("ours, auto", *PEERS, "ideal (dense)", "Decoding", "Fine-grained", "Memory kept", "here.png"):
        assert name in page
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
