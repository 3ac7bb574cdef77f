"""Rows in any order come to the cells they belong to."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from moe_adapter.analysis.tables import number_cells, sum_cells


@pytest.mark.parametrize("encoded", [False, True])
def test_cells_are_sorted_whatever_the_order_of_rows(encoded):
    rows = [("b", 2), ("a", 10), ("b", -1), ("a", 2), ("b", 2), ("肝", 10)]
    table = pa.table({"group": [row[0] for row in rows], "layer": [row[1] for row in rows]})
    if encoded:  # in chunks of which each has codes of its own
        parts = [table[:2], table[2:]]
        table = pa.concat_tables([part.set_column(0, "group", part["group"].dictionary_encode()) for part in parts])
    cells, number_R = number_cells(table, ("group", "layer"))
    assert cells == (("a", 2), ("a", 10), ("b", -1), ("b", 2), ("肝", 10))
    assert [cells[number] for number in number_R] == rows
    assert number_cells(table, ("layer",))[0] == ((-1,), (2,), (10,))


def test_no_column_is_one_cell_and_no_row_none():
    table = pa.table({"layer": [3, 1]})
    cells, number_R = number_cells(table, ())
    assert cells == ((),) and number_R.tolist() == [0, 0]
    assert number_cells(table[:0], ("layer",))[0] == ()


def test_sums():
    cells = (("a",), ("b",), ("c",))
    table = sum_cells(("group",), cells, np.array([2, 0, 2]), value=np.array([1.5, 2.0, 3.0]))
    assert table.to_pydict() == {"group": ["a", "b", "c"], "value": [2.0, 0.0, 4.5]}
