"""`DualPathConfig`: one frozen description of the surgery, which is also what an adapter file stores."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moe_adapter.errors import MoEAdapterError

ExpertInit = Literal["normal", "ffn_slice"]
Mixing = Literal["scalar", "token"]
RouterSoftmax = Literal["selected", "all"]
BalanceScope = Literal["micro", "global"]

LARGEST_SHARE = 8  # of the host's FFN; a larger float is meant as a width, such as the 12.0 of intermediate_size / 4

_CHOICES = {
    "expert_init": ExpertInit,
    "mixing": Mixing,
    "router_softmax": RouterSoftmax,
    "balance_scope": BalanceScope,
}


@dataclass(frozen=True, kw_only=True)
class DualPathConfig:
    """Sizes, initial values and method of the dual-path layers; the defaults are the paper's Table 8.

    Args:
        num_experts: E, routed experts a layer; 0 leaves the routed path out.
        top_k: K, experts a token is routed to.
        expert_dim: F, hidden width of a routed expert: a number (int), or a share of the host FFN's width (float).
        shared_expert_dim: the same for the shared expert; 0 leaves it out.
        layers: indices of the matched blocks to inject, None for all.
        expert_init: "normal", or "ffn_slice": experts start as slices of the host's FFN.
        alpha_init, lam_init: start values of α and λ in equation (3), each inside (0, 1).
        preserve_base: start as the base model exactly: output projections at zero, static path scaled by 1/α₀.
        balance_coef: γ of equation (9).
        balance_scope: F of equation (6) over one "micro"-batch, as in the paper, or "global": over all data-parallel
            ranks and the micro-batches of the step so far.
        mixing: "scalar" for the paper's α and λ, "token" for the released code's per-token coefficients.
        router_softmax: equation (4) over the "selected" logits, or the released code's over "all".
        backend: name of the routed experts' implementation, see `moe_adapter.backends`.
        init_std: standard deviation of new weights; None takes the model's initializer_range, else 0.02.

    Raises:
        MoEAdapterError: a value out of range, or values that contradict one another.
    """

    num_experts: int = 4
    top_k: int = 2
    expert_dim: int | float = 1408
    shared_expert_dim: int | float = 5632
    layers: tuple[int, ...] | None = None
    expert_init: ExpertInit = "normal"
    alpha_init: float = 0.5
    lam_init: float = 0.5
    preserve_base: bool = True
    balance_coef: float = 1e-3
    balance_scope: BalanceScope = "micro"
    mixing: Mixing = "scalar"
    router_softmax: RouterSoftmax = "selected"
    backend: str = "auto"
    init_std: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, Iterable):
            object.__setattr__(self, "layers", tuple(self.layers))
        for name, choices in _CHOICES.items():
            _check(
                getattr(self, name) in get_args(choices),
                name,
                getattr(self, name),
                f"one of {get_args(choices)}",
            )
        for name in ("num_experts", "top_k"):
            _check(_is_int(getattr(self, name)), name, getattr(self, name), "a whole number")
        for name in ("expert_dim", "shared_expert_dim"):
            _check(
                _is_dim(getattr(self, name)),
                name,
                getattr(self, name),
                f"a width (int) or a share of the FFN's (float, at most {LARGEST_SHARE}); a width as int(…)",
            )
        for name in ("alpha_init", "lam_init"):
            value = getattr(self, name)
            _check(isinstance(value, float) and 0 < value < 1, name, value, "a number inside (0, 1)")
        _check(
            _is_number(self.balance_coef) and 0 <= self.balance_coef < float("inf"),
            "balance_coef",
            self.balance_coef,
            "a finite γ ≥ 0",
        )
        std = self.init_std
        _check(
            std is None or (_is_number(std) and 0 < std < float("inf")), "init_std", std, "a positive number or None"
        )
        _check(isinstance(self.preserve_base, bool), "preserve_base", self.preserve_base, "True or False")
        _check(isinstance(self.backend, str), "backend", self.backend, "the name of a backend, such as 'auto'")
        self._check_layers()
        self._check_paths()

    def _check_layers(self) -> None:
        layers = self.layers
        if layers is not None:
            whole = isinstance(layers, tuple) and all(map(_is_int, layers)) and len(set(layers)) == len(layers) > 0
            _check(whole, "layers", layers, "None or distinct block indices such as (0, 2, 4)")

    def _check_paths(self) -> None:
        _check(self.num_experts >= 0, "num_experts", self.num_experts, "0 (no routed path) or more")
        if self.num_experts == 0:
            _check(
                self.shared_expert_dim != 0,
                "num_experts",
                0,
                "a routed or a shared path; both are switched off",
            )
            return
        _check(1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"1 to num_experts = {self.num_experts}")
        _check(
            self.expert_dim != 0,
            "expert_dim",
            self.expert_dim,
            "a width; num_experts=0 leaves the routed path out",
        )
        if self._router_gets_no_gradient():
            warnings.warn(
                "top_k=1 with router_softmax='selected': the one routing weight is always 1, so the task's loss "
                "gives the router no gradient; use router_softmax='all' or top_k ≥ 2.",
                stacklevel=4,
            )

    def _router_gets_no_gradient(self) -> bool:
        return self.num_experts > 0 and self.top_k == 1 and self.router_softmax == "selected"

    def replace(self, **overrides: Any) -> DualPathConfig:
        """A copy with some fields changed; what this one has warned of is not said again.

        Raises:
            MoEAdapterError: an unknown field, or a bad value.
        """
        with warnings.catch_warnings():
            if self._router_gets_no_gradient():
                warnings.simplefilter("ignore")
            return DualPathConfig.from_dict({**self.to_dict(), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DualPathConfig:
        """The config of `values`. Raises MoEAdapterError for an unknown field or a bad value."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise MoEAdapterError(
                f"DualPathConfig has no field {', '.join(unknown)}; its fields are {', '.join(known)}."
            )
        return cls(**values)

    def to_json(self) -> str:
        """The config as JSON; `from_json` gives an equal one back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> DualPathConfig:
        """The config of `text`. Raises MoEAdapterError for text that is no JSON object of known fields."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise MoEAdapterError(
                f"this is no JSON: {error}; expected the output of DualPathConfig.to_json()."
            ) from error
        _check(isinstance(values, dict), "JSON", type(values).__name__, "an object of DualPathConfig's fields")
        return cls.from_dict(values)


def resolve_dim(dim: int | float, ffn_dim: int) -> int:
    """Width in units: `dim` itself, or its share of the host's FFN when it is a float."""
    return dim if isinstance(dim, int) else max(1, round(dim * ffn_dim))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_dim(value: Any) -> bool:
    return _is_number(value) and value >= 0 and (_is_int(value) or value <= LARGEST_SHARE)


def _check(holds: bool, name: str, got: Any, expected: str) -> None:
    if not holds:
        raise MoEAdapterError(f"DualPathConfig.{name}: got {got!r}, expected {expected}.")
