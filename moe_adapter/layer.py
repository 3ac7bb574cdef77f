"""Equation (3): the dual-path layer that stands where the host's FFN stood."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_adapter.activations import activation_name
from moe_adapter.config import DualPathConfig, resolve_dim
from moe_adapter.dense import Maps, dense_ffn
from moe_adapter.experts import Experts, SharedExpert
from moe_adapter.ffn import FeedForward
from moe_adapter.lora import lora_parameters, plain_name
from moe_adapter.losses import RouterCall
from moe_adapter.precision import KeepsFloat32, wide
from moe_adapter.recognise import computes_ffn, plain_maps
from moe_adapter.router import Router
from moe_adapter.routing import RoutingLog


class DualPathMoE(KeepsFloat32):
    """Y = α·FFN(X) + (1 − α)·[λ·S(X) + Σ_{i ∈ top-k} g_i(X)·E_i(X)], equation (3).

    `static_expert` is the host's own FFN module, called as it always was, with all its arguments; where it is a plain
    FFN without hooks, one operator may stand in for the call (dense.py). A path that the config leaves out is None.
    `alpha_logit` and `lam_logit` have shape (1,) and stay float32. With mixing="token" (the authors' released code)
    `coefficient` (D → 2; 0 the MoE, 1 the FFN) and `shared_expert_gate` (D → 1) take the place of the two scalars.
    """

    def __init__(self, static_expert: nn.Module, ffn: FeedForward, config: DualPathConfig, *, device, dtype):
        super().__init__()
        self.static_expert = static_expert
        self.ffn = ffn
        self.config = config
        self.static_scale = 1.0 / config.alpha_init if config.preserve_base else 1.0
        self.static_only = False
        self.caught: torch.Tensor | None = None  # X of a split FFN, see CatchInput
        self.routing = RoutingLog()
        self.shared_expert = self.router = self.experts = None
        if config.shared_expert_dim:
            width = resolve_dim(config.shared_expert_dim, ffn.intermediate)
            self.shared_expert = SharedExpert(ffn, width, device=device, dtype=dtype)
        if config.num_experts:
            width = resolve_dim(config.expert_dim, ffn.intermediate)
            sizes = (ffn.hidden, config.num_experts, config.top_k)
            self.router = Router(*sizes, softmax=config.router_softmax, device=device, dtype=wide(dtype))
            self.experts = Experts(ffn, config.num_experts, width, backend=config.backend, device=device, dtype=dtype)
        self._add_mixing(device, dtype)
        self._activation = activation_name(ffn.activation)
        self._recognised = type(static_expert) if computes_ffn(static_expert, ffn) else None

    def _add_mixing(self, device, dtype) -> None:
        self.alpha_logit = self.lam_logit = self.coefficient = self.shared_expert_gate = None
        hidden, shared = self.ffn.hidden, self.shared_expert is not None
        if self.config.mixing == "token":
            self.coefficient = nn.Linear(hidden, 2, device=device, dtype=dtype)
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False, device=device, dtype=dtype) if shared else None
            return
        self.alpha_logit = nn.Parameter(torch.empty(1, device=device, dtype=wide(dtype)))
        self.lam_logit = nn.Parameter(torch.empty(1, device=device, dtype=wide(dtype))) if shared else None

    @property
    def alpha(self) -> torch.Tensor:
        """α = sigmoid(alpha_logit), shape (1,), in (0, 1): the static path's share."""
        return torch.sigmoid(self.precise("alpha_logit"))

    @property
    def lam(self) -> torch.Tensor:
        """λ = sigmoid(lam_logit), shape (1,), in (0, 1): the shared expert's weight."""
        return torch.sigmoid(self.precise("lam_logit"))

    @property
    def weight(self) -> torch.Tensor:
        """A split FFN's last map's own, for blocks that read it; of a class that torch's fused encoder refuses."""
        if not self.ffn.split:
            raise AttributeError("weight")
        weight = self.static_expert.weight
        return weight.as_subclass(_HostWeight) if type(weight) is nn.Parameter else weight  # pyright: ignore

    @property
    def bias(self) -> torch.Tensor | None:
        """A split FFN's last map's own."""
        if not self.ffn.split:
            raise AttributeError("bias")
        return self.static_expert.bias  # pyright: ignore

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """What the surgery added to the host, by name within the layer; a LoRA around parts of it is not among them."""
        lora = {id(parameter) for parameter in lora_parameters(self).values()}
        return {
            plain_name(name): parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("static_expert.") and id(parameter) not in lora
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Equation (3) on the FFN's first argument X (…, D); other arguments and outputs pass through."""
        caught, self.caught = self.caught, None
        if self.static_only:
            return self.static_expert(*args, **kwargs)
        x = caught if caught is not None else args[0] if args else next(iter(kwargs.values()))
        if x.is_nested:
            return self._nested(x, args[0])
        static_factor, moe_factor = self._factors(x)
        static, residual, rest = self._static(x, static_factor, args, kwargs)
        y = self._add_moe(static, x, moe_factor)
        if residual is not None:
            y = y + residual
        return y if rest is None else (y, *rest)

    def _nested(self, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Y of sequences without their padding, which torch's encoder makes of its input in evaluation: all as one."""
        lengths = [len(row) for row in x.unbind()]
        self.caught = torch.cat(x.unbind())
        y_TD = self(torch.cat(first.unbind()))
        return torch.nested.as_nested_tensor(list(y_TD.split(lengths)))

    def _factors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(α·static_scale, 1 − α) in float32, shape (1,), or (…, 1) from the released code's per-token coefficients."""
        dtype = wide(x.dtype)
        if self.coefficient is not None:
            share = self.coefficient(x).to(dtype).softmax(dim=-1)
            return share[..., 1:] * self.static_scale, share[..., :1]
        alpha = torch.sigmoid(self.precise("alpha_logit").to(dtype))
        return alpha * self.static_scale, 1 - alpha

    def _static(self, x, factor, args, kwargs) -> tuple[torch.Tensor, torch.Tensor | None, tuple | None]:
        """α·FFN(X), the residual that the FFN would add itself, and what it returns beside its output."""
        if (maps := self._static_maps()) and (y := self._fused(x, factor, maps)) is not None:
            return y, None, None
        residual = None
        if self.ffn.residual is not None:
            args, kwargs, residual = self._without_residual(args, kwargs)
        out = self.static_expert(*args, **kwargs)
        if isinstance(out, tuple):
            return _scaled(out[0], factor), residual, out[1:]
        return _scaled(out, factor), residual, None

    def _without_residual(self, args, kwargs):
        """An FFN that adds its residual is given zeros, so that α scales FFN(X) alone."""
        name = self.ffn.residual
        if name in kwargs:
            residual = kwargs[name]
            return args, {**kwargs, name: torch.zeros_like(residual)}, residual
        residual = args[1]
        return (args[0], torch.zeros_like(residual), *args[2:]), kwargs, residual

    def _add_moe(self, static: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """α·FFN(X) + (1 − α)·[λ·S(X) + Σ_i g_i(X)·E_i(X)], given the first term and the factor 1 − α."""
        y, inner = static, x.to(self._expert_dtype(x))
        if self.shared_expert is not None:
            y = y + self._shared(x, inner, factor).to(y.dtype)
        if self.experts is not None:
            y = y + self._routed(x, inner, factor).to(y.dtype)
        return y

    def _shared(self, x: torch.Tensor, inner: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """(1 − α)·λ·S(X), shape of X."""
        gate = self.precise("lam_logit") if self.shared_expert_gate is None else self.shared_expert_gate(x)
        factor = factor * torch.sigmoid(gate.to(factor.dtype))  # pyright: ignore
        maps = plain_maps(self.shared_expert, "gate_proj" if self.ffn.gated else None, "up_proj", "down_proj")  # pyright: ignore
        y = self._fused(inner, factor, maps) if maps else None
        return _scaled(self.shared_expert(inner), factor) if y is None else y  # pyright: ignore

    def _routed(self, x: torch.Tensor, inner: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Σ_i (1 − α)·g_i(X)·E_i(X), shape of X: the factor goes with the routing weights."""
        logits_TE, weights_TK, index_TK = self.router(x.reshape(-1, x.shape[-1]))  # pyright: ignore
        weights_TK = weights_TK * (factor.reshape(-1, 1) if factor.dim() > 1 else factor)
        y_TD = self.experts(inner.reshape(-1, x.shape[-1]), index_TK, weights_TK)  # pyright: ignore
        return self.routing.record(RouterCall(logits_TE, index_TK, None), y_TD, x.shape[:-1]).view(x.shape)

    def _static_maps(self) -> Maps | None:
        """The static expert's weights, where one operator may stand in for its call."""
        if type(self.static_expert) is not self._recognised:
            return None
        return plain_maps(self.static_expert, self.ffn.gate, self.ffn.up, self.ffn.down)

    def _fused(self, x: torch.Tensor, factor: torch.Tensor, maps: Maps) -> torch.Tensor | None:
        """factor·FFN(X) by one operator, or None where that doesn't take it; inductor on a GPU fuses by itself."""
        if self._activation is None or self.config.backend == "eager" or (x.is_cuda and torch.compiler.is_compiling()):
            return None
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, maps = x.to(dtype), maps.to(dtype)
        if torch.is_grad_enabled() and not any(t is not None and t.requires_grad for t in (x, *maps)):
            return None  # in the first block: from its output, the factor's gradient is a sum and no product
        if any(t is not None and (t.dtype != x.dtype or t.device != x.device) for t in maps):
            return None
        x_TD = x.reshape(-1, x.shape[-1])
        factor = factor.reshape(-1, 1) if factor.dim() > 1 else factor
        return dense_ffn(x_TD, factor, maps, self._activation).view(x.shape)

    def _expert_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Autocast casts by itself; otherwise X meets the experts in their dtype, as over a quantised base."""
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype
        first = self.experts.down_proj if self.experts is not None else self.shared_expert.down_proj.weight  # pyright: ignore
        return first.dtype

    def extra_repr(self) -> str:
        return f"static_scale={self.static_scale:g}, mixing={self.config.mixing!r}"


class _HostWeight(torch.Tensor):
    """A weight with torch functions of its own, as far as torch can tell: no fused kernel takes it past the layer."""


def _scaled(y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """factor·y, multiplied in the factor's float32, in the dtype of y."""
    return (y.to(factor.dtype) * factor).to(y.dtype)


class CatchInput:
    """Forward pre-hook of the first map of a split FFN: what it sees is the X of the layer at the last map."""

    def __init__(self, layer: DualPathMoE):
        self.layer = layer

    def __call__(self, first_map: nn.Module, args: tuple) -> None:
        self.layer.caught = args[0]
