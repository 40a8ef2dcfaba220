"""Fit GEMM surfaces to a table of measured times: the formula by least squares, then a grid that keeps it monotone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.gemm_surface import (
    CHUNK,
    Domain,
    GemmCore,
    GemmMachine,
    GemmSurface,
    ResidualGrid,
    Spread,
    candidate_times_s,
    core_time_s,
    gemm_surface_from_json,
    grid_corners,
    grid_value,
)
from moesim.describe.hardware_library import HardwareLibrary
from moesim.study.kernel_tables import (
    BoolArray,
    ErrorStatistics,
    FloatArray,
    IntArray,
    error_statistics,
    fold_of_rows,
    half_widths_of_bins,
    log_bin_edges,
)

SOURCE = "NVIDIA aiconfigurator kernel tables (Apache-2.0)"
KNOTS = ((0.0, 4.0, 6.0, 7.0, 8.0, 9.0, 11.0, 13.0), (6.0, 8.0, 10.0, 12.0, 14.0), (6.0, 8.0, 10.0, 12.0, 14.0))
"""Knots of log2 m, n, k: 200 numbers. More knots gain less than 0.3 points of error."""
START_AND_LIMITS: dict[str, tuple[float, float, float]] = {
    "launch_s": (2.5e-6, 3e-7, 2e-5),
    "compute_fraction": (0.8, 0.2, 1.0),
    "memory_fraction": (0.8, 0.2, 1.0),
    "chunk_latency_s": (1e-7, 5e-9, 2e-6),
    "prologue_length": (100.0, 1.0, 1000.0),
    "split_s": (2.5e-6, 5e-8, 2e-5),
    "wave_softness": (0.8, 0.02, 1.0),
    "tile_softness": (0.5, 0.05, 1.0),
    "overlap_exponent": (2.5, 1.1, 8.0),
    "l2_ratio": (8.0, 0.5, 60.0),
    "cached_activations": (0.6, 0.02, 1.0),
    "cached_weights": (0.9, 0.05, 1.0),
    "cache_start": (0.5, 0.05, 5.0),
    "cache_width": (1.0, 0.02, 10.0),
}
"""Start, least and largest value of every constant; the softnesses stay above 0 so that growth shows in the slope."""
HARD_WAVES = {"wave_softness": 0.05, "overlap_exponent": 4.5, "l2_ratio": 2.0, "prologue_length": 240.0}
"""A second start: whole waves and L2 traffic, as on Ampere. The loss has a minimum near each."""
NOT_PORTABLE = {
    "tile_softness": 0.05,
    "l2_ratio": 1e6,
    "cached_activations": 1.0,
    "cached_weights": 1.0,
    "cache_start": 1.0,
    "cache_width": 1.0,
}
"""Constants of the core that travels between generations: neither L2 traffic nor cached operands."""
ERROR_SCALE = 0.05
"""|log error| beyond which a row counts linearly instead of quadratically: bad library picks are 0.3 and more."""
FIT_ROWS = 3000
"""Rows the formula is fitted on; 14 constants gain nothing from more."""
SPREAD_BINS = 8
GRID_DECIMALS = 5
"""Decimals of the grid's values. Its limits are rounded down to them, so that rounding keeps them."""
NEARLY_BEST = 1.02
"""Candidates this near to the fastest have their slope counted too: they are the fastest at points not probed."""
BEYOND = 6.0
"""Octaves beyond the last knots to which the formula's slope is probed as well: there the grid stays what it is."""


@dataclass(frozen=True)
class GemmTable:
    """Rows of a table, arrays (n_rows,): sizes and measured seconds."""

    m: FloatArray
    n: FloatArray
    k: FloatArray
    time_s: FloatArray

    def rows(self, is_kept: BoolArray) -> GemmTable:
        """Rows for which ``is_kept`` holds."""
        return GemmTable(self.m[is_kept], self.n[is_kept], self.k[is_kept], self.time_s[is_kept])

    @property
    def flops(self) -> FloatArray:
        """2 m n k of every row."""
        return 2.0 * self.m * self.n * self.k

    @property
    def is_aligned(self) -> BoolArray:
        """Whether n and k are multiples of 64."""
        return np.asarray((self.n % CHUNK == 0) & (self.k % CHUNK == 0))


def gemm_table(columns: Mapping[str, npt.NDArray[Any]]) -> GemmTable:
    """Rows of what ``read_kernel_table(path, GEMM_COLUMNS)`` returned."""
    m, n, k, time_us = (np.asarray(columns[name], dtype=np.float64) for name in ("m", "n", "k", "time_us"))
    return GemmTable(m, n, k, time_us * 1e-6)


def gemm_folds(table: GemmTable, seed: int, folds: int = 5) -> IntArray:
    """Fold of every row by its (n, k)."""
    return fold_of_rows([table.n.astype(np.int64), table.k.astype(np.int64)], folds, seed)


def machine_of_device(device: str, library: HardwareLibrary | None = None) -> GemmMachine:
    """Datasheet figures of a device's profile, at bf16; its absent L2 cache counts as 1 byte."""
    profile = (library or HardwareLibrary()).device(device)
    return GemmMachine(
        peak_flop_rate=profile.peak_flop_rate["bf16"].value,
        memory_bandwidth=profile.memory_bandwidth.value,
        compute_units=profile.compute_units.value,
        l2_cache_bytes=profile.l2_cache.value if profile.l2_cache else 1.0,
    )


def fit_core(
    table: GemmTable, machine: GemmMachine, seed: int = 0, held: Mapping[str, float] | None = None
) -> GemmCore:
    """Fit the formula's constants to measured times.

    Parameters
    ----------
    table : GemmTable
        Rows to fit on; at most ``FIT_ROWS`` of them, drawn by the seed, are used.
    machine : GemmMachine
        Datasheet figures.
    seed : int, optional
        Seed of the draw.
    held : mapping, optional
        Constants that are not fitted, such as ``NOT_PORTABLE``.

    Returns
    -------
    GemmCore
        Constants that minimise the soft L1 loss of log(predicted / measured), each within its limits.
    """
    from scipy.optimize import least_squares

    chosen = np.random.default_rng(seed).permutation(table.m.size)[:FIT_ROWS]
    m, n, k, log_time = table.m[chosen], table.n[chosen], table.k[chosen], np.log(table.time_s[chosen])
    names = [field.name for field in fields(GemmCore) if field.name not in (held or {})]
    low, high = np.log([START_AND_LIMITS[name][1:] for name in names]).T

    def core(log_constants: FloatArray) -> GemmCore:
        # Rounded, so that what is fitted on top is what the file holds.
        fitted = {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(log_constants), strict=True)}
        return GemmCore(**(held or {}), **fitted)

    def residuals(log_constants: FloatArray) -> FloatArray:
        return (np.log(core_time_s(core(log_constants), machine, m, n, k)) - log_time) / ERROR_SCALE

    starts = {name: limits[0] for name, limits in START_AND_LIMITS.items()}
    solutions = [
        least_squares(
            residuals,
            np.clip(np.log([start[name] for name in names]), low + 1e-6, high - 1e-6),
            bounds=(low, high),
            loss="soft_l1",
            diff_step=[1e-3],
            max_nfev=40,
            x_scale=0.1,
        )
        for start in (starts, starts | HARD_WAVES)
    ]
    return core(min(solutions, key=lambda solution: float(solution.cost)).x)


def fit_surface(table: GemmTable, machine: GemmMachine, *, seed: int = 0, ridge: float = 3.0) -> GemmSurface:
    """Fit formula, grid and misalignment penalties; the spread is that of the fit until held-out errors replace it.

    Parameters
    ----------
    table : GemmTable
        Rows to fit on. Aligned rows make formula and grid, the others the penalties.
    machine : GemmMachine
        Datasheet figures.
    seed : int, optional
        Seed of the rows drawn for the formula.
    ridge : float, optional
        Weight of the squared differences of neighbouring knots, in rows.

    Returns
    -------
    GemmSurface
        The surface.
    """
    aligned = table.rows(table.is_aligned)
    core = fit_core(aligned, machine, seed)
    residual = np.log(aligned.time_s / core_time_s(core, machine, aligned.m, aligned.n, aligned.k))
    corners, weights = grid_corners(KNOTS, aligned.m, aligned.n, aligned.k)
    largest_drop = drop_limits(core, machine, KNOTS)
    values = fit_grid(residual, corners, weights, largest_drop, shape=_grid_shape(KNOTS), ridge=ridge)
    grid = ResidualGrid(*KNOTS, np.round(values, GRID_DECIMALS))
    nothing = Spread((), (0.0,), 0.9)
    without = GemmSurface(machine, core, grid, 1.0, 1.0, _domain(table), nothing, nothing)
    ratio = table.time_s / without.time_s(table.m, table.n, table.k)
    is_n, is_k = table.n % CHUNK == 0, table.k % CHUNK == 0
    penalties = [_penalty(ratio[~is_n & is_k]), _penalty(ratio[is_n & ~is_k])]
    surface = replace(without, penalty_n=penalties[0], penalty_k=penalties[1])
    return with_spread(surface, table, surface.time_s(table.m, table.n, table.k))


def _penalty(ratio: FloatArray) -> float:
    return max(1.0, round(float(np.median(ratio)), 4)) if ratio.size else 1.0


def _domain(table: GemmTable) -> Domain:
    limits = [(float(size.min()), float(size.max())) for size in (table.m, table.n, table.k)]
    return Domain(limits[0], limits[1], limits[2])


def with_spread(surface: GemmSurface, table: GemmTable, predicted_s: FloatArray, level: float = 0.9) -> GemmSurface:
    """Give a surface the spread of predictions, best of rows it was not fitted on."""
    spreads = []
    for is_kept in (table.is_aligned, ~table.is_aligned):
        errors, sizes = np.log(table.time_s / predicted_s)[is_kept], predicted_s[is_kept]
        edges = log_bin_edges(sizes, SPREAD_BINS) if sizes.size else np.empty(0)
        spreads.append(Spread(_rounded(edges), _rounded(half_widths_of_bins(errors, sizes, edges, level=level)), level))
    return replace(
        surface, spread=spreads[0], misaligned_spread=spreads[1] if (~table.is_aligned).any() else spreads[0]
    )


def _rounded(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)


def _grid_shape(knots: Sequence[Sequence[float]]) -> tuple[int, ...]:
    return tuple(len(axis) for axis in knots)


def grid_edges(shape: tuple[int, ...]) -> IntArray:
    """Neighbouring knots, the lower first: flat indices (n_edges, 2), axis after axis."""
    index = np.arange(int(np.prod(shape))).reshape(shape)
    pairs = [
        np.stack([np.delete(index, -1, axis).ravel(), np.delete(index, 0, axis).ravel()], axis=1)
        for axis in range(len(shape))
    ]
    return np.concatenate(pairs)


def drop_limits(
    core: GemmCore, machine: GemmMachine, knots: Sequence[Sequence[float]], *, probes: int = 600, margin: float = 0.85
) -> FloatArray:
    """Largest fall of the grid along each edge that the formula's rise makes good everywhere in the adjacent cells.

    Parameters
    ----------
    core : GemmCore
        Fitted constants.
    machine : GemmMachine
        Datasheet figures.
    knots : sequence of 3 sequences of float
        Knots of log2 m, n, k.
    probes : int, optional
        Random points per cell and axis at which the formula's slope is taken.
    margin : float, optional
        Share of the least slope found that may be used: the probes may miss the least.

    Returns
    -------
    ndarray of shape (n_edges,)
        Limits >= 0 on log units, in the order of :func:`grid_edges`.

    Notes
    -----
    In a cell the slope of a trilinear grid along an axis is a mean of the slopes of its four edges, so edges bounded
    by the least slope of the log of the formula in the cell leave the product rising. Jumps of the formula are
    upward and only help.
    """
    limits = []
    for axis in range(3):
        slope = np.maximum(_least_slopes(core, machine, knots, axis, probes), 0.0)
        length = np.diff(np.asarray(knots[axis])).reshape([-1 if other == axis else 1 for other in range(3)])
        limit = margin * slope * length
        for other in range(3):
            if other != axis:
                before = np.concatenate([np.take(limit, [0], other), limit], axis=other)
                after = np.concatenate([limit, np.take(limit, [-1], other)], axis=other)
                limit = np.minimum(before, after)
        limits.append(limit.ravel())
    return np.asarray(np.floor(np.concatenate(limits) * 10.0**GRID_DECIMALS) / 10.0**GRID_DECIMALS)


def _least_slopes(
    core: GemmCore, machine: GemmMachine, knots: Sequence[Sequence[float]], axis: int, probes: int
) -> FloatArray:
    """Least slope of log(formula) per octave along one axis in every cell, by differences too small to meet jumps."""
    cells = [len(axis_knots) - 1 for axis_knots in knots]
    generator = np.random.default_rng(axis)
    sizes = []
    for other, (axis_knots, cell) in enumerate(zip(knots, np.indices(cells).reshape(3, -1), strict=True)):
        at = np.asarray(axis_knots, dtype=np.float64)
        share = generator.random((cell.size, probes))
        place = at[cell][:, None] + np.diff(at)[cell][:, None] * share
        if other != axis:
            is_beyond = (cell == at.size - 2)[:, None] & (generator.random(share.shape) < 0.4)
            place = np.where(is_beyond, at[-1] + BEYOND * share, place)
        size = 2.0**place
        if other == axis:  # half of the probes just above a multiple of a tile, where the formula is flattest
            quantum = 16.0 if axis == 0 else 64.0
            flattest = np.floor(size / quantum) * quantum + 0.02 * quantum
            size = np.where((generator.random(share.shape) < 0.5) & (flattest >= quantum), flattest, size)
        else:
            size = np.round(size) if other == 0 else CHUNK * np.maximum(np.round(size / CHUNK), 1.0)
        sizes.append(size)
    step = 1e-6
    best = core_time_s(core, machine, sizes[0], sizes[1], sizes[2])
    stepped = [size * 2.0**step if other == axis else size for other, size in enumerate(sizes)]
    least = np.full(best.shape, np.inf)
    before_and_after = (candidate_times_s(core, machine, *at) for at in (sizes, stepped))
    for before, after in zip(*before_and_after, strict=True):
        slope = np.log(after / before) / step
        least = np.minimum(least, np.where(before <= NEARLY_BEST * best, slope, np.inf).min(axis=0))
    return np.asarray(least.min(axis=1).reshape(cells))


def fit_grid(
    residual: FloatArray,
    corners: IntArray,
    weights: FloatArray,
    largest_drop: FloatArray,
    *,
    shape: tuple[int, ...],
    ridge: float = 3.0,
    shrinkage: float = 0.3,
) -> FloatArray:
    """Fit the grid of residuals under limits on how fast it may fall.

    Parameters
    ----------
    residual : ndarray of shape (n_rows,)
        Values of log(measured / formula).
    corners, weights : ndarray of shape (8, n_rows)
        What :func:`~moesim.cost.gemm_surface.grid_corners` gives for the rows.
    largest_drop : ndarray of shape (n_edges,)
        Limit of the fall along each edge, >= 0.
    shape : tuple of int
        Shape of the grid.
    ridge, shrinkage : float, optional
        Weights of squared differences of neighbours and of squared values, in rows.

    Returns
    -------
    ndarray of shape ``shape``
        Values at the knots that fall along no edge by more than its limit.

    Notes
    -----
    Reweighted least squares for a smooth L1 loss; the limits by alternating directions (ADMM); a last sweep lifts
    knots by what the iteration left.
    """
    size, edges = int(np.prod(shape)), grid_edges(shape)
    differences = np.zeros((edges.shape[0], size))
    differences[np.arange(edges.shape[0]), edges[:, 0]] = -1.0
    differences[np.arange(edges.shape[0]), edges[:, 1]] = 1.0
    laplacian = differences.T @ differences
    pairs = (corners[:, None] * size + corners[None]).reshape(-1)
    values, dual, stiffness = np.zeros(size), np.zeros(edges.shape[0]), 10.0
    for _ in range(8):
        error = residual - (weights * values[corners]).sum(axis=0)
        row_weight = weights * (ERROR_SCALE / np.hypot(ERROR_SCALE, error))
        products = (row_weight[:, None] * weights[None]).reshape(-1)
        normal = np.bincount(pairs, products, minlength=size * size).reshape(size, size)
        right = np.bincount(corners.ravel(), (row_weight * residual).ravel(), minlength=size)
        inverse = np.linalg.inv(normal + (ridge + stiffness) * laplacian + shrinkage * np.eye(size))
        for _ in range(200):
            allowed = np.maximum(differences @ values + dual, -largest_drop)
            dual += differences @ values - allowed
            values = inverse @ (right + stiffness * (differences.T @ (allowed - dual)))
    return _lifted(values, edges, largest_drop).reshape(shape)


def _lifted(values: FloatArray, edges: IntArray, largest_drop: FloatArray) -> FloatArray:
    lifted = values.copy()
    for _ in range(values.size):  # the longest chain of knots is shorter
        before = lifted.copy()
        np.maximum.at(lifted, edges[:, 1], lifted[edges[:, 0]] - largest_drop)
        if np.array_equal(before, lifted):
            break
    return lifted


@dataclass(frozen=True)
class CrossValidation:
    """Held-out predictions of a table: every row by the fit that did not see its fold, arrays (n_rows,)."""

    folds: IntArray
    predicted_s: FloatArray
    formula_s: FloatArray


def cross_validate(table: GemmTable, machine: GemmMachine, *, seed: int = 0, folds: int = 5) -> CrossValidation:
    """Predict every row by a surface fitted on the other folds; ``formula_s`` is the formula without the grid."""
    fold = gemm_folds(table, seed, folds)
    predicted, formula = np.empty(fold.size), np.empty(fold.size)
    for held_out in np.unique(fold):
        is_out = fold == held_out
        surface = fit_surface(table.rows(~is_out), machine, seed=seed)
        rows = table.rows(is_out)
        predicted[is_out] = surface.time_s(rows.m, rows.n, rows.k)
        formula[is_out] = predicted[is_out] / np.exp(grid_value(surface.grid, rows.m, rows.n, rows.k))
    return CrossValidation(fold, predicted, formula)


def fit_and_judge(
    table: GemmTable, machine: GemmMachine, *, seed: int = 0, folds: int = 5
) -> tuple[GemmSurface, CrossValidation]:
    """Fit a surface on all rows and give it the spread of its held-out errors."""
    held_out = cross_validate(table, machine, seed=seed, folds=folds)
    surface = fit_surface(table, machine, seed=seed)
    return with_spread(surface, table, held_out.predicted_s), held_out


def surface_document(
    device: str, surface: GemmSurface, table: GemmTable, held_out: CrossValidation, *, seed: int
) -> dict[str, Any]:
    """JSON object of a surface with its provenance and the core that travels to other generations."""
    all_rows = error_statistics(held_out.predicted_s, table.time_s)
    is_large = table.flops >= 1e9
    large = error_statistics(held_out.predicted_s[is_large], table.time_s[is_large])
    return {
        "schema_version": 1,
        "operator": "gemm",
        "device": device,
        "precision": "bf16",
        "provenance": {
            "kind": "fitted",
            "source": SOURCE,
            "rows": int(table.m.size),
            "folds": int(np.unique(held_out.folds).size),
            "seed": seed,
            "held_out_error": _statistics_json(all_rows),
            "held_out_error_from_1_gflop": _statistics_json(large),
        },
        **surface.to_json(),
        "portable_core": asdict(fit_core(table.rows(table.is_aligned), surface.machine, seed, NOT_PORTABLE)),
    }


def _statistics_json(statistics: ErrorStatistics) -> dict[str, float | int]:
    return {name: round(value, 4) for name, value in asdict(statistics).items()}


def write_surface(path: Path, document: Mapping[str, Any]) -> None:
    """Write a surface's JSON object, lists of numbers on one line each."""
    text = json.dumps(document, indent=1)
    path.write_text(_joined_lists(text) + "\n", encoding="utf-8")


def _joined_lists(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        is_number = line.strip().rstrip(",").replace("]", "").lstrip("-")[:1].isdigit() and ":" not in line
        if lines and (is_number or (line.strip() in ("]", "],") and lines[-1][-1:].isdigit())):
            space = "" if lines[-1].endswith("[") or not is_number else " "
            lines[-1] += space + line.strip()
        else:
            lines.append(line)
    return "\n".join(lines)


def read_surface(path: Path) -> GemmSurface:
    """Read a surface that :func:`write_surface` wrote."""
    return gemm_surface_from_json(json.loads(path.read_text(encoding="utf-8")))
