"""The weights of a dual-path layer's three paths, as training left them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.tables import cell_table


@dataclass(frozen=True, kw_only=True)
class PathWeights:
    """α and λ of each layer, (L,), NaN where a layer has none."""

    names: tuple[str, ...]
    alpha_L: np.ndarray
    lam_L: np.ndarray

    @property
    def shared_L(self) -> np.ndarray:
        """(1 − α)·λ, the factor of the shared expert."""
        return (1 - self.alpha_L) * self.lam_L

    @property
    def routed_L(self) -> np.ndarray:
        """1 − α, the factor of the routed experts' sum."""
        return 1 - self.alpha_L

    def to_table(self) -> pa.Table:
        """layer, name, alpha, lam, shared, routed; null where there is none."""
        cells = list(enumerate(self.names))
        columns = dict(alpha=self.alpha_L, lam=self.lam_L, shared=self.shared_L, routed=self.routed_L)
        return cell_table(("layer", "name"), cells, **columns)


def path_weights(record: RoutingRecord) -> PathWeights:
    """α and λ of equation (3), layer by layer, when the record was closed.

    Under preserve_base α is further multiplied by the constant static_scale, which the record doesn't hold.
    """
    layers = record.facts.layers
    alpha, lam = (np.array([getattr(layer, name) for layer in layers], float) for name in ("alpha", "lam"))
    return PathWeights(names=tuple(layer.name for layer in layers), alpha_L=alpha, lam_L=lam)
