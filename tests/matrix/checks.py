"""The checks of one architecture: the injected model must be the base at first, learn, and give the base back."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass

import torch
from torch import nn

from moe_adapter import (
    DualPathConfig,
    MoEAdapterError,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    plan_injection,
    save_adapter,
    static_only,
)
from tests.matrix.build import CannotBuild, Toy, build
from tests.matrix.structure import TOWERS, NotDense, expected_sites

CONFIG = DualPathConfig(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
WHOLE = dict(expert_dim=1.0, expert_init="ffn_slice", preserve_base=False, alpha_init=0.01)
ROUTED = DualPathConfig(num_experts=2, top_k=2, shared_expert_dim=0, **WHOLE)
SHARED = DualPathConfig(num_experts=0, shared_expert_dim=1.0, **WHOLE)
# Feed-forward blocks with more between their maps than an activation, by model type: what experts have not.
NOT_MIRRORED = {
    "bitnet": "the norm before its last map",
    "dory": "the scales of gate and up and the norm before its last map",
    "gemma3n": "the gate's sparsity (only its largest units pass)",
    "gemma3n_text": "the gate's sparsity (only its largest units pass)",
    "kosmos-2": "the norm before its last map",
    "kosmos-2.5": "the norm before its last map",
    "zamba2": "the low-rank adapters beside its first map, one for each block that shares it",
}
NOTES = {
    "reformer": "its reversible layers train nothing unless their input has a gradient: with "
    "`model.enable_input_require_grads()` all checks hold",
    "rwkv": "set `rescale_every=0`: in evaluation the model halves its own maps every few blocks, not the experts",
}
MIRROR_TOLERANCE, HEARD = 2e-5, 1e-4  # shares of the median logit


class Failed(Exception):
    """A check doesn't hold; the message says in short what does instead."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the matrix says of one model type. `status`: passed, failed, not dense, or not built.

    `reason` is why it did not pass; of one that passed, what its experts do not mirror or what else to know.
    """

    model_type: str
    status: str
    reason: str = ""
    model: str = ""
    ffn: str = ""  # class of the replaced module
    site: str = ""  # its name, block numbers as {i}
    sites: int = 0


def examine(model_type: str) -> Outcome:
    """Build the architecture, decide whether it is dense, and if it is run every check on it."""
    try:
        toy = build(model_type)
    except CannotBuild as error:
        return Outcome(model_type=model_type, status="not built", reason=str(error))
    name = type(toy.model).__name__
    try:
        expected = expected_sites(toy.model)
    except NotDense as error:
        reason = str(error) + _not_refused(toy)
        return Outcome(model_type=model_type, status="not dense", reason=reason, model=name)
    found, note = dict(model_type=model_type, model=name, sites=expected), NOTES.get(model_type, "")
    try:
        found |= check_plan(toy, expected)
        check_life(toy)
        check_training(toy)
        check_round_trip(toy, model_type)
        reason = check_mirrors(toy, NOT_MIRRORED.get(model_type)) or note
    except Failed as error:
        return Outcome(status="failed", reason=str(error), **found)
    except Exception as error:  # of the library or of the model under it: a failure with its reason
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return Outcome(status="failed", reason="; ".join(filter(None, (reason, note))), **found)
    return Outcome(status="passed", reason=reason, **found)


def check_plan(toy: Toy, expected: int) -> dict[str, str]:
    """One layer for each decoder block that has an FFN, none in another tower; what and where they are."""
    rows = plan_injection(toy.model, config=CONFIG).rows
    _expect(len(rows) == expected, f"the plan has {len(rows)} layers, the decoder {expected} blocks with an FFN")
    outside = [row.name for row in rows if any(tower in row.name.lower() for tower in TOWERS)]
    _expect(not outside, f"{outside[:1]} lies outside the language model")
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".{i}", row.name): row.module for row in rows}
    return dict(ffn=", ".join(dict.fromkeys(patterns.values())), site=", ".join(patterns))


@torch.no_grad()
def check_life(toy: Toy) -> None:
    """Identity at step 0, other answers once the experts speak, the base under static_only, and back by eject."""
    model = toy.model
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    modules = {key: id(module) for key, module in model.named_modules()}
    hooks = _hooks(model)
    base = toy.logits()
    inject_dual_path_moe(model, config=CONFIG)
    _expect(torch.equal(toy.logits(), base), "step 0 is not the base, bit for bit")
    wake(model)
    _expect(_distance(toy.logits(), base) > HEARD, "perturbed experts don't change the logits")
    with static_only(model):
        _expect(torch.equal(toy.logits(), base), "static_only is not the base, bit for bit")
    eject_dual_path_moe(model)
    _expect(torch.equal(toy.logits(), base), "after eject: not the base, bit for bit")
    _expect({k: id(m) for k, m in model.named_modules()} == modules, "after eject: other module objects")
    _expect({k: p.requires_grad for k, p in model.named_parameters()} == flags, "after eject: other flags")
    _expect(_hooks(model) == hooks, "after eject: hooks are left")


def check_training(toy: Toy) -> None:
    """New parameters train, all of them, and nothing else."""
    model = inject_dual_path_moe(toy.model, config=CONFIG).train()
    wake(model)
    toy.logits().square().mean().backward()
    new = {id(p) for layer in dual_path_layers(model).values() for p in layer.new_parameters().values()}
    for key, parameter in model.named_parameters():
        _expect(parameter.requires_grad == (id(parameter) in new), f"{key}: requires_grad={parameter.requires_grad}")
        if id(parameter) in new:
            _expect(parameter.grad is not None and bool(parameter.grad.abs().max() > 0), f"{key} has no gradient")
    model.zero_grad(set_to_none=True)
    eject_dual_path_moe(model).eval()


@torch.no_grad()
def check_round_trip(toy: Toy, model_type: str) -> None:
    """An adapter file makes a fresh base answer as the saved model did."""
    inject_dual_path_moe(toy.model, config=CONFIG)
    wake(toy.model)
    fresh = build(model_type)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(toy.model, folder)
        load_adapter(fresh.model, folder)
    _expect(torch.equal(fresh.logits(), toy.logits()), "a loaded adapter answers otherwise than the saved one")
    eject_dual_path_moe(toy.model)


def check_mirrors(toy: Toy, lacking: str | None) -> str:
    """Routed and shared experts mirror the feed-forward block, but where it is known what they lack: that is said."""
    try:
        for config in (ROUTED, SHARED):
            check_mirror(toy, config)
    except Failed:
        if lacking is None:
            raise
        return f"experts do not mirror {lacking}"
    _expect(lacking is None, f"experts mirror {lacking}: NOT_MIRRORED is out of date")
    return ""


@torch.no_grad()
def check_mirror(toy: Toy, config: DualPathConfig) -> None:
    """Experts that are the whole FFN each, and the static expert next to silent, compute what the base computes."""
    base = toy.logits()
    inject_dual_path_moe(toy.model, config=config)
    for layer in dual_path_layers(toy.model).values():
        if layer.lam_logit is not None:
            layer.lam_logit.fill_(50.0)  # λ = 1
    error = _distance(toy.logits(), base)
    eject_dual_path_moe(toy.model)
    path = "routed" if config.num_experts else "shared"
    _expect(error < MIRROR_TOLERANCE, f"{path} experts made of the FFN differ from it: {error:.0e} of a logit")


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Give the zero output projections values, so that the MoE path is heard."""
    torch.manual_seed(1)
    for layer in dual_path_layers(model).values():
        layer.experts.down_proj.normal_(0, 0.2)
        layer.shared_expert.down_proj.weight.normal_(0, 0.2)


def _distance(logits: torch.Tensor, base: torch.Tensor) -> float:
    """The largest difference, as a share of the base's median logit (some models mask logits with huge numbers)."""
    return float((logits - base).abs().max() / base.abs().median())


def _not_refused(toy: Toy) -> str:
    """What is wrong where target="mlp" does not say that a model has nothing that it means."""
    try:
        rows = plan_injection(toy.model, config=CONFIG).rows
    except MoEAdapterError as error:
        said = "mixture of" in str(error) or "no feed-forward block" in str(error)
        return "" if said else f"; but the error is: {error}"
    return f"; but the plan has {len(rows)} layers"


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _expect(holds: bool | torch.Tensor, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)
