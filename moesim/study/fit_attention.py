"""Fit of the attention surface on a table of measured times: formula first, then its residual grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.attention_surface import (
    TILE,
    AttentionParameters,
    AttentionShapes,
    AttentionTimeSurface,
    ResidualGrid,
    attention_coordinates,
    attention_formula_time_s,
    attention_time_s,
    grid_corners,
)
from moesim.structure.columns import FloatArray, IntArray
from moesim.study.kernel_tables import fold_of_rows, half_widths_of_bins, log_bin_edges

DOMAIN_FIELDS = ("batch", "sequence", "heads", "kv_heads", "head_size")

FIRST_GUESS = AttentionParameters(11e-6, 0.55, 0.8, 0.9, 0.9, 1.5, 3e-6, 0.4, 2e-11, 2e7, 1.5)
LOWER = AttentionParameters(1e-6, 0.1, 0.3, 0.3, 0.3, 0.0, 1e-8, 0.0, 0.0, 1e5, 1.0)
UPPER = AttentionParameters(3e-5, 1.0, 1.2, 1.2, 1.2, 10.0, 2e-5, 20.0, 5e-9, 5e8, 6.0)
"""Where the search starts and what it may not leave: physics (fractions of a peak) or far beyond every device."""

GRID_AXES: tuple[tuple[str, ...], ...] = (
    ("sequence", "batch_heads", "head_size"),
    ("sequence", "batch", "group"),
    ("working_set", "group"),
)
KNOTS: dict[str, tuple[float, ...]] = {
    "sequence": (0, 4, 6, 7, 8, 9, 10, 11, 12, 14),
    "batch_heads": (0, 2, 4, 6, 8, 10, 14),
    "batch": (0, 2, 4, 8),
    "group": (0, 1, 3, 6),
    "working_set": (22, 24, 25, 26, 27, 28, 30),
}
"""Binary logarithms; head sizes are those of the table. 398 values with three of them, 468 with four."""

SMOOTHNESS = 0.3
SHRINKAGE = 0.3
"""Ridge on differences of neighbouring values, and on the values, in units of one row."""
HUBER_LIMIT = 0.05
"""Residual of log time above which a row counts less."""
GRID_ROUNDS = 12
STEPS_PER_ROUND = 80
PULL = 500.0
"""Rounds of weighing rows, steps within each, and the stiffness that sets how fast they converge, not where to."""
RISE_MARGIN = 2e-5
PROBE_PAIRS = 30_000
PROBE_STEP = 1.03
"""Pairs of neighbouring shapes probed, and how far apart they are."""


@dataclass(frozen=True)
class DeviceFigures:
    """Datasheet figures a surface is made dimensionless with."""

    peak_flop_per_s: float
    memory_bytes_per_s: float
    compute_units: float


def attention_shapes(table: Mapping[str, npt.NDArray[Any]]) -> AttentionShapes:
    """Shapes of a table's rows.

    Parameters
    ----------
    table : mapping
        Columns of ``ATTENTION_COLUMNS``.

    Returns
    -------
    AttentionShapes
        Arrays of shape (n_rows,).
    """
    names = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim")
    return AttentionShapes(*(table[name].astype(np.float64) for name in names))


def attention_folds(shapes: AttentionShapes, *, folds: int = 5, seed: int = 0) -> IntArray:
    """Fold of every row by whole shape: (heads, kv heads, head size).

    Parameters
    ----------
    shapes : AttentionShapes
        Arrays of shape (n_rows,).
    folds, seed : int, optional
        As :func:`~moesim.study.kernel_tables.fold_of_rows` takes them.

    Returns
    -------
    ndarray of shape (n_rows,)
        Fold of every row.
    """
    keys = [column.astype(np.int64) for column in (shapes.heads, shapes.kv_heads, shapes.head_size)]
    return fold_of_rows(keys, folds=folds, seed=seed)


def select_shapes(shapes: AttentionShapes, is_kept: npt.NDArray[np.bool_]) -> AttentionShapes:
    """Keep some rows.

    Parameters
    ----------
    shapes : AttentionShapes
        Arrays of shape (n_rows,).
    is_kept : ndarray of bool of shape (n_rows,)
        Rows to keep.

    Returns
    -------
    AttentionShapes
        Arrays of shape (n_kept,).
    """
    return AttentionShapes(*(column[is_kept] for column in astuple(shapes)))


def fit_attention(
    device: str, shapes: AttentionShapes, time_s: FloatArray, figures: DeviceFigures, *, has_grids: bool = True
) -> AttentionTimeSurface:
    """Fit formula and residual grids.

    Parameters
    ----------
    device : str
        Device id.
    shapes : AttentionShapes
        Arrays of shape (n_rows,).
    time_s : ndarray of shape (n_rows,)
        Measured times.
    figures : DeviceFigures
        Datasheet figures of the device.
    has_grids : bool, optional
        Whether to fit the grids too.

    Returns
    -------
    AttentionTimeSurface
        With an empty interval; :func:`with_interval` adds one from held-out errors.
    """
    parameters = _fit_formula(shapes, time_s, figures)
    surface = AttentionTimeSurface(
        device=device,
        peak_flop_per_s=figures.peak_flop_per_s,
        memory_bytes_per_s=figures.memory_bytes_per_s,
        compute_units=figures.compute_units,
        parameters=parameters,
        grids=(),
        domain={name: _range(getattr(shapes, name)) for name in DOMAIN_FIELDS},
        interval_edges_s=np.empty(0),
        interval_half_widths=np.array([math.inf]),
    )
    if not has_grids:
        return surface
    log_errors = np.log(time_s / attention_time_s(surface, shapes))
    probes = _attention_probes(surface, shapes)
    coordinates = attention_coordinates(shapes)
    knots = {**KNOTS, "head_size": np.unique(coordinates["head_size"]).tolist()}
    grids = fit_residual_grids(GRID_AXES, knots, coordinates, log_errors, probes)
    return replace(surface, grids=grids)


def held_out_attention_times_s(
    device: str, shapes: AttentionShapes, time_s: FloatArray, figures: DeviceFigures, folds: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Times of all rows, each predicted by a fit that did not see its fold.

    Parameters
    ----------
    device : str
        Device id.
    shapes : AttentionShapes
        Arrays of shape (n_rows,).
    time_s : ndarray of shape (n_rows,)
        Measured times.
    figures : DeviceFigures
        Datasheet figures of the device.
    folds : ndarray of shape (n_rows,)
        Fold of every row.

    Returns
    -------
    predicted_s, formula_s : ndarray of shape (n_rows,)
        Seconds with the grids, and of the formula alone.
    """
    predicted_s, formula_s = np.empty_like(time_s), np.empty_like(time_s)
    for fold in np.unique(folds):
        is_out = folds == fold
        surface = fit_attention(device, select_shapes(shapes, ~is_out), time_s[~is_out], figures)
        left_out = select_shapes(shapes, is_out)
        predicted_s[is_out] = attention_time_s(surface, left_out)
        formula_s[is_out] = attention_time_s(replace(surface, grids=()), left_out)
    return predicted_s, formula_s


def with_interval(
    surface: AttentionTimeSurface, predicted_s: FloatArray, time_s: FloatArray, *, num_bins: int = 8
) -> AttentionTimeSurface:
    """Give a surface its 90 % interval.

    Parameters
    ----------
    surface : AttentionTimeSurface
        Fitted on all rows.
    predicted_s, time_s : ndarray of shape (n_rows,)
        Held-out predictions and measured times.
    num_bins : int, optional
        Bins of predicted time.

    Returns
    -------
    AttentionTimeSurface
        The same with edges and half widths.
    """
    edges = log_bin_edges(predicted_s, num_bins)
    widths = half_widths_of_bins(np.log(time_s / predicted_s), predicted_s, edges)
    return replace(surface, interval_edges_s=edges, interval_half_widths=widths)


def _range(values: FloatArray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _fit_formula(shapes: AttentionShapes, time_s: FloatArray, figures: DeviceFigures) -> AttentionParameters:
    """Robust least squares of log(formula / measured); what the table does not determine keeps its first guess."""
    from scipy.optimize import least_squares

    scale, low, high = (np.array(astuple(item)) for item in (FIRST_GUESS, LOWER, UPPER))
    log_time = np.log(time_s)

    def residuals(point: FloatArray) -> FloatArray:
        parameters = AttentionParameters(*(point * scale).tolist())
        formula_s = attention_formula_time_s(
            parameters,
            shapes,
            peak_flop_per_s=figures.peak_flop_per_s,
            memory_bytes_per_s=figures.memory_bytes_per_s,
            compute_units=figures.compute_units,
        )
        prior = 0.01 * (point - 1.0)  # so weak that it acts only on what no row determines
        return np.concatenate([np.log(formula_s) - log_time, prior])

    start = np.ones_like(scale)
    bounds = (low / scale, high / scale)
    found = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=HUBER_LIMIT, max_nfev=80)
    return AttentionParameters(*(found.x * scale).tolist())


@dataclass(frozen=True)
class GridProbes:
    """Points between which the predicted time may not fall; coordinates as a grid's axes, of shape (n_points,).

    ``log_time_s`` is the formula's; ``low`` and ``high`` index pairs of points, the second of which costs no less.
    """

    coordinates: Mapping[str, FloatArray]
    log_time_s: FloatArray
    low: IntArray
    high: IntArray


def fit_residual_grids(
    grid_axes: Sequence[tuple[str, ...]],
    knots: Mapping[str, Sequence[float]],
    coordinates: Mapping[str, FloatArray],
    log_errors: FloatArray,
    probes: GridProbes,
) -> tuple[ResidualGrid, ...]:
    """Fit grids that add up to log(measured / formula) and keep the predicted time from falling.

    Parameters
    ----------
    grid_axes : sequence of tuple of str
        Axes of each grid.
    knots : mapping
        Knots by axis; those far outside the data are left out.
    coordinates : mapping
        Arrays of shape (n_rows,) by axis.
    log_errors : ndarray of shape (n_rows,)
        Values of log(measured / formula).
    probes : GridProbes
        Where the time may not fall.

    Returns
    -------
    tuple of ResidualGrid
        One grid per entry of ``grid_axes``.

    Notes
    -----
    Ridge on values and on differences of neighbours, Huber weights on rows, and for every pair of probes the constraint
    that the time does not fall.
    """
    kept = {axis: _reached_knots(np.array(knots[axis], dtype=np.float64), coordinates[axis]) for axis in knots}
    grids = [tuple(kept[axis] for axis in axes) for axes in grid_axes]
    sizes = [math.prod(axis.size for axis in grid) for grid in grids]
    design = _design(grid_axes, grids, coordinates)
    at_probes = _design(grid_axes, grids, probes.coordinates)
    rises = at_probes[probes.high] - at_probes[probes.low]
    slopes = probes.log_time_s[probes.high] - probes.log_time_s[probes.low]
    values = _constrained_values(design, log_errors, _ridge(grids), rises=rises, slopes=slopes)
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return tuple(
        ResidualGrid(axes, grid, part.reshape([axis.size for axis in grid]))
        for axes, grid, part in zip(grid_axes, grids, parts, strict=True)
    )


def _constrained_values(
    design: Any, log_errors: FloatArray, ridge: FloatArray, *, rises: Any, slopes: FloatArray
) -> FloatArray:
    """Robust ridge regression under rises @ values + slopes >= margin, by the alternating direction method.

    Every round weighs the rows anew and factors the normal equations once; within it, ``steps`` are the rises the
    constraint allows and ``duals`` what it pulls with (scaled by PULL), both carried on to the next round.
    """
    from scipy.linalg import cho_factor, cho_solve

    values, weight = np.zeros(ridge.shape[0]), np.ones_like(log_errors)
    least = RISE_MARGIN - slopes
    steps, duals = np.maximum(least, 0.0), np.zeros_like(slopes)
    pulling = PULL * (rises.T @ rises).toarray()
    for _ in range(GRID_ROUNDS):
        weighted = design.T.multiply(weight)
        factor = cho_factor((weighted @ design).toarray() + ridge + pulling)
        right = weighted @ log_errors
        for _ in range(STEPS_PER_ROUND):
            values = cho_solve(factor, right + PULL * (rises.T @ (steps - duals)))
            rise = rises @ values
            steps = np.maximum(rise + duals, least)
            duals += rise - steps
        weight = np.minimum(1.0, HUBER_LIMIT / np.maximum(np.abs(log_errors - design @ values), 1e-9))
    return values


def _reached_knots(knots: FloatArray, found: FloatArray) -> FloatArray:
    """Knots within the data, and the next one on either side."""
    first = max(int(np.searchsorted(knots, found.min(), side="right")) - 1, 0)
    last = min(int(np.searchsorted(knots, found.max(), side="left")), knots.size - 1)
    return knots[first : last + 1]


def _design(
    grid_axes: Sequence[tuple[str, ...]], grids: Sequence[tuple[FloatArray, ...]], coordinates: Mapping[str, FloatArray]
) -> Any:
    """Sparse matrix of shape (n_points, n_values): what each value adds to the log time of each point."""
    from scipy.sparse import csr_array, hstack

    blocks = []
    for axes, grid in zip(grid_axes, grids, strict=True):
        corners = grid_corners(grid, [coordinates[axis] for axis in axes])
        points, num_corners = corners.index.shape
        rows = np.repeat(np.arange(points), num_corners)
        shape = (points, math.prod(axis.size for axis in grid))
        blocks.append(csr_array((corners.weight.ravel(), (rows, corners.index.ravel())), shape=shape))
    return hstack(blocks, format="csr")


def _ridge(grids: Sequence[tuple[FloatArray, ...]]) -> FloatArray:
    from scipy.linalg import block_diag

    blocks = []
    for grid in grids:
        shape = [axis.size for axis in grid]
        index = np.arange(math.prod(shape)).reshape(shape)
        block = SHRINKAGE * np.eye(index.size)
        for axis in range(len(shape)):
            low = np.take(index, range(shape[axis] - 1), axis).ravel()
            high = np.take(index, range(1, shape[axis]), axis).ravel()
            difference = np.zeros((low.size, index.size))
            difference[np.arange(low.size), low] = -1.0
            difference[np.arange(low.size), high] = 1.0
            block += SMOOTHNESS * difference.T @ difference
        blocks.append(block)
    return np.asarray(block_diag(*blocks))


def _attention_probes(surface: AttentionTimeSurface, shapes: AttentionShapes) -> GridProbes:
    """Pairs of close neighbours along batch and along sequence, anywhere between the table's shapes."""
    generator = np.random.default_rng(0)
    layers = np.unique(np.stack([shapes.heads, shapes.kv_heads, shapes.head_size]), axis=1)
    layers = layers[:, (layers.shape[1] * generator.random(PROBE_PAIRS) ** 2).astype(np.int64)]  # few heads more often
    batch = 2.0 ** _at_knots_or_between(generator, 8.0)
    sequence = 2.0 ** _at_knots_or_between(generator, 14.0)
    sequence = np.where(sequence > TILE, TILE * np.ceil(sequence / TILE), sequence)
    is_longer = np.arange(PROBE_PAIRS) % 2 == 0
    longer = np.where(sequence > TILE, np.maximum(sequence + TILE, PROBE_STEP * sequence), PROBE_STEP * sequence)
    ends = (
        (batch, sequence),
        (np.where(is_longer, batch, PROBE_STEP * batch), np.where(is_longer, longer, sequence)),
    )
    columns = [np.concatenate([low, high]) for low, high in zip(*ends, strict=True)]
    probes = AttentionShapes(*columns, *np.concatenate([layers, layers], axis=1))
    index = np.arange(PROBE_PAIRS)
    log_time_s = np.log(attention_time_s(surface, probes))
    return GridProbes(attention_coordinates(probes), log_time_s, index, index + PROBE_PAIRS)


def _at_knots_or_between(generator: np.random.Generator, highest: float) -> FloatArray:
    """Binary logarithms of sizes, half of them whole: slopes along one axis are extreme at knots of the others."""
    logs = highest * generator.random(PROBE_PAIRS) ** 1.5
    return np.where(generator.random(PROBE_PAIRS) < 0.5, np.floor(logs), logs)
