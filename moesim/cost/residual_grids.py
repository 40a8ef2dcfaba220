"""Residual grids of fitted surfaces: multilinear interpolation, their JSON form, and the domain they were fitted in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from moesim.structure.columns import FloatArray, IntArray


@dataclass(frozen=True)
class ResidualGrid:
    """Values of log(measured / formula) on a grid, multilinear between knots and constant outside them.

    Attributes
    ----------
    axes : tuple of str
        Names of the coordinates.
    knots : tuple of ndarray
        Increasing knots of each axis.
    values : ndarray
        One value per knot of every axis.
    """

    axes: tuple[str, ...]
    knots: tuple[FloatArray, ...]
    values: FloatArray


class GridDocument(TypedDict):
    """A residual grid as JSON holds it."""

    axes: list[str]
    knots: list[list[float]]
    values: list[float]


class IntervalDocument(TypedDict):
    """Edges of predicted time and half widths of log(measured / predicted), as JSON holds them."""

    level: float
    edges_s: list[float]
    half_widths: list[float]


def grids_from_documents(documents: Sequence[GridDocument]) -> tuple[ResidualGrid, ...]:
    """Build grids from what JSON holds.

    Parameters
    ----------
    documents : sequence of dict
        As ``json.load`` gives them.

    Returns
    -------
    tuple of ResidualGrid
        The grids.
    """
    grids = []
    for grid in documents:
        knots = tuple(np.array(axis, dtype=np.float64) for axis in grid["knots"])
        values = np.array(grid["values"], dtype=np.float64).reshape([axis.size for axis in knots])
        grids.append(ResidualGrid(tuple(grid["axes"]), knots, values))
    return tuple(grids)


@dataclass(frozen=True)
class GridCorners:
    """Corners that surround points of a grid, and the weight of each; corners along the last axis."""

    index: IntArray
    weight: FloatArray


def grid_corners(knots: tuple[FloatArray, ...], coordinates: list[FloatArray]) -> GridCorners:
    """Corners of multilinear interpolation, clamped to the grid.

    Parameters
    ----------
    knots : tuple of ndarray
        Increasing knots of each of the n axes; an axis of one knot is constant.
    coordinates : list of ndarray
        One array of shape (...,) per axis.

    Returns
    -------
    GridCorners
        Flat indices and weights, each of shape (..., 2^n).

    Examples
    --------
    >>> corners = grid_corners((np.array([0.0, 4.0]),), [np.array([1.0, 9.0])])
    >>> corners.weight.tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    lows, highs, fractions = [], [], []
    for axis, coordinate in zip(knots, coordinates, strict=True):
        clamped = np.clip(coordinate, axis[0], axis[-1])
        low = np.clip(np.searchsorted(axis, clamped, side="right") - 1, 0, max(axis.size - 2, 0))
        high = np.minimum(low + 1, axis.size - 1)
        width = np.where(high > low, axis[high] - axis[low], 1.0)
        lows.append(low)
        highs.append(high)
        fractions.append((clamped - axis[low]) / width)
    strides = [prod(axis.size for axis in knots[position + 1 :]) for position in range(len(knots))]
    index, weight = [], []
    for corner in product((False, True), repeat=len(knots)):
        ends = [highs[axis] if is_high else lows[axis] for axis, is_high in enumerate(corner)]
        shares = [fractions[axis] if is_high else 1.0 - fractions[axis] for axis, is_high in enumerate(corner)]
        index.append(sum((stride * end for stride, end in zip(strides, ends, strict=True)), np.int64(0)))
        weight.append(prod(shares, start=np.float64(1.0)))
    return GridCorners(np.stack(np.broadcast_arrays(*index), axis=-1), np.stack(np.broadcast_arrays(*weight), axis=-1))


def residual(grids: Sequence[ResidualGrid], coordinates: Mapping[str, FloatArray]) -> FloatArray:
    """Sum of grids at some points: log of the time over the formula's.

    Parameters
    ----------
    grids : sequence of ResidualGrid
        Grids over some of the coordinates.
    coordinates : mapping
        Arrays that broadcast to (...,), by axis.

    Returns
    -------
    ndarray of shape (...,)
        Values.
    """
    total: FloatArray = np.zeros(np.broadcast_shapes(*(np.shape(value) for value in coordinates.values())))
    for grid in grids:
        corners = grid_corners(grid.knots, list(np.broadcast_arrays(*(coordinates[axis] for axis in grid.axes))))
        total = total + np.sum(grid.values.ravel()[corners.index] * corners.weight, axis=-1)
    return total


def is_within(domain: Mapping[str, tuple[float, float]], shapes: object) -> npt.NDArray[np.bool_]:
    """Whether the fields of shapes lie between the smallest and the largest fitted value, each by itself."""
    is_inside = np.asarray(True)
    for name, (low, high) in domain.items():
        value = getattr(shapes, name)
        is_inside = is_inside & (value >= low) & (value <= high)
    return np.asarray(is_inside)
