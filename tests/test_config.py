"""DualPathConfig: defaults, validation, JSON."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from moe_adapter import DualPathConfig, MoEAdapterError
from moe_adapter.config import resolve_dim

BAD = {
    "top_k above num_experts": (dict(top_k=5), "top_k: got 5, expected 1 to num_experts = 4"),
    "top_k zero": (dict(top_k=0), "top_k"),
    "negative experts": (dict(num_experts=-1), "num_experts"),
    "fractional experts": (dict(num_experts=2.5), "a whole number"),
    "no path at all": (dict(num_experts=0, shared_expert_dim=0), "both are switched off"),
    "zero width": (dict(expert_dim=0), "expert_dim"),
    "negative width": (dict(shared_expert_dim=-3), "shared_expert_dim"),
    "width as text": (dict(expert_dim="1408"), "expert_dim"),
    "width as a float": (dict(expert_dim=48 / 4), r"got 12.0, expected .* at most 8\); a width as int"),
    "width without end": (dict(shared_expert_dim=float("inf")), "shared_expert_dim"),
    "alpha at one": (dict(alpha_init=1.0), r"inside \(0, 1\)"),
    "lam below zero": (dict(lam_init=-0.1), r"inside \(0, 1\)"),
    "negative gamma": (dict(balance_coef=-1e-3), "balance_coef"),
    "endless gamma": (dict(balance_coef=float("inf")), "balance_coef: got inf, expected a finite"),
    "gamma as text": (dict(balance_coef="1e-3"), "balance_coef"),
    "unknown mixing": (dict(mixing="tokens"), "mixing: got 'tokens'"),
    "unknown softmax": (dict(router_softmax="top"), "router_softmax"),
    "unknown init": (dict(expert_init="zeros"), "expert_init"),
    "repeated layers": (dict(layers=(1, 1)), "distinct block indices"),
    "one layer's number": (dict(layers=3), r"layers: got 3, expected None or distinct block indices"),
    "layers as text": (dict(layers="12"), "layers"),
    "no layers": (dict(layers=()), "layers"),
    "zero std": (dict(init_std=0.0), "init_std"),
    "std as text": (dict(init_std="0.02"), "init_std: got '0.02', expected a positive number"),
    "endless std": (dict(init_std=float("inf")), "init_std"),
    "preserve_base as text": (dict(preserve_base="yes"), "preserve_base"),
}


def test_defaults_are_table_8():
    config = DualPathConfig()
    assert (config.num_experts, config.top_k, config.expert_dim, config.shared_expert_dim) == (4, 2, 1408, 5632)
    assert (config.alpha_init, config.lam_init, config.balance_coef, config.preserve_base) == (0.5, 0.5, 1e-3, True)


@pytest.mark.parametrize("bad", BAD)
def test_bad_values_name_the_field(bad):
    values, message = BAD[bad]
    with pytest.raises(MoEAdapterError, match=message):
        DualPathConfig(**values)


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DualPathConfig().top_k = 1
    with pytest.raises(TypeError):
        DualPathConfig(4)


@pytest.mark.parametrize("values", [{}, dict(layers=[0, 2], expert_dim=0.25, mixing="token", init_std=0.01)], ids=str)
def test_json_round_trip(values):
    config = DualPathConfig(**values)
    assert DualPathConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("text", "message"), [('{"topk": 2}', "no field topk"), ("[1]", "object"), ("{", "no JSON")])
def test_bad_json(text, message):
    with pytest.raises(MoEAdapterError, match=message):
        DualPathConfig.from_json(text)


def test_top_1_over_selected_warns_that_the_router_cannot_learn():
    with pytest.warns(UserWarning, match="router no gradient"):
        DualPathConfig(top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DualPathConfig(top_k=1, router_softmax="all")


def test_top_1_is_warned_of_once_however_often_the_config_is_changed():
    with pytest.warns(UserWarning, match="router no gradient") as caught:
        DualPathConfig(top_k=1).replace(expert_dim=8).replace(alpha_init=0.3)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="router no gradient"):
        DualPathConfig().replace(top_k=1)


@pytest.mark.parametrize(("dim", "width"), [(1408, 1408), (0.25, 4736), (1.0, 18944), (1, 1)])
def test_widths_as_numbers_or_shares(dim, width):
    assert resolve_dim(dim, 18944) == width
