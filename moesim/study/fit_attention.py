"""Fit of the attention surface on a table of measured times: formula first, then its residual grids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, astuple, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.attention_surface import (
    TILE,
    AttentionParameters,
    AttentionShapes,
    AttentionTimeSurface,
    attention_coordinates,
    attention_formula_time_s,
    attention_time_s,
)
from moesim.structure.columns import FloatArray, IntArray
from moesim.study.fit_grids import HUBER_LIMIT, PROBE_PAIRS, PROBE_STEP, GridProbes, fit_residual_grids, limits
from moesim.study.kernel_tables import fold_of_rows

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
        With an empty interval; :func:`~moesim.study.fit_grids.with_interval` adds one from held-out errors.
    """
    parameters = _fit_formula(shapes, time_s, figures)
    surface = AttentionTimeSurface(
        device=device,
        peak_flop_per_s=figures.peak_flop_per_s,
        memory_bytes_per_s=figures.memory_bytes_per_s,
        compute_units=figures.compute_units,
        parameters=parameters,
        grids=(),
        domain={name: limits(getattr(shapes, name)) for name in DOMAIN_FIELDS},
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


def _fit_formula(shapes: AttentionShapes, time_s: FloatArray, figures: DeviceFigures) -> AttentionParameters:
    """Robust least squares of log(formula / measured); what the table does not determine keeps its first guess."""
    from scipy.optimize import least_squares

    fitted = sum(one.default is MISSING for one in fields(AttentionParameters))
    scale, low, high = (np.array(astuple(item)[:fitted]) for item in (FIRST_GUESS, LOWER, UPPER))
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
