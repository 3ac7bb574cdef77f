"""Cells, the combinations of some columns' values: which cell a row is of, and tables with a row for each cell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def number_cells(table: pa.Table, by: Sequence[str]) -> tuple[tuple[tuple, ...], np.ndarray]:
    """The combinations of values of the columns `by`, sorted, and the number among them of each row (R,)."""
    code_R = np.zeros(len(table), np.int64)
    for name in by:
        column = table[name].combine_chunks().dictionary_encode()
        code_R = code_R * len(column.dictionary) + column.indices.to_numpy()
    _, first, number_R = np.unique(code_R, return_index=True, return_inverse=True)
    found = table.select(list(by)).take(first)
    rows = list(zip(*(column.to_pylist() for column in found.columns), strict=True)) if by else [()] * len(first)
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return tuple(rows[number] for number in order), np.argsort(order)[number_R]


def cell_table(by: Sequence[str], cells: Sequence[tuple], **columns: np.ndarray) -> pa.Table:
    """A row for each cell: by…, columns…, each (C,); NaN becomes null."""
    values = zip(*cells, strict=True) if cells else [()] * len(by)
    arrays = {name: pa.array(column, from_pandas=True) for name, column in columns.items()}
    return pa.table({**dict(zip(by, map(list, values), strict=True)), **arrays})


def expert_table(by: Sequence[str], cells: Sequence[tuple], experts: int, **columns: np.ndarray) -> pa.Table:
    """A row for each cell and expert, those that got nothing included: by…, expert, columns…, each (C·E,)."""
    return cell_table((*by, "expert"), [(*cell, expert) for cell in cells for expert in range(experts)], **columns)


def sum_cells(by: Sequence[str], cells: Sequence[tuple], cell_T: np.ndarray, **values_T: np.ndarray) -> pa.Table:
    """A row for each cell: by…, and the sums over its tokens of the values (T,)."""
    sums = {name: np.bincount(cell_T, weights=values, minlength=len(cells)) for name, values in values_T.items()}
    return cell_table(by, cells, **sums)


def in_layer(table: pa.Table, layer: int, columns: Sequence[str]) -> pa.Table:
    """These columns of a table, "layer" among them."""
    return table.append_column("layer", pa.repeat(layer, len(table))).select(list(columns))
