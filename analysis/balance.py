"""How evenly tokens spread over experts, with confidence intervals over cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.cases import case_loads, estimate_cells, inner
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import DEFAULT, Estimate, Resampling, estimate_columns
from moe_adapter.analysis.statistics import coefficient_of_variation, max_over_mean, normalised_entropy, shares
from moe_adapter.analysis.tables import cell_table, expert_table


@dataclass(frozen=True, kw_only=True)
class LoadShares:
    """Each expert's share of its cell's routed tokens, (C, E), with intervals; `cases_C` cases are in the cell."""

    by: tuple[str, ...]
    cells: tuple[tuple, ...]
    cases_C: np.ndarray
    share_CE: Estimate

    def to_table(self) -> pa.Table:
        """Long form: by…, expert, cases, share, share_low, share_high."""
        experts = self.share_CE.value.shape[1]
        return expert_table(
            self.by,
            self.cells,
            experts,
            cases=np.repeat(self.cases_C, experts),
            **estimate_columns(share=self.share_CE),
        )


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Evenness of load by cell, (C,) each: see `normalised_entropy`, `coefficient_of_variation`, `max_over_mean`."""

    by: tuple[str, ...]
    cells: tuple[tuple, ...]
    cases_C: np.ndarray
    entropy_C: Estimate
    variation_C: Estimate
    max_over_mean_C: Estimate

    def to_table(self) -> pa.Table:
        """by…, cases, and entropy, variation, max_over_mean, each followed by its _low and _high."""
        estimates = dict(entropy=self.entropy_C, variation=self.variation_C, max_over_mean=self.max_over_mean_C)
        return cell_table(self.by, self.cells, cases=self.cases_C, **estimate_columns(**estimates))


def load_shares(
    record: RoutingRecord,
    *,
    by: Sequence[str] = ("layer",),
    where: pc.Expression | None = None,
    resampling: Resampling = DEFAULT,
) -> LoadShares:
    """Each expert's share of the routed tokens, F_e / k of equation (6), by "layer", "group", "modality", "slot".

    A token counts once for each of its top-k experts, and a case by its tokens: no length is scaled away. Groups are
    resampled each by itself.

    Raises:
        MoEAdapterError: the record holds no cases, no row is left, or layers have different numbers of experts.
    """
    sums = case_loads(record, inner(by), where)
    found = estimate_cells(sums, by, shares, resampling)
    return LoadShares(by=found.by, cells=found.cells, cases_C=found.cases_C, share_CE=found.estimate)


def balance(
    record: RoutingRecord,
    *,
    by: Sequence[str] = ("layer",),
    where: pc.Expression | None = None,
    resampling: Resampling = DEFAULT,
) -> Balance:
    """How even the load is, cell by cell: normalised entropy, coefficient of variation, maximum over mean.

    Intervals are percentiles: of a load that is even, and so at the edge of what each measure can be, they lie to one
    side of the value.

    Raises:
        MoEAdapterError: as `load_shares`.
    """
    measures = (normalised_entropy, coefficient_of_variation, max_over_mean)
    sums = case_loads(record, inner(by), where)
    found = estimate_cells(sums, by, lambda counts: np.stack([f(counts) for f in measures], axis=-1), resampling)
    entropy, variation, highest = found.each()
    return Balance(
        by=found.by,
        cells=found.cells,
        cases_C=found.cases_C,
        entropy_C=entropy,
        variation_C=variation,
        max_over_mean_C=highest,
    )
