"""Two records side by side: where the load differs, and whether by more than the choice of cases would make it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.cases import CaseSums, Stratum, case_loads, inner
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import DEFAULT, Estimate, Resampling, benjamini_hochberg, estimate_columns, p_value
from moe_adapter.analysis.statistics import shares
from moe_adapter.analysis.tables import cell_table, expert_table
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Record b against record a: shares (C, E) of each, their difference b − a with its interval, and its p-value.

    `distance_C` is the total variation distance ½·Σ_e |b − a| of each cell, between 0 and 1, with a p-value of its own.
    `paired`: both records are of the same cases. The tables add q-values over all their rows.
    """

    by: tuple[str, ...]
    cells: tuple[tuple, ...]
    paired: bool
    a_CE: np.ndarray
    b_CE: np.ndarray
    difference_CE: Estimate
    p_CE: np.ndarray
    distance_C: np.ndarray
    distance_p_C: np.ndarray

    def to_table(self) -> pa.Table:
        """by…, expert, a, b, difference, difference_low, difference_high, p, q."""
        columns = dict(
            a=self.a_CE.ravel(),
            b=self.b_CE.ravel(),
            **estimate_columns(difference=self.difference_CE),
            p=self.p_CE.ravel(),
            q=benjamini_hochberg(self.p_CE).ravel(),
        )
        return expert_table(self.by, self.cells, self.a_CE.shape[1], **columns)

    def cells_table(self) -> pa.Table:
        """by…, distance, p, q."""
        q = benjamini_hochberg(self.distance_p_C)
        return cell_table(self.by, self.cells, distance=self.distance_C, p=self.distance_p_C, q=q)


def compare(
    a: RoutingRecord,
    b: RoutingRecord,
    *,
    by: Sequence[str] = ("layer",),
    where: pc.Expression | None = None,
    paired: bool | None = None,
    resampling: Resampling = DEFAULT,
) -> Comparison:
    """How the experts' shares differ between two records: before and after, two checkpoints, two hospitals.

    Of the same cases, a resample draws cases with what both records hold of them, and a permutation swaps the records
    within cases; else each record is resampled by itself, and a permutation deals the cases out anew. Experts are
    matched by number, which means something for two states of one model alone. Cells that only one record has are
    left out. Source: Davison & Hinkley (1997), sections 3.8 and 4.3; q by Benjamini & Hochberg (1995).

    Args:
        by: "layer", "group", "modality", "slot".
        paired: whether both records are of the same cases; without it, whether their case ids are the same. Of
            cases that were only numbered, say it.

    Raises:
        MoEAdapterError: the records hold no cases, have different numbers of experts or no cell in common, or are to
            be paired and their cases differ.
    """
    sums = [case_loads(record, inner(by), where) for record in (a, b)]
    experts = [each.values_NCV.shape[2] for each in sums]
    if experts[0] != experts[1]:
        raise MoEAdapterError(f"the records have {experts[0]} and {experts[1]} experts, which can't be matched.")
    same = sums[0].units == sums[1].units
    if paired and not same:
        raise MoEAdapterError("the records are not of the same cases in the same groups; compare with paired=False.")
    paired = same if paired is None else paired
    by = tuple(by)
    rows = [row for stratum in _strata(*sums, by) for row in _compare(*stratum, paired, resampling)]
    if not rows:
        raise MoEAdapterError(f"the records have no cell by {', '.join(by)} in common.")
    cells, *columns = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
    shares_a, shares_b, difference, low, high, p, distance, distance_p = map(np.array, columns)
    return Comparison(
        by=by,
        cells=cells,
        paired=paired,
        a_CE=shares_a,
        b_CE=shares_b,
        difference_CE=Estimate(difference, low, high),
        p_CE=p,
        distance_C=distance,
        distance_p_C=distance_p,
    )


def _strata(a: CaseSums, b: CaseSums, by: tuple[str, ...]) -> Iterator[tuple[Stratum, Stratum, list[tuple]]]:
    """The strata that both have, with the cells that both have in them, and these cells' names."""
    common = sorted(set(a.cells) & set(b.cells))
    of_a, of_b = ({stratum.group: stratum for stratum in sums.strata(by)} for sums in (a, b))
    for group in of_a.keys() & of_b.keys():
        parts = []
        for sums, stratum in ((a, of_a[group]), (b, of_b[group])):
            at = [sums.cells.index(cell) for cell in common]
            parts.append(stratum._replace(values_NCV=stratum.values_NCV[:, at]))
        present = [number for number, _ in enumerate(common) if all(p.values_NCV[:, number].any() for p in parts)]
        if present:
            names = [a.named(a.cells.index(common[number]), group, by) for number in present]
            yield *(part._replace(values_NCV=part.values_NCV[:, present]) for part in parts), names


def _compare(a: Stratum, b: Stratum, cells: list[tuple], paired: bool, resampling: Resampling) -> list[tuple]:
    """A row for each cell: its name, shares of a and b, difference, low, high, p, distance, its p."""
    shape = a.values_NCV.shape[1:]
    a_NX, b_NX = (each.values_NCV.reshape(len(each.values_NCV), -1).astype(np.float64) for each in (a, b))
    draw, permute = (_paired_samples, _swapped) if paired else (_independent_samples, _dealt)

    def differences(sums: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        of_a, of_b = (shares(part.reshape(-1, *shape)) for part in sums)
        return of_b - of_a

    (observed_CE,) = differences((a_NX.sum(axis=0), b_NX.sum(axis=0)))
    samples_RCE = differences(draw(a_NX, b_NX, resampling))
    cases_C = np.min([each.values_NCV.any(axis=2).sum(axis=0) for each in (a, b)], axis=0)
    parts = (resampling.interval(observed_CE[c], samples_RCE[:, c], cases) for c, cases in enumerate(cases_C))
    estimate = Estimate(*map(np.stack, zip(*parts, strict=True)))
    null_PCE = np.concatenate([differences(sums) for sums in permute(a_NX, b_NX, resampling)])
    p_CE = p_value(np.abs(observed_CE), np.abs(null_PCE))
    distance_C, null_PC = (np.abs(each).sum(axis=-1) / 2 for each in (observed_CE, null_PCE))
    shares_a, shares_b = (shares(each.values_NCV.sum(axis=0)) for each in (a, b))
    columns = (shares_a, shares_b, *estimate, p_CE, distance_C, p_value(distance_C, null_PC))
    return list(zip(cells, *columns, strict=True))


def _paired_samples(a_NX: np.ndarray, b_NX: np.ndarray, resampling: Resampling) -> tuple[np.ndarray, np.ndarray]:
    """Sums (R, X) of both records over the same draws of cases."""
    of_a, of_b = np.split(resampling.bootstrap(np.concatenate([a_NX, b_NX], axis=1)), 2, axis=1)
    return of_a, of_b


def _independent_samples(a_NX: np.ndarray, b_NX: np.ndarray, resampling: Resampling) -> tuple[np.ndarray, np.ndarray]:
    return resampling.bootstrap(a_NX), replace(resampling, seed=resampling.seed + 1).bootstrap(b_NX)


def _swapped(a_NX: np.ndarray, b_NX: np.ndarray, resampling: Resampling) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums (P, X) of both records after the records were swapped for half of the cases."""
    for swap_PN in resampling.swaps(len(a_NX)):
        moved_PX = swap_PN.astype(np.float64) @ (b_NX - a_NX)
        yield a_NX.sum(axis=0) + moved_PX, b_NX.sum(axis=0) - moved_PX


def _dealt(a_NX: np.ndarray, b_NX: np.ndarray, resampling: Resampling) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums (P, X) of as many cases as each record has, dealt out anew from both."""
    all_NX = np.concatenate([a_NX, b_NX])
    for is_a_PN in resampling.permuted(np.arange(len(all_NX)) < len(a_NX)):
        of_a = is_a_PN.astype(np.float64) @ all_NX
        yield of_a, all_NX.sum(axis=0) - of_a
