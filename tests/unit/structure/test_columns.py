import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.structure.columns import COLUMN_OF_PATH, Columns, distinct_codes


def grid_columns(first: list[float], second: list[float], index: list[int]) -> Columns:
    """Two swept columns and a constant one; row i takes index[i] of the first and of the second, reversed."""
    rows = np.array(index, dtype=np.int64)
    swept = {
        "tensor": (first, rows % len(first)),
        "micro_batch": (second, rows[::-1] % len(second)),
    }
    return Columns.from_levels(len(index), {"devices": 64.0}, swept)


@given(
    codes=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    size=st.sampled_from([10, 100, 5_000]),  # by table, and by sorting where the table would be too sparse
)
def test_every_row_finds_a_representative_of_its_own_code(codes: list[int], size: int) -> None:
    joint = np.array(codes, dtype=np.int64)
    found = distinct_codes(joint, size)
    assert joint[found.rows][found.inverse].tolist() == codes
    assert len(found.rows) == len(set(codes))


@given(index=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_distinct_cases_reproduce_the_columns_they_were_asked_for(index: list[int]) -> None:
    columns = grid_columns([1.0, 2.0, 4.0], [1.0, 3.0], index)
    cases = columns.distinct(("tensor", "micro_batch", "devices"))
    for name in ("tensor", "micro_batch", "devices"):
        assert columns[name][cases.rows][cases.inverse].tolist() == columns[name].tolist()
    pairs = set(zip(columns["tensor"].tolist(), columns["micro_batch"].tolist(), strict=True))
    assert len(cases.rows) == len(pairs)


def test_a_column_that_is_not_read_does_not_split_cases() -> None:
    columns = grid_columns([1.0, 2.0, 4.0], [1.0, 3.0], [0, 1, 2, 3, 4, 5])
    assert len(columns.distinct(("devices",)).rows) == 1
    assert len(columns.distinct(("micro_batch",)).rows) == 2


def test_a_derived_column_equals_the_function_at_every_row() -> None:
    columns = grid_columns([1.0, 2.0, 4.0], [1.0, 3.0], [0, 1, 2, 3, 4, 5, 0])
    wider = columns.with_derived("product", ("tensor", "micro_batch"), lambda at: at["tensor"] * at["micro_batch"])
    assert wider["product"].tolist() == (columns["tensor"] * columns["micro_batch"]).tolist()
    cases = wider.distinct(("product",))
    assert wider["product"][cases.rows][cases.inverse].tolist() == wider["product"].tolist()


def test_taken_rows_keep_values_and_remain_separable() -> None:
    columns = grid_columns([1.0, 2.0, 4.0], [1.0, 3.0], [0, 1, 2, 3, 4, 5])
    taken = columns.take(np.array([5, 0, 2]))
    assert taken["tensor"].tolist() == columns["tensor"][[5, 0, 2]].tolist()
    cases = taken.distinct(("tensor",))
    assert taken["tensor"][cases.rows][cases.inverse].tolist() == taken["tensor"].tolist()


@pytest.mark.parametrize("limit", [1, 4])
def test_joint_codes_stay_distinct_when_the_code_space_is_compressed(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = grid_columns([1.0, 2.0, 4.0], [1.0, 3.0], list(range(6)))
    whole, _ = columns.joint_code(("tensor", "micro_batch"))
    monkeypatch.setattr("moesim.structure.columns.MAX_TABLE_CELLS", limit)
    compressed, size = columns.joint_code(("tensor", "micro_batch"))
    assert len(np.unique(compressed)) == len(np.unique(whole))
    assert compressed.max() < size


def test_source_and_target_lengths_are_different_columns() -> None:
    assert COLUMN_OF_PATH["workload.source_length"] != COLUMN_OF_PATH["workload.target_length"]
    assert COLUMN_OF_PATH["workload.sequence_length"] == COLUMN_OF_PATH["workload.target_length"]
