from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesim.structure import columns as columns_module
from moesim.structure.columns import Columns, distinct_codes


def random_columns(seed: int, n_rows: int = 200) -> Columns:
    generator = np.random.default_rng(seed)
    swept = {
        name: (list(range(1, levels + 1)), generator.integers(0, levels, n_rows))
        for name, levels in (("one", 3), ("two", 5), ("three", 1), ("four", 40))
    }
    return Columns.from_levels(n_rows, {"constant": 7.0}, swept)


@given(st.integers(0, 2**32 - 1), st.sampled_from([("one",), ("one", "two"), ("constant",), ("one", "two", "four")]))
def test_gathering_distinct_cases_gives_back_every_row(seed, names):
    columns = random_columns(seed)
    cases = columns.distinct(names)
    for name in names:
        assert (columns[name][cases.rows][cases.inverse] == columns[name]).all()
    rows = {tuple(columns[name][row] for name in names) for row in range(len(columns))}
    assert len(cases.rows) == len(rows)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.sampled_from([31, 100_000]))
def test_look_up_and_sort_find_the_same_distinct_codes(codes, size):
    joint = np.array(codes, dtype=np.int64)
    found = distinct_codes(joint, size)
    assert joint[found.rows].tolist() == sorted(set(codes))
    assert (joint[found.rows][found.inverse] == joint).all()


def test_distinct_cases_survive_a_code_space_too_large_for_a_table(monkeypatch):
    columns = random_columns(3)
    expected = columns.distinct(("one", "two", "four"))
    monkeypatch.setattr(columns_module, "MAX_TABLE_CELLS", 4)
    found = columns.distinct(("one", "two", "four"))
    assert sorted(found.rows) == sorted(expected.rows)
    for name in ("one", "two", "four"):
        assert (columns[name][found.rows][found.inverse] == columns[name]).all()


def test_taken_rows_keep_values_and_the_meaning_of_their_codes():
    columns = random_columns(4)
    rows = np.array([5, 5, 190, 0])
    part = columns.take(rows)
    assert len(part) == 4
    for name in ("one", "two", "three", "four", "constant"):
        assert (part[name] == columns[name][rows]).all()
        assert (part.codes[name] == columns.codes[name][rows]).all()


def test_a_derived_column_is_what_its_function_gives_for_every_row():
    columns = random_columns(5).with_derived("product", ("one", "two"), lambda cases: cases["one"] * cases["two"])
    assert (columns["product"] == columns["one"] * columns["two"]).all()
    cases = columns.distinct(("product",))
    assert (columns["product"][cases.rows][cases.inverse] == columns["product"]).all()
