"""An independent float64 computation of equations (3) to (9), written for clarity and nothing else.

Every expert sees every token and unchosen ones get weight zero; no sorting, no hooks, no checkpointing.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from moe_adapter import DualPathMoE


class ReferenceLayer(nn.Module):
    """Equation (3) over float64 copies of a dual-path layer's weights, which keep the layer's parameter names."""

    def __init__(self, layer: DualPathMoE):
        super().__init__()
        twin = copy.deepcopy(layer).double()
        self.static_expert, self.act = twin.static_expert, twin.ffn.activation
        self.top_k, self.over_all = layer.config.top_k, layer.config.router_softmax == "all"
        self.gated, self.scale = twin.ffn.gated, layer.static_scale
        self.names = list(twin.new_parameters())
        for name, parameter in twin.new_parameters().items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(parameter.detach().double()))
        self.logits: list[torch.Tensor] = []
        self.chosen: list[torch.Tensor] = []

    def __getitem__(self, name: str) -> torch.Tensor | None:
        return self._parameters.get(name.replace(".", "/"))

    def swiglu_or_mlp(self, x, first, first_bias, down, down_bias):
        h = F.linear(x, first, first_bias)
        h = self.act(h[..., : h.shape[-1] // 2]) * h[..., h.shape[-1] // 2 :] if self.gated else self.act(h)
        return F.linear(h, down, down_bias)

    def shared(self, x):
        parts = [f"shared_expert.{name}" for name in (("gate_proj", "up_proj") if self.gated else ("up_proj",))]
        first = torch.cat([self[f"{part}.weight"] for part in parts])
        biases = [self[f"{part}.bias"] for part in parts]
        bias = None if biases[0] is None else torch.cat(biases)
        return self.swiglu_or_mlp(
            x, first, bias, self["shared_expert.down_proj.weight"], self["shared_expert.down_proj.bias"]
        )

    def routed(self, x):
        logits = x @ self["router.weight"].T
        chosen = logits.topk(self.top_k, dim=-1).indices
        picked = torch.zeros_like(logits).scatter(-1, chosen, 1.0)
        weights = logits.softmax(-1) * picked
        if not self.over_all:  # equation (4)
            weights = weights / weights.sum(-1, keepdim=True)
        self.logits.append(logits)
        self.chosen.append(picked)
        name = "experts.gate_up_proj" if self.gated else "experts.up_proj"
        total = 0
        for e in range(logits.shape[-1]):
            biases = [None if self[n] is None else self[n][e] for n in (f"{name}_bias", "experts.down_proj_bias")]
            y = self.swiglu_or_mlp(x, self[name][e], biases[0], self["experts.down_proj"][e], biases[1])
            total = total + weights[..., e, None] * y
        return total

    def forward(self, x, *rest):
        moe = 0
        if self["shared_expert.down_proj.weight"] is not None:
            gate = self["shared_expert_gate.weight"]
            lam = torch.sigmoid(self["lam_logit"]) if gate is None else torch.sigmoid(x @ gate.T)
            moe = moe + lam * self.shared(x)
        if self["router.weight"] is not None:
            moe = moe + self.routed(x)
        static = self.static_expert(x, *(torch.zeros_like(r) for r in rest))
        if self["coefficient.weight"] is None:
            alpha = torch.sigmoid(self["alpha_logit"])
            y = alpha * self.scale * static + (1 - alpha) * moe
        else:
            c = F.linear(x, self["coefficient.weight"], self["coefficient.bias"]).softmax(-1)
            y = c[..., 1:] * self.scale * static + c[..., :1] * moe
        return y + sum(rest)


def reference_model(model: nn.Module) -> nn.Module:
    """A float64 copy of an injected model with every dual-path layer replaced by its reference."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DualPathMoE):
                setattr(module, name, ReferenceLayer(child))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return twin.double()


def reference_layers(twin: nn.Module) -> dict[str, ReferenceLayer]:
    return {name: module for name, module in twin.named_modules() if isinstance(module, ReferenceLayer)}


def reference_balance(twin: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """Equations (6) to (8), the mean over layers, over the tokens where `mask` (B, S) is set; clears the record."""
    losses = []
    for layer in reference_layers(twin).values():
        (logits,), (chosen,) = layer.logits, layer.chosen
        real, size = mask.double().reshape(-1, 1), max(int(mask.sum()), 1)
        f_e = (chosen.reshape(real.shape[0], -1) * real).sum(0).detach() / size
        g_e = (logits.softmax(-1).reshape(real.shape[0], -1) * real).sum(0) / size
        losses.append((f_e * g_e).sum())
        layer.logits, layer.chosen = [], []
    return torch.stack(losses).mean()


def reference_loss(twin: nn.Module, batch: dict[str, torch.Tensor], balance_coef: float, items: int | None = None):
    """Equation (9) by hand: mean (or sum over `items`) cross-entropy of equation (5), plus γ·L_bal."""
    logits = twin(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    target = batch["labels"][:, 1:].reshape(-1)
    log_p = logits[:, :-1].reshape(-1, logits.shape[-1]).log_softmax(-1)
    kept = target != -100
    total = -log_p[kept].gather(1, target[kept, None]).sum()
    share = 1.0 if items is None else int(kept.sum()) / items
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return total / (items or int(kept.sum())) + balance_coef * share * reference_balance(twin, mask)


def reference_gradients(twin: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the new parameters under their names in the injected model."""
    return {
        f"{prefix}.{name}": layer[name].grad for prefix, layer in reference_layers(twin).items() for name in layer.names
    }


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the new parameters of an injected model, by full name."""
    return {
        f"{prefix}.{name}": parameter.grad
        for prefix, layer in model.named_modules()
        if isinstance(layer, DualPathMoE)
        for name, parameter in layer.new_parameters().items()
    }


def assert_same_gradients(model: nn.Module, twin: nn.Module, tolerance: float = 2e-5) -> None:
    """Every gradient within `tolerance` of the reference, relative to the reference's norm."""
    expected, found = reference_gradients(twin), gradients(model)
    assert expected.keys() == found.keys()
    for name, reference in expected.items():
        assert found[name] is not None, f"{name} has no gradient"
        error = (found[name].double() - reference).norm() / reference.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def perturb(model: nn.Module, std: float = 0.2, seed: int = 7) -> nn.Module:
    """Fill all new parameters with noise, so that nothing is at its start value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, DualPathMoE)):
            for parameter in layer.new_parameters().values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
                parameter.copy_(noise)
    return model
