"""Dual-path mixture-of-experts layers in any transformers model; needs torch and transformers only.

moe-adapter writes this file beside the weights that it exports. Each FFN listed in `config.dual_path` has become

    Y = α·FFN(X) + (1 − α)·[λ·S(X) + Σ_{i ∈ top-k} g_i(X)·E_i(X)]

(EchoVLM, arXiv 2509.14977, equation 3): FFN is the original block, S the shared expert, E_i the routed experts.

The model and config classes are made when they are asked for: `DualPath` and the name of a transformers class.
`DualPathQwen2VLForConditionalGeneration` is Qwen2VLForConditionalGeneration with these layers in it; generation,
caches, training and saving are the base class's own. The load-balance loss is moe-adapter's and not in this file.

Letters in names: T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

MODEL_TYPE = "dual_path_moe"
PREFIX = "DualPath"
HOST = "host."  # starts the name of an activation that the host's FFN holds
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Site:
    """FFNs of one shape, D → F → D, that are dual-path layers.

    Args:
        layers: their names in the class that was exported.
        hidden, expert_dim, shared_expert_dim: widths; 0 for a path that is absent.
        gated, bias: whether the experts, like the host's FFN, have a gate, and biases.
        activation: a name, or "host." and where the host's FFN holds it.
        residual: the argument, if any, that the FFN adds to its output itself.
        split: None, or the names in a block of the first and the last map of an FFN that is no module of its own;
            `layers` then names the last maps, and X is what the first map sees.
        sorts: whether backend "auto" takes the experts one after another, slots sorted, on a CPU.
    """

    layers: list[str]
    hidden: int
    expert_dim: int
    shared_expert_dim: int
    gated: bool
    bias: bool
    activation: str
    residual: str | None
    split: list[str] | None
    sorts: bool


class KeepsFloat32(nn.Module):
    """A module whose own parameters are never cast below float32: routing flips in bfloat16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_wide(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if tensor.dtype in WIDE and out.dtype not in WIDE else out

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide, recurse=False)


class Router(KeepsFloat32):
    """Equation (4): softmax over the selected logits, or over all of them, in float32."""

    def __init__(self, hidden: int, method: dict):
        super().__init__()
        self.top_k, self.over_all = method["top_k"], method["router_softmax"] == "all"
        self.weight = nn.Parameter(torch.zeros(method["num_experts"], hidden, dtype=wide(torch.get_default_dtype())))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = wide(x_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
            if self.over_all:
                weights_TK, index_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
            else:
                top_TK, index_TK = logits_TE.topk(self.top_k, dim=-1)
                weights_TK = top_TK.softmax(dim=-1)
        return logits_TE, weights_TK, index_TK


class Experts(nn.Module):
    """The routed experts as stacked weights, in the layout and with the signature of transformers' experts."""

    is_transposed = has_post_expert_norm = _is_expert_parallel = False  # read by transformers' functions

    def __init__(self, site: Site, method: dict, act_fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.num_experts, self.backend = method["num_experts"], method["backend"]
        self.has_gate, self.has_bias, self.sorts, self.act_fn = site.gated, site.bias, site.sorts, act_fn
        self.first = "gate_up_proj" if site.gated else "up_proj"
        rows = site.expert_dim * (2 if site.gated else 1)
        shapes = {self.first: (rows, site.hidden), "down_proj": (site.hidden, site.expert_dim)}
        if site.bias:
            shapes |= {f"{self.first}_bias": (rows,), "down_proj_bias": (site.hidden,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(self.num_experts, *shape)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        compute = self._one_by_one
        if len(hidden_states) and self.backend == "batched_mm":
            compute = partial(batched_mm_experts_forward, self)
        elif self.backend == "lean" or (self.backend == "auto" and self.sorts and not hidden_states.is_cuda):
            compute = self._sorted
        elif len(hidden_states) and self.backend != "eager" and self._fit_grouped_mm():
            compute = partial(grouped_mm_experts_forward, self)
        return compute(hidden_states, top_k_index, top_k_weights)

    def _fit_grouped_mm(self) -> bool:
        """grouped_mm has no float64 kernel and wants rows of a multiple of 16 bytes."""
        first, down = getattr(self, self.first), self.down_proj
        widths = (*first.shape[1:], down.shape[2])
        return first.dtype != torch.float64 and all(width * first.element_size() % 16 == 0 for width in widths)

    def _sorted(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Slots in the order of their experts; the routing weight is folded in before the down projection."""
        first, first_bias, parts = getattr(self, self.first), getattr(self, f"{self.first}_bias", None), []
        flat = index_TK.reshape(-1)
        order = flat.argsort(stable=True)
        for expert, slot in enumerate(order.split(torch.bincount(flat, minlength=self.num_experts).tolist())):
            h = x_TD[slot // index_TK.shape[1]] @ first[expert].T
            h = h + first_bias[expert] if self.has_bias else h
            h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
            weight = weights_TK.reshape(-1, 1)[slot].to(h.dtype)
            h = (h * weight) @ self.down_proj[expert].T
            parts.append(h + weight * self.down_proj_bias[expert] if self.has_bias else h)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return F.embedding_bag(place.view_as(index_TK), torch.cat(parts), mode="sum")

    def _one_by_one(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD = torch.zeros(x_TD.shape, device=x_TD.device, dtype=torch.promote_types(x_TD.dtype, weights_TK.dtype))
        first, first_bias = getattr(self, self.first), getattr(self, f"{self.first}_bias", None)
        for expert in range(self.num_experts):
            token, slot = torch.where(index_TK == expert)
            h = F.linear(x_TD[token], first[expert], first_bias[expert] if self.has_bias else None)
            h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
            h = F.linear(h, self.down_proj[expert], self.down_proj_bias[expert] if self.has_bias else None)
            out_TD = out_TD.index_add(0, token, (h * weights_TK[token, slot, None]).to(out_TD.dtype))
        return out_TD.to(x_TD.dtype)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class SharedExpert(nn.Module):
    """S(X): the expert that sees every token."""

    def __init__(self, site: Site, act_fn: Callable[[Tensor], Tensor]):
        super().__init__()
        width = site.shared_expert_dim
        self.gate_proj = nn.Linear(site.hidden, width, bias=site.bias) if site.gated else None
        self.up_proj = nn.Linear(site.hidden, width, bias=site.bias)
        self.down_proj = nn.Linear(width, site.hidden, bias=site.bias)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DualPathMoE(KeepsFloat32):
    """Equation (3), around `static_expert`, the host's own FFN, which is called as it always was.

    With method["mixing"] == "token", `coefficient` (D → 2; 0 the MoE, 1 the FFN) and `shared_expert_gate` (D → 1)
    take the place of the two scalars α and λ.
    """

    def __init__(self, static_expert: nn.Module, act_fn: Callable[[Tensor], Tensor], site: Site, method: dict):
        super().__init__()
        self.static_expert, self.residual = static_expert, site.residual
        self.static_scale = 1.0 / method["alpha_init"] if method["preserve_base"] else 1.0
        self.caught = None  # X of a split FFN
        self.shared_expert = self.router = self.experts = None
        if site.shared_expert_dim:
            self.shared_expert = SharedExpert(site, copy.deepcopy(act_fn))
        if site.expert_dim:
            self.router = Router(site.hidden, method)
            self.experts = Experts(site, method, copy.deepcopy(act_fn))
        self.alpha_logit = self.lam_logit = self.coefficient = self.shared_expert_gate = None
        if method["mixing"] == "token":
            self.coefficient = nn.Linear(site.hidden, 2)
            self.shared_expert_gate = nn.Linear(site.hidden, 1, bias=False) if site.shared_expert_dim else None
        else:
            logit = torch.zeros(1, dtype=wide(torch.get_default_dtype()))
            self.alpha_logit = nn.Parameter(logit)
            self.lam_logit = nn.Parameter(logit.clone()) if site.shared_expert_dim else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        caught, self.caught = self.caught, None
        x = caught if caught is not None else args[0] if args else next(iter(kwargs.values()))
        residual = None
        if self.residual in kwargs:  # zeros in its place, so that α scales FFN(X) alone
            residual = kwargs[self.residual]
            kwargs = {**kwargs, self.residual: torch.zeros_like(residual)}
        elif self.residual:
            residual = args[1]
            args = (x, torch.zeros_like(residual), *args[2:])
        out = self.static_expert(*args, **kwargs)
        static, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        y = self._add_moe(static, x)
        y = y if residual is None else y + residual
        return y if rest is None else (y, *rest)

    def _add_moe(self, static: Tensor, x: Tensor) -> Tensor:
        static_factor, moe_factor = self._factors(x)
        y, inner = self._scaled(static, static_factor), x.to(self._expert_dtype(x))
        if self.shared_expert is not None:
            gate = self.lam_logit if self.shared_expert_gate is None else self.shared_expert_gate(x)
            factor = moe_factor * torch.sigmoid(gate.to(moe_factor.dtype))
            y = y + self._scaled(self.shared_expert(inner), factor).to(y.dtype)
        if self.experts is not None:
            _, weights_TK, index_TK = self.router(x.reshape(-1, x.shape[-1]))
            weights_TK = weights_TK * (moe_factor.reshape(-1, 1) if moe_factor.dim() > 1 else moe_factor)
            y = y + self.experts(inner.reshape(-1, x.shape[-1]), index_TK, weights_TK).view(x.shape).to(y.dtype)
        return y

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """α, which holds the static path's scale, and 1 − α."""
        dtype = wide(x.dtype)
        if self.coefficient is not None:
            share = self.coefficient(x).to(dtype).softmax(dim=-1)
            return share[..., 1:] * self.static_scale, share[..., :1]
        alpha = torch.sigmoid(self.alpha_logit.to(dtype))
        return alpha * self.static_scale, 1 - alpha

    def _scaled(self, y: Tensor, factor: Tensor) -> Tensor:
        return (y.to(factor.dtype) * factor).to(y.dtype)

    def _expert_dtype(self, x: Tensor) -> torch.dtype:
        """Autocast casts by itself; otherwise X meets the experts in their dtype, as over a quantised base."""
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype
        return (self.shared_expert.down_proj.weight if self.experts is None else self.experts.down_proj).dtype


class ModelMixin:
    """What a model class of this module adds to its base class: the layers, put in before any weight is loaded."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.add_dual_path_layers(config.dual_path)
        layers = [name for name, module in self.named_modules() if hasattr(module, "static_expert")]
        wide_parts = [f"{name}.{part}" for name in layers for part in ("router", "alpha_logit", "lam_logit")]
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *wide_parts}
        tied = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {static_name(name, layers): static_name(other, layers) for name, other in tied}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not to transformers' loading, so that the base's initialisation runs: it fills buffers that no file holds."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> Any:
        """As the base class does, under the names that the modules have: these layers had no other format before."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def add_dual_path_layers(self, dual_path: dict) -> None:
        for site in (Site(**fields) for fields in dual_path["sites"]):
            for name in names_in(self, site.layers, dual_path):
                root = self.get_submodule(name.removesuffix("." + site.split[1]) if site.split else name)
                old = self.get_submodule(name)
                new = DualPathMoE(old, find_activation(site.activation, root), site, dual_path["method"])
                put_in_place(self, old, new)
                if site.split:
                    root.get_submodule(site.split[0]).register_forward_pre_hook(CatchInput(new))


class ConfigMixin:
    """What a config class of this module adds to its base class."""

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        make_known(self)


class CatchInput:
    """Forward pre-hook of the first map of a split FFN: what it sees is the X of the layer at the last map."""

    def __init__(self, layer: DualPathMoE):
        self.layer = layer

    def __call__(self, first_map: nn.Module, args: tuple) -> None:
        self.layer.caught = args[0]


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def names_in(model: nn.Module, layers: list[str], dual_path: dict) -> list[str]:
    """The layers' names in `model`, whose class may be the one that was exported, or that one's headless model."""
    same = type(model).__name__ == PREFIX + dual_path["architecture"]
    return layers if same else [name.removeprefix(dual_path["prefix"] + ".") for name in layers]


def static_name(parameter: str, layers: list[str]) -> str:
    """The name that a parameter of the base has where an FFN that holds it has become a static expert."""
    for layer in layers:
        if parameter.startswith(layer + "."):
            return f"{layer}.static_expert.{parameter.removeprefix(layer + '.')}"
    return parameter


def find_activation(name: str, root: nn.Module) -> Callable[[Tensor], Tensor]:
    if name.startswith(HOST):
        return attrgetter(name.removeprefix(HOST))(root)
    return ACT2FN[name] if name in ACT2FN else getattr(F, name)


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever a part of `model` holds `old`, which blocks may share."""
    for parent in [module for module in model.modules() if module is not old]:
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def make_known(config: PreTrainedConfig) -> None:
    """Enter the model classes of `config.auto_map` where transformers' server and pipelines look for names.

    As attributes of transformers, which imports itself a second time, so that they go where both copies find them; and
    in the tables by which a server tells language from vision-language models.
    """
    for auto, path in getattr(config, "auto_map", {}).items():
        name = path.rpartition(".")[2]
        if auto != "AutoConfig":
            setattr(type(transformers), name, getattr(sys.modules[type(config).__module__], name))
            getattr(transformers, auto)._model_mapping._model_mapping.setdefault(name, name)


def align(model: nn.Module) -> None:
    """Weights mapped from a file may lie anywhere in memory; on a CPU the last bit of a product depends on where."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


@cache
def make_class(name: str, mixin: type, module: str) -> type:
    """The class `name` of `module`: the transformers class that `name` ends with, under `mixin`."""
    base = getattr(transformers, name.removeprefix(PREFIX))
    if issubclass(base, PreTrainedConfig):
        return type(name, (ConfigMixin, base), {"__module__": module})
    config_class = getattr(sys.modules[module], PREFIX + base.config_class.__name__)
    return type(name, (mixin, base), {"__module__": module, "config_class": config_class})


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and hasattr(transformers, name.removeprefix(PREFIX)):
        return make_class(name, ModelMixin, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
