"""Expert load case by case: what intervals and permutation tests over cases need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import Estimate, Resampling
from moe_adapter.analysis.statistics import num_experts
from moe_adapter.analysis.tables import number_cells
from moe_adapter.errors import MoEAdapterError

Statistic = Callable[[np.ndarray], np.ndarray]  # counts (…, E) → (…, X)


class Stratum(NamedTuple):
    """Cases that are resampled together: their sums (N, C, V), in the order of their names."""

    group: str | None
    values_NCV: np.ndarray


@dataclass(frozen=True, kw_only=True)
class CaseSums:
    """Sums of V values for N units and C cells; a unit is a case or, where it has several groups, one of them."""

    by: tuple[str, ...]
    cells: tuple[tuple, ...]
    units: tuple[tuple[str, str], ...]  # (case, group), sorted by case
    values_NCV: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, by: Sequence[str], values: Sequence[str]) -> CaseSums:
        """From a table with a row for each case, group and cell: V of its columns, as float64."""
        units, unit_R = number_cells(table, ("case", "group"))
        cells, cell_R = number_cells(table, by)
        values_NCV = np.zeros((len(units), len(cells), len(values)))
        values_NCV[unit_R, cell_R] = np.stack([table[name].to_numpy() for name in values], axis=1)
        return cls(by=tuple(by), cells=cells, units=units, values_NCV=values_NCV)

    @classmethod
    def of_counts(cls, table: pa.Table, by: Sequence[str], experts: int) -> CaseSums:
        """From a table with a row for each case, group, cell and expert: its column count, V = E."""
        units, unit_R = number_cells(table, ("case", "group"))
        cells, cell_R = number_cells(table, by)
        values_NCV = np.zeros((len(units), len(cells), experts), np.int64)
        values_NCV[unit_R, cell_R, table["expert"].to_numpy()] = table["count"].to_numpy()
        return cls(by=tuple(by), cells=cells, units=units, values_NCV=values_NCV)

    @property
    def group_N(self) -> np.ndarray:
        """Each unit's group, by name."""
        return np.array([group for _, group in self.units], dtype=object)

    def named(self, cell: int, group: str | None, by: Sequence[str]) -> tuple:
        """The values of the columns `by` for one of the cells, in a group."""
        values = dict(zip(self.by, self.cells[cell], strict=True), group=group)
        return tuple(values[name] for name in by)

    def strata(self, by: Sequence[str]) -> Iterator[Stratum]:
        """The groups one after another where `by` has "group", else all cases as one."""
        if "group" in by:
            group_N = self.group_N
            for group in sorted(set(group_N)):
                yield Stratum(group, self.values_NCV[group_N == group])
            return
        numbers = {case: number for number, case in enumerate(dict.fromkeys(case for case, _ in self.units))}
        values_NCV = self.values_NCV
        if len(numbers) < len(self.units):
            values_NCV = np.zeros((len(numbers), *values_NCV.shape[1:]), values_NCV.dtype)
            np.add.at(values_NCV, [numbers[case] for case, _ in self.units], self.values_NCV)
        yield Stratum(None, values_NCV)


@dataclass(frozen=True, kw_only=True)
class CellEstimates:
    """A statistic of each cell, (C, X), with its interval over the cell's cases."""

    by: tuple[str, ...]
    cells: tuple[tuple, ...]
    cases_C: np.ndarray  # that have a token in the cell
    estimate: Estimate

    def each(self) -> Iterator[Estimate]:
        """The X statistics apart, (C,) each."""
        for number in range(self.estimate.value.shape[1]):
            yield Estimate(*(part[:, number] for part in self.estimate))


def case_loads(record: RoutingRecord, by: Sequence[str], where: pc.Expression | None = None) -> CaseSums:
    """Routed tokens of each case (N, C, E) by columns of the record other than case and group.

    Raises:
        MoEAdapterError: the record holds no cases, no row is left, or layers have different numbers of experts.
    """
    experts = num_experts(record, where)
    table = record.count(["case", "group", *by, "expert"], where)
    return CaseSums.of_counts(table, by, experts)


def means(sums: np.ndarray) -> np.ndarray:
    """The statistic of sums whose last value is the number of tokens: the others over it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., :-1] / sums[..., -1:]


def inner(by: Sequence[str]) -> list[str]:
    """The columns of `by` that tell the cells of one case apart."""
    if "case" in by:
        raise MoEAdapterError(f"got by={tuple(by)}; intervals are over cases, so cells can't be cases themselves.")
    return [name for name in by if name != "group"]


def estimate_cells(sums: CaseSums, by: Sequence[str], statistic: Statistic, resampling: Resampling) -> CellEstimates:
    """A statistic (…, V) → (…, X) of the sums over cases, cell by cell, each group by itself where `by` has "group".

    A cell's interval is for the number of cases that have a token in it.
    """
    rows = []
    for group, values_NCV in sums.strata(by):
        total_CX = statistic(values_NCV.sum(axis=0))
        samples = resampling.bootstrap(values_NCV.reshape(len(values_NCV), -1)).reshape(-1, *values_NCV.shape[1:])
        samples_RCX = statistic(samples)
        for number, cases in enumerate(values_NCV.any(axis=2).sum(axis=0)):
            if cases:
                estimate = resampling.interval(total_CX[number], samples_RCX[:, number], cases)
                rows.append((sums.named(number, group, by), cases, *estimate))
    cells, cases, *parts = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
    return CellEstimates(by=tuple(by), cells=cells, cases_C=np.array(cases), estimate=Estimate(*map(np.stack, parts)))
