"""Fit residual grids that keep the predicted time from falling, and the interval of what then remains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from moesim.cost.attention_surface import AttentionTimeSurface
from moesim.cost.moe_surface import MoeTimeSurface
from moesim.cost.residual_grids import ResidualGrid, grid_corners
from moesim.structure.columns import FloatArray, IntArray
from moesim.study.kernel_tables import half_widths_of_bins, log_bin_edges

Surface = TypeVar("Surface", AttentionTimeSurface, MoeTimeSurface)

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
    *,
    row_weights: FloatArray | None = None,
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
    row_weights : ndarray of shape (n_rows,), optional
        How often each row counts; once if not given.

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
    counted = np.ones_like(log_errors) if row_weights is None else row_weights
    values = _constrained_values(design, log_errors, counted, _ridge(grids), rises=rises, slopes=slopes)
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return tuple(
        ResidualGrid(axes, grid, part.reshape([axis.size for axis in grid]))
        for axes, grid, part in zip(grid_axes, grids, parts, strict=True)
    )


def _constrained_values(
    design: Any, log_errors: FloatArray, counted: FloatArray, ridge: FloatArray, *, rises: Any, slopes: FloatArray
) -> FloatArray:
    """Robust ridge regression under rises @ values + slopes >= margin, by the alternating direction method.

    Every round weighs the rows anew, each ``counted`` times, and factors the normal equations once; within it,
    ``steps`` are the rises the constraint allows and ``duals`` what it pulls with (scaled by PULL), both carried on to
    the next round.
    """
    from scipy.linalg import cho_factor, cho_solve

    values, weight = np.zeros(ridge.shape[0]), counted
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
        weight = counted * np.minimum(1.0, HUBER_LIMIT / np.maximum(np.abs(log_errors - design @ values), 1e-9))
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


def with_interval(surface: Surface, predicted_s: FloatArray, time_s: FloatArray, *, num_bins: int = 8) -> Surface:
    """Give a surface its 90 % interval.

    Parameters
    ----------
    surface : AttentionTimeSurface or MoeTimeSurface
        Fitted on all rows.
    predicted_s, time_s : ndarray of shape (n_rows,)
        Held-out predictions and measured times.
    num_bins : int, optional
        Bins of predicted time.

    Returns
    -------
    AttentionTimeSurface or MoeTimeSurface
        The same with edges and half widths.
    """
    edges = log_bin_edges(predicted_s, num_bins)
    widths = half_widths_of_bins(np.log(time_s / predicted_s), predicted_s, edges)
    return replace(surface, interval_edges_s=edges, interval_half_widths=widths)


def limits(values: FloatArray) -> tuple[float, float]:
    """Smallest and largest value."""
    return float(values.min()), float(values.max())
