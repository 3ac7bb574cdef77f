"""Which experts a token chooses together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.statistics import num_experts
from moe_adapter.analysis.tables import cell_table
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True, kw_only=True)
class CoActivation:
    """`pairs_LEE` counts the tokens that chose both experts, over all pairs of a token's top-k; L layers, E experts.

    Symmetric, its diagonal the tokens of each expert alone; `tokens_L` is all tokens of the layer.
    """

    layers: tuple[int, ...]
    tokens_L: np.ndarray
    pairs_LEE: np.ndarray

    @property
    def conditional_LEE(self) -> np.ndarray:
        """p(j | i) = N_ij / N_i in row i: OLMoE's co-activation, arXiv 2409.02060, section 5.2; NaN without tokens."""
        return _divide(self.pairs_LEE, self._alone[:, :, None])

    @property
    def jaccard_LEE(self) -> np.ndarray:
        """N_ij / (N_i + N_j − N_ij): tokens of both over tokens of either."""
        alone_LE = self._alone
        return _divide(self.pairs_LEE, alone_LE[:, :, None] + alone_LE[:, None, :] - self.pairs_LEE)

    @property
    def lift_LEE(self) -> np.ndarray:
        """N_ij·N / (N_i·N_j), whose logarithm is pointwise mutual information.

        A token's experts differ, so k of E drawn at random give (k − 1)·E / (k·(E − 1)) and not 1.
        """
        alone_LE = self._alone.astype(float)
        return _divide(self.pairs_LEE * self.tokens_L[:, None, None], alone_LE[:, :, None] * alone_LE[:, None, :])

    @property
    def _alone(self) -> np.ndarray:
        return np.diagonal(self.pairs_LEE, axis1=1, axis2=2)

    def to_table(self) -> pa.Table:
        """layer, expert, other, count, conditional (of other given expert), jaccard, lift; both orders of a pair."""
        pairs = list(itertools.permutations(range(self.pairs_LEE.shape[1]), 2))
        cells = [(layer, *pair) for layer in self.layers for pair in pairs]
        i, j = np.array(pairs).reshape(-1, 2).T
        measures = dict(
            count=self.pairs_LEE, conditional=self.conditional_LEE, jaccard=self.jaccard_LEE, lift=self.lift_LEE
        )
        columns = {name: values[:, i, j].ravel() for name, values in measures.items()}
        return cell_table(("layer", "expert", "other"), cells, **columns)


def coactivation(record: RoutingRecord, *, where: pc.Expression | None = None) -> CoActivation:
    """Count how often two experts are among the top-k of the same token, layer by layer.

    Raises:
        MoEAdapterError: no token is left, the filter takes single slots, or layers have different numbers of experts.
    """
    experts = num_experts(record, where)
    tokens: dict[int, int] = {}
    pairs: dict[int, np.ndarray] = {}
    for block in record.tokens(where, weights=False):
        for layer, expert_TK, _ in block.by_layer():
            tokens[layer] = tokens.get(layer, 0) + len(expert_TK)
            pairs[layer] = pairs.get(layer, 0) + _count_pairs(expert_TK.astype(np.int64), experts)
    if not tokens:
        raise MoEAdapterError(f"no row of {record.name} passes the filter {where}.")
    layers = tuple(sorted(tokens))
    return CoActivation(
        layers=layers,
        tokens_L=np.array([tokens[layer] for layer in layers]),
        pairs_LEE=np.stack([pairs[layer] for layer in layers]),
    )


def _count_pairs(expert_TK: np.ndarray, experts: int) -> np.ndarray:
    """(E, E): tokens that chose both experts."""
    slots = range(expert_TK.shape[1])
    one_way = sum(
        np.bincount(expert_TK[:, a] * experts + expert_TK[:, b], minlength=experts**2)
        for a, b in itertools.combinations(slots, 2)
    )
    one_way_EE = np.reshape(one_way, (experts, experts)) if len(slots) > 1 else np.zeros((experts, experts), int)
    return one_way_EE + one_way_EE.T + np.diag(np.bincount(expert_TK.ravel(), minlength=experts))


def _divide(counts: np.ndarray, by: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts / by
