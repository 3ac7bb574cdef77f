"""Numbers from a routing record: pure functions, each naming what defines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.tables import expert_table, number_cells
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """How many routed tokens each expert got, cell by cell; C cells, E experts.

    A cell is one combination of values of the columns `by`. A token counts once for each of its top-k experts.
    """

    by: tuple[str, ...]
    cells: tuple[tuple, ...]
    counts_CE: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, by: Sequence[str], experts: int) -> ExpertLoad:
        """From a table with a row for each cell and expert: by…, expert, count."""
        cells, cell_R = number_cells(table, by)
        counts_CE = np.zeros((len(cells), experts), np.int64)
        counts_CE[cell_R, table["expert"].to_numpy()] = table["count"].to_numpy()
        return cls(by=tuple(by), cells=cells, counts_CE=counts_CE)

    @property
    def share_CE(self) -> np.ndarray:
        """Each expert's share of its cell's routed tokens, rows summing to 1: F_e / k of equation (6)."""
        return shares(self.counts_CE)

    def total(self, **only: object) -> np.ndarray:
        """Counts (E,) summed over the cells where each named column has the given value, e.g. group="liver"."""
        if unknown := set(only) - set(self.by):
            raise MoEAdapterError(f"this load is by {', '.join(self.by)}, not by {', '.join(sorted(unknown))}.")
        wanted = [all(cell[self.by.index(name)] == value for name, value in only.items()) for cell in self.cells]
        return self.counts_CE[np.array(wanted, bool)].sum(axis=0)

    def to_table(self) -> pa.Table:
        """Long form: by…, expert, count, share; experts that got nothing included."""
        columns = dict(count=self.counts_CE.ravel(), share=self.share_CE.ravel())
        return expert_table(self.by, self.cells, self.counts_CE.shape[1], **columns)


def expert_load(
    record: RoutingRecord, *, by: Sequence[str] = ("layer",), where: pc.Expression | None = None
) -> ExpertLoad:
    """Expert load by any of the record's columns: "layer", "group", "modality", "case", "slot".

    Args:
        where: rows to count, as a pyarrow expression: pc.field("layer") == 3.

    Raises:
        MoEAdapterError: an unknown column, no row left, or layers with different numbers of experts.
    """
    by = tuple(by)
    table = record.count([*by, "expert"], where)
    return ExpertLoad.of(table, by, num_experts(record, where))


def normalised_entropy(counts: np.ndarray) -> np.ndarray:
    """−Σ p log p / log E over the last axis: 1 for even load, 0 for one expert alone, NaN without tokens.

    Shannon's entropy over its maximum (Pielou's evenness); (…, E) → (…).
    """
    p = shares(counts)
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0 * p)
    return -terms.sum(axis=-1) / np.log(counts.shape[-1])


def coefficient_of_variation(counts: np.ndarray) -> np.ndarray:
    """Standard deviation over mean of the load, over the last axis: 0 for even load; (…, E) → (…).

    The square root of the importance loss of Shazeer et al. (2017), arXiv 1701.06538, section 4.
    """
    p = shares(counts)
    return p.std(axis=-1) / p.mean(axis=-1)


def max_over_mean(counts: np.ndarray) -> np.ndarray:
    """The most loaded expert's load over the mean load, over the last axis: 1 for even load, at most E; (…, E) → (…).

    1 + MaxVio of Wang et al. (2024), arXiv 2408.15664.
    """
    p = shares(counts)
    return p.max(axis=-1) / p.mean(axis=-1)


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis, NaN without tokens: F_e / k of equation (6) for those of a layer."""
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=-1, keepdims=True)


def num_experts(record: RoutingRecord, where: pc.Expression | None) -> int:
    """E of the layers that pass the filter.

    Raises:
        MoEAdapterError: no row passes it, or the layers have different numbers of experts.
    """
    layers = record.count(["layer"], where)["layer"].to_pylist()
    if not layers:
        raise MoEAdapterError(f"no row of {record.name} passes the filter {where}.")
    sizes = {record.facts.layers[layer].num_experts for layer in layers}
    if len(sizes) > 1:
        raise MoEAdapterError(
            f"the layers have {sorted(sizes)} experts; count layers alike, with where=pc.field('layer').isin([…])."
        )
    return sizes.pop()
