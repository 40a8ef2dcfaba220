"""Kernel tables: strict reading, folds by whole shape, error statistics, conformal coverage."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import FormatError
from moesim.study.kernel_tables import (
    GEMM_COLUMNS,
    MOE_COLUMNS,
    conformal_half_widths,
    coverage,
    error_statistics,
    fold_of_rows,
    half_widths_of_bins,
    kernel_table_paths,
    log_bin_edges,
    read_kernel_table,
)


def write(tmp_path: Path, text: str, name: str = "x_gemm_bf16.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, columns=GEMM_COLUMNS):
    with pytest.raises(FormatError) as caught:
        read_kernel_table(path, columns)
    return caught.value.problems


def test_packed_table_is_read_in_any_order_of_columns(tmp_path):
    path = tmp_path / "x_gemm_bf16.csv.gz"
    path.write_bytes(gzip.compress(b"time_us,m,k,n\r\n1.5,1,64,32\r\n2.5,2,128,32\r\n\r\n"))
    table = read_kernel_table(path, GEMM_COLUMNS)
    assert list(table) == ["m", "n", "k", "time_us"]
    assert table["k"].tolist() == [64, 128]
    assert table["k"].dtype == np.int64
    assert table["time_us"].tolist() == [1.5, 2.5]


def test_text_columns_are_read_as_text(tmp_path):
    header = ",".join(MOE_COLUMNS)
    path = write(tmp_path, f"{header}\n1,4096,1536,8,128,1,1,balanced,flow,9.5\n", "x_moe_bf16.csv")
    assert read_kernel_table(path, MOE_COLUMNS)["distribution"].tolist() == ["balanced"]


@pytest.mark.parametrize(
    ("text", "code", "line", "field"),
    [
        ("m,n,k\n1,2,3\n", "E-SCN-002", 1, "time_us"),
        ("m,n,k,time_us,time_ms\n1,2,3,4,5\n", "E-SCN-001", 1, "time_ms"),
        ("m,n,k,k,time_us\n1,2,3,3,4\n", "E-FMT-007", 1, "k"),
        ("m,n,k,time_us\n", "E-FMT-002", None, None),
        ("", "E-FMT-002", None, None),
        ("m,n,k,time_us\n1,2,3\n", "E-FMT-013", 2, None),
        ("m,n,k,time_us\n1,2,3,4\n1,two,3,4\n", "E-SCN-006", 3, "n"),
        ("m,n,k,time_us\n1,2.5,3,4\n", "E-SCN-007", 2, "n"),
        ("m,n,k,time_us\n0,2,3,4\n", "E-SCN-007", 2, "m"),
        ("m,n,k,time_us\n1,2,3,nan\n", "E-SCN-007", 2, "time_us"),
        ("m,n,k,time_us\n1,2,3,-4\n", "E-SCN-007", 2, "time_us"),
        ('m,n,k,time_us\n1,2,"3,4\n', "E-FMT-013", 2, None),
    ],
)
def test_bad_tables_are_refused_with_their_place(tmp_path, text, code, line, field):
    problem = problems_of(write(tmp_path, text))[0]
    assert (problem.code, problem.line, problem.field) == (code, line, field)
    assert problem.remedy


def test_misspelt_column_is_named_with_the_nearest(tmp_path):
    problems = problems_of(write(tmp_path, "m,n,k,time_u\n1,2,3,4\n"))
    assert [problem.field for problem in problems] == ["time_u", "time_us"]
    assert "'time_us'" in problems[0].remedy


def test_unreadable_tables_are_refused(tmp_path):
    assert problems_of(tmp_path / "absent.csv")[0].code == "E-FMT-001"
    damaged = tmp_path / "damaged.csv.gz"
    damaged.write_bytes(gzip.compress(b"m,n,k,time_us\n" * 100)[:30])
    assert problems_of(damaged)[0].code == "E-FMT-001"
    plain = tmp_path / "plain.csv.gz"
    plain.write_bytes(b"m,n,k,time_us\n")
    assert problems_of(plain)[0].code == "E-FMT-001"
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"m,n,k,time_us\xff\n")
    assert problems_of(latin)[0].code == "E-FMT-004"


def test_tables_of_a_folder_are_found_by_device(tmp_path):
    for name in ("b_gemm_bf16.csv.gz", "a_gemm_bf16.csv", "a_moe_bf16.csv", "gemm.txt"):
        write(tmp_path, "", name)
    assert list(kernel_table_paths(tmp_path, "gemm")) == ["a", "b"]
    for folder, operator in ((tmp_path, "attention_prefill"), (tmp_path / "absent", "gemm")):
        with pytest.raises(FormatError, match="folder that holds the kernel tables"):
            kernel_table_paths(folder, operator)


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["a", "b"])), min_size=1), st.integers(0, 99))
def test_rows_of_one_shape_share_a_fold_whatever_else_there_is(rows, seed):
    numbers, texts = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    folds = fold_of_rows([numbers, texts], 5, seed)
    alone = [int(fold_of_rows([[number], [text]], 5, seed)[0]) for number, text in rows]
    assert folds.tolist() == alone
    assert set(alone) <= set(range(5))


def test_folds_hold_about_equally_many_shapes_and_change_with_the_seed():
    n, k = (axis.ravel() for axis in np.meshgrid(np.arange(40), np.arange(40)))
    folds = fold_of_rows([n, k])
    # binomial, mean 320, standard deviation 16: 4 sigmas
    assert np.abs(np.bincount(folds, minlength=5) - 320).max() < 64
    assert np.mean(folds == fold_of_rows([n, k], seed=1)) == pytest.approx(0.2, abs=0.04)


def test_folds_need_two_folds_and_keys_of_one_length():
    for keys, folds in (([[1, 2]], 1), ([], 5), ([[1, 2], [1]], 5)):
        with pytest.raises(ValueError, match="fold_of_rows needs"):
            fold_of_rows(keys, folds)


def test_no_rows_have_no_error():
    nothing = error_statistics([], [])
    assert nothing.count == 0
    assert math.isnan(nothing.median)
    assert math.isnan(coverage([], []))


def test_conformal_half_width_is_the_ceiling_quantile():
    # (19 + 1) x 0.9 = the 18th smallest of 1..19; of 5 rows the largest
    assert half_widths_of_bins(-np.arange(1.0, 20.0), np.zeros(19), [], level=0.9).tolist() == [18.0]
    assert half_widths_of_bins(np.arange(1.0, 6.0), np.zeros(5), [], level=0.9).tolist() == [5.0]


def test_small_bins_take_the_width_of_all_rows():
    errors, sizes = np.arange(1.0, 101.0), np.r_[np.zeros(95), np.full(5, 9.0)]
    widths = half_widths_of_bins(errors, sizes, [1.0], level=0.5)
    assert widths.tolist() == [48.0, 51.0]


def test_intervals_cover_what_they_promise_and_follow_the_size():
    generator = np.random.default_rng(0)
    sizes = 10.0 ** generator.uniform(0, 3, 20_000)
    errors = generator.normal(0.0, np.where(sizes < 30, 0.2, 0.05))
    folds = fold_of_rows([np.arange(20_000)])
    widths = conformal_half_widths(errors, folds, sizes=sizes)
    # standard error of a share of 20,000 rows: 0.2 %; of some 7,000 0.36 %; 4 of each, and a bin astride the change
    assert coverage(errors, widths) == pytest.approx(0.9, abs=0.01)
    small = sizes < 15
    assert coverage(errors[small], widths[small]) == pytest.approx(0.9, abs=0.02)
    assert np.median(widths[small]) == pytest.approx(0.2 * 1.645, rel=0.1)


def test_interval_of_a_fold_does_not_see_the_fold():
    errors, folds = np.r_[np.full(50, 0.1), np.full(50, 9.0)], np.repeat([0, 1], 50)
    widths = conformal_half_widths(errors, folds)
    assert set(widths[:50]) == {9.0}
    assert set(widths[50:]) == {0.1}


def test_groups_are_calibrated_apart():
    errors, folds, groups = np.tile([0.1, 0.5], 100), np.repeat([0, 1], 100), np.tile([True, False], 100)
    widths = conformal_half_widths(errors, folds, groups=groups)
    assert set(widths[groups]) == {0.1}
    assert set(widths[~groups]) == {0.5}
    alone = conformal_half_widths(errors, np.zeros(200), groups=groups)
    assert np.isinf(alone).all()


def test_bins_hold_equally_many_rows():
    edges = log_bin_edges(2.0 ** np.arange(80), 8)
    assert np.bincount(np.searchsorted(edges, 2.0 ** np.arange(80), side="right")).tolist() == [10] * 8
    assert log_bin_edges(np.ones(50)).size <= 1
