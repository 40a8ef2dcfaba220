"""Tables of measured kernel times: reading them, folds by whole shape, error statistics, conformal intervals."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, Problem, nearest_name

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
ColumnKind = Literal["count", "positive", "text"]
"""A whole number >= 1, a finite number > 0, or text."""

GEMM_COLUMNS: dict[str, ColumnKind] = {"m": "count", "n": "count", "k": "count", "time_us": "positive"}
MOE_COLUMNS: dict[str, ColumnKind] = {
    "num_tokens": "count",
    "hidden_size": "count",
    "inter_size": "count",
    "topk": "count",
    "num_experts": "count",
    "moe_tp_size": "count",
    "moe_ep_size": "count",
    "distribution": "text",
    "kernel_source": "text",
    "time_us": "positive",
}
ATTENTION_COLUMNS: dict[str, ColumnKind] = {
    "batch_size": "count",
    "isl": "count",
    "num_heads": "count",
    "num_key_value_heads": "count",
    "head_dim": "count",
    "time_us": "positive",
}
TABLE_BYTES = 256 * 2**20
"""Size a table may have once unpacked; ten times the largest there is."""
MINIMUM_BIN_ROWS = 20
"""Rows a bin must calibrate on; below that its interval is that of all rows."""


def kernel_table_paths(directory: Path, operator: str) -> dict[str, Path]:
    """Tables of an operator in a directory, by device.

    Parameters
    ----------
    directory : Path
        Where the tables lie.
    operator : str
        What follows the device in the name: ``gemm``, ``moe`` or ``attention_prefill``.

    Returns
    -------
    dict
        Device id to path, sorted by device; ``<device>_<operator>_bf16.csv`` or the same with ``.gz``.

    Raises
    ------
    FormatError
        If there is no such directory, or no table of the operator in it.
    """
    suffixes = (f"_{operator}_bf16.csv.gz", f"_{operator}_bf16.csv")
    found: dict[str, Path] = {}
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            suffix = next((suffix for suffix in suffixes if path.name.endswith(suffix)), None)
            if suffix is not None and path.is_file():
                found.setdefault(path.name.removesuffix(suffix), path)
    if not found:
        what = f"no table is called *{suffixes[0]}" if directory.is_dir() else "there is no such folder"
        raise _format_error("E-FMT-001", directory, what, "give the folder that holds the kernel tables")
    return found


def read_kernel_table(path: Path, columns: Mapping[str, ColumnKind]) -> dict[str, npt.NDArray[Any]]:
    """Read a table of kernel times, packed (``.gz``) or not.

    Parameters
    ----------
    path : Path
        A CSV file with a header.
    columns : mapping
        The columns it must have, in any order, and no others: name to kind.

    Returns
    -------
    dict
        Column to array of shape (n_rows,): int64 for counts, float64 for positive numbers, str for text.

    Raises
    ------
    FormatError
        If the file cannot be read, has other columns, no rows, or a value of the wrong kind; with its line.
    """
    reader = csv.reader(io.StringIO(_table_text(path), newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        remedy = "write it as comma-separated values"
        raise _format_error("E-FMT-013", path, f"line is not CSV: {error}", remedy, reader.line_num) from None
    if len(rows) < 2:
        raise _format_error("E-FMT-002", path, "the table has no rows", "give a table with a header and rows")
    header = [name.strip() for name in rows[0][1]]
    _check_header(path, header, columns)
    body = rows[1:]
    for line, row in body:
        if len(row) != len(header):
            message = f"{len(row)} values in a table of {len(header)} columns"
            raise _format_error("E-FMT-013", path, message, "give every row one value per column", line)
    lines = [line for line, _ in body]
    return {
        name: _column(path, name, kind, [row[header.index(name)] for _, row in body], lines)
        for name, kind in columns.items()
    }


def _table_text(path: Path) -> str:
    try:
        packed = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(packed)) as stream:
                packed = stream.read(TABLE_BYTES + 1)
        if len(packed) > TABLE_BYTES:
            message = f"the table is larger than {TABLE_BYTES // 2**20} MiB"
            raise _format_error("E-FMT-003", path, message, "split it")
        return packed.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _format_error("E-FMT-004", path, "the table is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip reports a damaged file as any of the three
        message = f"the table cannot be read: {getattr(error, 'strerror', None) or error}"
        raise _format_error("E-FMT-001", path, message, "give a CSV file, or one packed with gzip") from None


def _check_header(path: Path, header: Sequence[str], columns: Mapping[str, ColumnKind]) -> None:
    problems = []
    for name in dict.fromkeys(header):
        if name not in columns:
            near = nearest_name(name, columns)
            remedy = f"did you mean {near!r}?" if near else f"the columns are {', '.join(columns)}"
            problems.append(Problem("E-SCN-001", f"no column is called {name!r}", remedy, str(path), 1, name or None))
        elif header.count(name) > 1:
            problems.append(Problem("E-FMT-007", "the column is given twice", "keep one", str(path), 1, name))
    missing = [name for name in columns if name not in header]
    problems += [Problem("E-SCN-002", "the column is missing", "add it", str(path), 1, name) for name in missing]
    if problems:
        raise FormatError(problems)


def _column(path: Path, name: str, kind: ColumnKind, texts: list[str], lines: Sequence[int]) -> npt.NDArray[Any]:
    if kind == "text":
        return np.array(texts)
    try:
        values = np.array(texts, dtype=np.float64)
    except ValueError:
        line, text = next((line, text) for line, text in zip(lines, texts, strict=True) if not _is_number(text))
        raise _format_error("E-SCN-006", path, f"{text!r} is not a number", "write a number", line, name) from None
    is_legal = np.isfinite(values) & (values > 0)
    if kind == "count":
        is_legal &= (values == np.floor(values)) & (values < 2.0**53)
    if not is_legal.all():
        first = int(np.argmin(is_legal))
        remedy = "write a whole number of at least 1" if kind == "count" else "write a finite number above 0"
        raise _format_error("E-SCN-007", path, f"found {texts[first]!r}", remedy, lines[first], name)
    return values.astype(np.int64) if kind == "count" else values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _format_error(
    code: str, path: Path, message: str, remedy: str, line: int | None = None, field: str | None = None
) -> FormatError:
    return FormatError([Problem(code, message, remedy, str(path), line, field)])


def fold_of_rows(keys: Sequence[npt.ArrayLike], folds: int = 5, seed: int = 0) -> IntArray:
    """Fold of every row, the same for all rows of one shape.

    Parameters
    ----------
    keys : sequence of array_like of shape (n_rows,)
        Columns that make the shape: (n, k) for GEMM; (hidden, inter, topk, experts, tp, ep, kernel) for MoE; (heads,
        kv heads, head size) for attention.
    folds : int, optional
        Number of folds, >= 2.
    seed : int, optional
        Another seed, other folds.

    Returns
    -------
    ndarray of shape (n_rows,)
        Fold, 0 to folds − 1.

    Notes
    -----
    The fold is a hash of seed and shape, so it depends neither on the order of the rows nor on which others there are:
    a shape is in the same fold on every device.

    Examples
    --------
    >>> fold_of_rows([[64, 64, 128], [32, 32, 32]], folds=5, seed=0).tolist()
    [0, 0, 3]
    """
    columns = [np.asarray(key) for key in keys]
    if folds < 2 or not columns or any(column.shape != columns[0].shape for column in columns):
        raise ValueError(f"fold_of_rows needs at least 2 folds and keys of one length, got folds = {folds}")
    fold_of_shape: dict[tuple[object, ...], int] = {}
    result = np.empty(columns[0].size, dtype=np.int64)
    for row, shape in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if shape not in fold_of_shape:
            digest = hashlib.blake2b(f"{seed}:{shape!r}".encode(), digest_size=8).digest()
            fold_of_shape[shape] = int.from_bytes(digest, "big") % folds
        result[row] = fold_of_shape[shape]
    return result


@dataclass(frozen=True)
class ErrorStatistics:
    """Errors predicted / measured − 1 of ``count`` rows, as fractions.

    ``median`` and ``p90`` of the absolute error; ``bias`` the median of the signed one. NaN where there is no row.
    """

    median: float
    p90: float
    bias: float
    count: int

    def __str__(self) -> str:
        """Median / 90th percentile (bias, rows), as people read them."""
        return f"{self.median:.1%} / {self.p90:.1%} (bias {self.bias:+.1%}, {self.count} rows)"


def error_statistics(predicted: npt.ArrayLike, measured: npt.ArrayLike) -> ErrorStatistics:
    """Errors of predicted times.

    Parameters
    ----------
    predicted, measured : array_like of shape (n_rows,)
        Times in the same unit, > 0.

    Returns
    -------
    ErrorStatistics
        Median, 90th percentile, bias and number of rows.

    Examples
    --------
    >>> str(error_statistics([11.0, 9.5, 10.0], [10.0, 10.0, 10.0]))
    '5.0% / 9.0% (bias +0.0%, 3 rows)'
    """
    signed = np.asarray(predicted, dtype=np.float64) / np.asarray(measured, dtype=np.float64) - 1.0
    if signed.size == 0:
        return ErrorStatistics(math.nan, math.nan, math.nan, 0)
    median, p90 = np.quantile(np.abs(signed), [0.5, 0.9])
    return ErrorStatistics(float(median), float(p90), float(np.median(signed)), int(signed.size))


def log_bin_edges(sizes: npt.ArrayLike, num_bins: int = 8) -> FloatArray:
    """Inner edges that part sizes (times, FLOPs, ...) into bins of equally many rows.

    Parameters
    ----------
    sizes : array_like of shape (n_rows,)
        What is binned, usually the predicted time.
    num_bins : int, optional
        Number of bins.

    Returns
    -------
    ndarray of shape (at most num_bins - 1,)
        Edges, increasing.
    """
    return np.unique(np.quantile(np.asarray(sizes, dtype=np.float64), np.arange(1, num_bins) / num_bins))


def half_widths_of_bins(
    log_errors: npt.ArrayLike, sizes: npt.ArrayLike, edges: npt.ArrayLike, *, level: float = 0.9
) -> FloatArray:
    """Half width of the interval of log(measured / predicted) in each bin of size.

    Parameters
    ----------
    log_errors : array_like of shape (n_rows,)
        Values of log(measured / predicted) of rows that were not fitted on.
    sizes : array_like of shape (n_rows,)
        What is binned.
    edges : array_like of shape (n_bins - 1,)
        Inner edges, increasing; a size on an edge belongs to the bin above.
    level : float, optional
        Share of rows the interval is to cover.

    Returns
    -------
    ndarray of shape (n_bins,)
        Half widths: measured lies in predicted × exp(± width) with probability >= level.

    Notes
    -----
    The ceil((n + 1) level)-th smallest of the n absolute errors. Exact if rows are exchangeable; rows of one shape are
    not independent of each other, so coverage is checked, not promised. A bin of too few rows takes that of all rows.
    """
    scores = np.abs(np.asarray(log_errors, dtype=np.float64))
    bins = np.searchsorted(np.asarray(edges), np.asarray(sizes), side="right")
    overall = _conformal_quantile(scores, level)
    widths = [scores[bins == index] for index in range(np.asarray(edges).size + 1)]
    return np.array([_conformal_quantile(part, level) if part.size >= MINIMUM_BIN_ROWS else overall for part in widths])


def _conformal_quantile(scores: FloatArray, level: float) -> float:
    if scores.size == 0:
        return math.inf
    rank = min(math.ceil((scores.size + 1) * level), scores.size)
    return float(np.partition(scores, rank - 1)[rank - 1])


def conformal_half_widths(
    log_errors: npt.ArrayLike,
    folds: npt.ArrayLike,
    *,
    sizes: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    num_bins: int = 8,
    level: float = 0.9,
) -> FloatArray:
    """Half width of the interval of every row, calibrated on the rows of the other folds only.

    Parameters
    ----------
    log_errors : array_like of shape (n_rows,)
        Values of log(measured / predicted), every row predicted by a fit that did not see its fold.
    folds : array_like of shape (n_rows,)
        Fold of every row, as :func:`fold_of_rows` gives it.
    sizes : array_like of shape (n_rows,), optional
        What bins are made of, usually the predicted time; one bin without it.
    groups : array_like of shape (n_rows,), optional
        Rows of one group are calibrated on rows of that group only.
    num_bins : int, optional
        Bins of equally many rows.
    level : float, optional
        Share of rows to cover.

    Returns
    -------
    ndarray of shape (n_rows,)
        Half widths of log(measured / predicted), the same for all rows of a fold, group and bin.

    Examples
    --------
    >>> errors = np.tile([-0.2, -0.1, 0.1, 0.1], 50)
    >>> np.unique(conformal_half_widths(errors, np.arange(200) % 5, level=0.7)).tolist()
    [0.1]
    """
    errors, fold = np.asarray(log_errors, dtype=np.float64), np.asarray(folds)
    size = np.zeros_like(errors) if sizes is None else np.asarray(sizes, dtype=np.float64)
    group = np.zeros(errors.size) if groups is None else np.asarray(groups)
    widths = np.full(errors.shape, math.inf)  # of a group that no other fold has
    for held_out, member in product(np.unique(fold), np.unique(group)):
        is_in, is_out = (fold == held_out) & (group == member), (fold != held_out) & (group == member)
        if is_in.any() and is_out.any():
            edges = np.empty(0) if sizes is None else log_bin_edges(size[is_out], num_bins)
            of_bins = half_widths_of_bins(errors[is_out], size[is_out], edges, level=level)
            widths[is_in] = of_bins[np.searchsorted(edges, size[is_in], side="right")]
    return widths


def coverage(log_errors: npt.ArrayLike, half_widths: npt.ArrayLike) -> float:
    """Share of rows whose measured time lies inside the interval; NaN without rows."""
    is_inside = np.abs(np.asarray(log_errors)) <= np.asarray(half_widths)
    return float(np.mean(is_inside)) if is_inside.size else math.nan
