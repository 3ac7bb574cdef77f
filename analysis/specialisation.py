"""Whether experts and groups (organs) go together: mutual information and divergence, with a permutation test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.cases import CaseSums, case_loads
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import DEFAULT, Resampling, benjamini_hochberg, p_value
from moe_adapter.analysis.statistics import shares
from moe_adapter.analysis.tables import cell_table
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True, kw_only=True)
class Association:
    """An amount of association in bits, what labels that mean nothing give on average, and its p- and q-value."""

    bits: np.ndarray
    null: np.ndarray
    p: np.ndarray
    q: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """Association of experts with groups; L layers, G groups.

    `information_L` is I(group; expert); `explained_L` its share of the experts' entropy, I / H(expert), Theil's
    uncertainty coefficient; `divergence_LG` is KL(p(expert | group) ‖ p(expert)), whose mean over tokens is I.
    """

    layers: tuple[int, ...]
    groups: tuple[str, ...]
    cases_G: np.ndarray
    information_L: Association
    explained_L: np.ndarray
    divergence_LG: Association

    def to_table(self) -> pa.Table:
        """layer, information (bits), explained, null, p, q."""
        found = self.information_L
        columns = dict(information=found.bits, explained=self.explained_L, null=found.null, p=found.p, q=found.q)
        return cell_table(("layer",), [(layer,) for layer in self.layers], **columns)

    def groups_table(self) -> pa.Table:
        """layer, group, cases, divergence (bits), null, p, q."""
        found = self.divergence_LG
        cells = [(layer, group) for layer in self.layers for group in self.groups]
        columns = dict(divergence=found.bits, null=found.null, p=found.p, q=found.q)
        cases = np.tile(self.cases_G, len(self.layers))
        return cell_table(("layer", "group"), cells, cases=cases, **{k: v.ravel() for k, v in columns.items()})


def specialisation(
    record: RoutingRecord, *, where: pc.Expression | None = None, resampling: Resampling = DEFAULT
) -> Specialisation:
    """How much the group of a token's case tells of the token's experts, by layer, and how far each group departs.

    Bits of the joint distribution of (group, expert) over routed tokens, so a group weighs by its tokens. Finite
    samples alone give some bits: the null is the mean over permutations of the groups' labels over cases, and p the
    share of permutations with as much (Phipson & Smyth, 2010), q over all layers, or layers and groups, at once
    (Benjamini & Hochberg, 1995). Groups that differ in their share of images differ for that alone: restrict with
    where=pc.field("modality") == "image". Source: Cover & Thomas (2006), 2.3; OLMoE's domain specialisation,
    arXiv 2409.02060, section 5.3, is k·p(expert | group).

    Raises:
        MoEAdapterError: fewer than two groups, a case in two groups, or as `expert_load`.
    """
    sums = case_loads(record, ("layer",), where)
    groups, label_N = _labels(sums)
    values_NX = sums.values_NCV.reshape(len(label_N), -1).astype(np.float64)

    def information(labels_PN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        member_PGN = (labels_PN[:, None] == np.arange(len(groups))[:, None]).astype(np.float64)
        counts_PGX = (member_PGN.reshape(-1, len(label_N)) @ values_NX).reshape(*member_PGN.shape[:2], -1)
        return mutual_information(counts_PGX.reshape(*counts_PGX.shape[:2], *sums.values_NCV.shape[1:]))

    bits = [part[0] for part in information(label_N[None])]
    nulls = zip(*map(information, resampling.permuted(label_N)), strict=True)
    of_layers, of_groups = (_associate(b, np.concatenate(null)) for b, null in zip(bits, nulls, strict=True))
    p_LE = shares(sums.values_NCV.sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        explained_L = of_layers.bits / -_p_log(p_LE, p_LE).sum(axis=-1)
    return Specialisation(
        layers=tuple(layer for (layer,) in sums.cells),
        groups=groups,
        cases_G=np.bincount(label_N),
        information_L=of_layers,
        explained_L=explained_L,
        divergence_LG=of_groups,
    )


def mutual_information(counts_GLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(I(group; expert) (…, L), KL(p(expert | group) ‖ p(expert)) (…, L, G)) in bits from counts (…, G, L, E)."""
    counts_LGE = np.moveaxis(counts_GLE, -3, -2)
    p_LE1 = shares(counts_LGE.sum(axis=-2))[..., None, :]
    p_LGE = shares(counts_LGE)
    divergence_LG = (_p_log(p_LGE, p_LGE) - _p_log(p_LGE, p_LE1)).sum(axis=-1)
    weight_LG = shares(counts_LGE.sum(axis=-1))
    return (weight_LG * np.nan_to_num(divergence_LG)).sum(axis=-1), divergence_LG


def _p_log(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p·log2 q, 0 where p is."""
    return np.where(p > 0, p * np.log2(np.where(p > 0, q, 1)), 0 * p)


def _labels(sums: CaseSums) -> tuple[tuple[str, ...], np.ndarray]:
    """The groups, and the number of each case's group (N,)."""
    groups = tuple(sorted(set(sums.group_N)))
    if len(groups) < 2:
        raise MoEAdapterError(f"all cases are of group {groups[0]!r}; specialisation needs two groups or more.")
    if len({case for case, _ in sums.units}) < len(sums.units):
        raise MoEAdapterError(
            "some cases have tokens in two groups, and labels are permuted over cases; record one group a case."
        )
    return groups, np.searchsorted(groups, sums.group_N.astype(str))


def _associate(bits: np.ndarray, null: np.ndarray) -> Association:
    p = p_value(bits, null)
    return Association(bits=bits, null=null.mean(axis=0), p=p, q=benjamini_hochberg(p))
