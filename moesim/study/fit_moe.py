"""Fit of the MoE surface on a table of measured times: a filter of broken rows, the formula, its residual grids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.moe_rank_loads import (
    UNGATED_KERNEL,
    MoeShapes,
    RankLoad,
    Remainder,
    balanced_rank_load,
    rank_load_of_distributions,
    select_moe_shapes,
    select_rank_loads,
)
from moesim.cost.moe_surface import (
    MoeMachine,
    MoeParameters,
    MoeTimeSurface,
    moe_coordinates,
    moe_formula_time_s,
    moe_time_s,
)
from moesim.structure.columns import FloatArray, IntArray
from moesim.study.fit_grids import PROBE_PAIRS, PROBE_STEP, GridProbes, fit_residual_grids, limits
from moesim.study.kernel_tables import fold_of_rows

BoolArray = npt.NDArray[np.bool_]

REMAINDERS: dict[str, Remainder] = {"a100_sxm": "busy_experts", "l40s": "spread_experts"}
"""Tables whose bench drew power laws in another version than ``idle_experts``."""
DOMAIN_FIELDS = ("tokens", "hidden", "local_inter", "experts_per_token", "num_experts", "expert")

FIRST_GUESS = MoeParameters(
    *(1.5e-5, 0.8, 0.92, 1.4, 5.0, 2e-7, 1.2e-6, 4.0, 1e-10, 1.0, 2e-8, 2e-9, 1e-5, 6e-9, 2.5e-11),
    *(2e7, 0.4, 0.5, 3.0, 2e7, 2.0, 6e7, 20.0),
)
LOWER = MoeParameters(
    *(1e-6, 0.1, 0.4, 1.0, 0.0, 1e-9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    *(1e5, 0.05, 0.0, 1.0, 1e4, 0.3, 1e6, 1.0),
)
UPPER = MoeParameters(
    *(4e-5, 1.0, 1.0, 4.0, 80.0, 3e-6, 1e-5, 20.0, 5e-9, 30.0, 1e-6, 5e-8, 5e-5, 5e-8, 2e-10),
    *(5e8, 4.0, 4.0, 20.0, 5e8, 8.0, 2e9, 1e3),
)
"""Where the search starts and what it may not leave: physics (fractions of a peak) or far beyond every device."""

GRID_AXES: tuple[tuple[str, ...], ...] = (
    ("expert_tokens", "slab"),
    ("expert_tokens", "experts"),
    ("expert_tokens", "unevenness"),
    ("expert_tokens", "hidden"),
    ("expert_tokens", "local_experts"),
    ("tokens", "experts"),
    ("working_set",),
)
KNOTS: dict[str, tuple[float, ...]] = {
    "expert_tokens": (0, 3, 5, 6, 6.5, 7, 7.5, 8, 9, 10, 12),
    "slab": (18, 20, 22, 24, 26, 26.8, 27.3, 27.8, 28.6),
    "working_set": (24, 26, 26.3, 26.6, 27, 27.5, 28, 30),
    "experts": (3, 7, 8, 9),
    "unevenness": (0.0, 0.3, 0.6),
    "hidden": (11, 12, 13),
    "local_experts": (0, 2, 4, 6, 9),
    "tokens": (4, 6, 8, 10, 12, 14),
}
"""Binary logarithms (but for the unevenness); 289 values in all."""

LAYER_CACHE_DEVICES = ("l40s",)
"""Devices whose last-level cache (96 MB) holds whole layers: where the cache ends decides their errors."""
LAYER_CACHE_AXES: tuple[tuple[str, ...], ...] = (
    ("expert_tokens", "slab"),
    ("expert_tokens", "experts"),
    ("hidden", "slab"),
    ("inter", "hidden"),
    ("inter", "unevenness"),
    ("slots", "unevenness"),
    ("activations", "weights"),
    ("activations", "ragged"),
    ("working_set", "ragged"),
)
LAYER_CACHE_KNOTS: dict[str, tuple[float, ...]] = {
    "expert_tokens": (0, 4, 6, 7, 8, 10, 12),
    "slab": (20, 22, 24, 26, 27, 27.8, 28.6),
    "experts": (3, 7, 8, 9),
    "hidden": (11, 11.6, 12.1, 12.6, 13),
    "inter": (5, 7, 9, 11, 12, 13),
    "unevenness": (0.0, 0.15, 0.3, 0.6),
    "slots": (4, 7, 9, 10.5, 12, 14),
    "activations": (20, 23, 24.5, 25.3, 26, 26.6, 27.2, 28, 30),
    "weights": (20, 23, 25, 26, 26.5, 27, 28, 30),
    "ragged": (0.0, 1.0),
    "working_set": (20, 24, 26, 26.5, 27, 28, 30),
}
"""Their grids, in place of GRID_AXES: weights against activations around the cache's size, and how uneven loads are
against the size of a product, since their kernels read weights again and again; 294 values in all."""
LAYER_CACHE_WEIGHT = 4.0
"""How often their rows with more than TRAINING_TOKENS tokens per expert count: the cache has the most to say there."""
TRAINING_TOKENS = 64

FORMULA_ROWS = 2500
"""Rows the formula is fitted on, drawn at random; more change nothing."""
ROBUST_SCALE = 0.06
FILTER_FACTOR = 1.3
FILTER_SLACK_S = 1e-5
LARGEST_FLAGGED_SHARE = 0.1
JUDGED_RANKS = 16
JUDGED_TOKENS = 16


@dataclass(frozen=True)
class MoeRows:
    """Rows of a table, arrays of shape (n_rows,)."""

    shapes: MoeShapes
    load: RankLoad
    distribution: npt.NDArray[np.str_]
    kernel: npt.NDArray[np.str_]
    time_s: FloatArray

    @property
    def is_balanced(self) -> BoolArray:
        """Rows whose router is balanced."""
        return np.asarray(self.distribution == "balanced")


def moe_rows(table: Mapping[str, npt.NDArray[Any]], *, remainder: Remainder = "idle_experts") -> MoeRows:
    """Shapes, loads and times of a table's rows.

    Parameters
    ----------
    table : mapping
        Columns of ``MOE_COLUMNS``.
    remainder : str, optional
        How its bench draws power laws, see :func:`~moesim.cost.moe_rank_loads.power_law_counts`.

    Returns
    -------
    MoeRows
        Arrays of shape (n_rows,).
    """
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    kernel = table["kernel_source"]
    projections = np.where(kernel == UNGATED_KERNEL, 2.0, 3.0)
    shapes = MoeShapes(*[*(table[name].astype(np.float64) for name in names), projections])
    load = rank_load_of_distributions(shapes, table["distribution"], remainder=remainder)
    return MoeRows(shapes, load, table["distribution"], kernel, table["time_us"] * 1e-6)


def select_moe_rows(rows: MoeRows, is_kept: BoolArray) -> MoeRows:
    """Keep some rows.

    Parameters
    ----------
    rows : MoeRows
        Arrays of shape (n_rows,).
    is_kept : ndarray of bool of shape (n_rows,)
        Rows to keep.

    Returns
    -------
    MoeRows
        Arrays of shape (n_kept,).
    """
    return MoeRows(
        select_moe_shapes(rows.shapes, is_kept),
        select_rank_loads(rows.load, is_kept),
        rows.distribution[is_kept],
        rows.kernel[is_kept],
        rows.time_s[is_kept],
    )


def moe_folds(rows: MoeRows, *, folds: int = 5, seed: int = 0) -> IntArray:
    """Fold of every row by whole shape: (hidden, inter, topk, experts, tp, ep, kernel).

    Parameters
    ----------
    rows : MoeRows
        Arrays of shape (n_rows,).
    folds, seed : int, optional
        As :func:`~moesim.study.kernel_tables.fold_of_rows` takes them.

    Returns
    -------
    ndarray of shape (n_rows,)
        Fold of every row.
    """
    shapes = rows.shapes
    sizes = (shapes.hidden, shapes.inter, shapes.experts_per_token, shapes.num_experts, shapes.tensor, shapes.expert)
    return fold_of_rows([*(size.astype(np.int64) for size in sizes), rows.kernel], folds=folds, seed=seed)


def is_slower_than_harder_rows(rows: MoeRows) -> BoolArray:
    """Flag rows that take longer than rows with at least as much to do; no model is involved.

    Parameters
    ----------
    rows : MoeRows
        Arrays of shape (n_rows,).

    Returns
    -------
    ndarray of bool of shape (n_rows,)
        True where the time exceeds 1.3 × + 10 µs that of the same row on fewer expert ranks, on fewer tensor ranks, or
        with more tokens.

    Notes
    -----
    The tables hold whole blocks some five times too slow, flat or falling with tokens. The rule misses blocks that are
    smooth and whose neighbours are broken too; :func:`is_slower_than_scaled_rows` finds those.
    """
    shapes = rows.shapes
    columns = [shapes.expert, shapes.tensor, -shapes.tokens]
    fixed = [shapes.hidden, shapes.inter, shapes.experts_per_token, shapes.num_experts]
    names = [_codes(rows.distribution), _codes(rows.kernel)]
    is_flagged = np.zeros(rows.time_s.shape, dtype=bool)
    for position, along in enumerate(columns):
        others = [column for index, column in enumerate(columns) if index != position]
        group = _groups([*fixed, *names, *others])
        order = np.lexsort((along, group))
        limit = _running_minimum(rows.time_s[order], group[order])
        is_flagged[order] |= rows.time_s[order] > FILTER_FACTOR * limit + FILTER_SLACK_S
    return is_flagged


def is_slower_than_scaled_rows(rows: MoeRows) -> BoolArray:
    """Flag rows that take longer than the work explains, compared with smaller layers; no model is involved.

    Parameters
    ----------
    rows : MoeRows
        Arrays of shape (n_rows,).

    Returns
    -------
    ndarray of bool of shape (n_rows,)
        True where the time exceeds 1.3 × w + 10 µs that of a row with the same tokens, routing, expert ranks and kernel
        whose hidden and local intermediate sizes are no larger, w being the ratio of their products.

    Notes
    -----
    Time grows at most in proportion to work unless a cache serves the smaller layer, as on the L40S, whose 96 MB hold
    whole layers. A rule that flags more than a tenth of a table is about such things, not about broken blocks, and
    flags nothing.
    """
    shapes = rows.shapes
    sizes = (shapes.tokens, shapes.experts_per_token, shapes.num_experts, shapes.expert)
    group = _groups([*sizes, _codes(rows.distribution), _codes(rows.kernel)])
    order = np.argsort(group, kind="stable")
    is_flagged = np.zeros(rows.time_s.shape, dtype=bool)
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        hidden, inter, time_s = shapes.hidden[members], shapes.local_inter[members], rows.time_s[members]
        is_smaller = (hidden <= hidden[:, None]) & (inter <= inter[:, None])
        work = hidden * inter
        limit = np.where(is_smaller, work[:, None] / work * time_s, math.inf)
        np.fill_diagonal(limit, math.inf)
        is_flagged[members] = time_s > FILTER_FACTOR * limit.min(axis=1) + FILTER_SLACK_S
    return is_flagged & bool(is_flagged.mean() <= LARGEST_FLAGGED_SHARE)


def is_judged(rows: MoeRows) -> BoolArray:
    """Rows the accuracy is stated for, before the filter: ep <= 16 and t >= 16.

    Parameters
    ----------
    rows : MoeRows
        Arrays of shape (n_rows,).

    Returns
    -------
    ndarray of bool of shape (n_rows,)
        True for those.
    """
    return np.asarray((rows.shapes.expert <= JUDGED_RANKS) & (rows.shapes.tokens >= JUDGED_TOKENS))


def tokens_per_expert(rows: MoeRows) -> FloatArray:
    """Rows per expert hit on the timed rank.

    Parameters
    ----------
    rows : MoeRows
        Arrays of shape (n_rows,).

    Returns
    -------
    ndarray of shape (n_rows,)
        Slots over active experts.
    """
    return np.asarray(rows.load.slots / np.maximum(rows.load.active_experts, 1.0))


def fit_moe(device: str, rows: MoeRows, machine: MoeMachine, *, has_grids: bool = True) -> MoeTimeSurface:
    """Fit formula and residual grids.

    Parameters
    ----------
    device : str
        Device id.
    rows : MoeRows
        Rows to fit, those of the filter left out.
    machine : MoeMachine
        Datasheet figures of the device.
    has_grids : bool, optional
        Whether to fit the grids too.

    Returns
    -------
    MoeTimeSurface
        With an empty interval; :func:`~moesim.study.fit_grids.with_interval` adds one from held-out errors.
    """
    surface = MoeTimeSurface(
        device=device,
        machine=machine,
        parameters=_fit_formula(rows, machine),
        grids=(),
        domain={name: limits(getattr(rows.shapes, name)) for name in DOMAIN_FIELDS},
        remainder=REMAINDERS.get(device, "idle_experts"),
        interval_edges_s=np.empty(0),
        interval_half_widths=np.array([math.inf]),
    )
    if not has_grids:
        return surface
    log_errors = np.log(rows.time_s / moe_time_s(surface, rows.shapes, rows.load))
    coordinates = moe_coordinates(rows.shapes, rows.load)
    axes, knots, weight = GRID_AXES, KNOTS, 1.0
    if device in LAYER_CACHE_DEVICES:
        axes, knots, weight = LAYER_CACHE_AXES, LAYER_CACHE_KNOTS, LAYER_CACHE_WEIGHT
    counted = np.where(tokens_per_expert(rows) > TRAINING_TOKENS, weight, 1.0)
    probes = _token_probes(surface, rows.shapes)
    grids = fit_residual_grids(axes, knots, coordinates, log_errors, probes, row_weights=counted)
    return replace(surface, grids=grids)


def held_out_moe_times_s(
    device: str, rows: MoeRows, machine: MoeMachine, folds: IntArray, is_fitted: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Times of all rows, each predicted by a fit that did not see its fold.

    Parameters
    ----------
    device : str
        Device id.
    rows : MoeRows
        Arrays of shape (n_rows,).
    machine : MoeMachine
        Datasheet figures of the device.
    folds : ndarray of shape (n_rows,)
        Fold of every row.
    is_fitted : ndarray of bool of shape (n_rows,)
        Rows a fit may see; all rows are predicted.

    Returns
    -------
    predicted_s, formula_s : ndarray of shape (n_rows,)
        Seconds with the grids, and of the formula alone.
    """
    predicted_s, formula_s = np.empty_like(rows.time_s), np.empty_like(rows.time_s)
    for fold in np.unique(folds):
        is_out = folds == fold
        surface = fit_moe(device, select_moe_rows(rows, ~is_out & is_fitted), machine)
        left_out = select_moe_rows(rows, is_out)
        predicted_s[is_out] = moe_time_s(surface, left_out.shapes, left_out.load)
        formula_s[is_out] = moe_time_s(replace(surface, grids=()), left_out.shapes, left_out.load)
    return predicted_s, formula_s


def _fit_formula(rows: MoeRows, machine: MoeMachine) -> MoeParameters:
    """Robust least squares of log(formula / measured); what the rows do not determine keeps its first guess."""
    from scipy.optimize import least_squares

    count = rows.time_s.size
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(0).permutation(count)[:FORMULA_ROWS]] = True
    part = select_moe_rows(rows, chosen)
    scale, low, high = (np.array(astuple(item)) for item in (FIRST_GUESS, LOWER, UPPER))
    log_time = np.log(part.time_s)

    def residuals(point: FloatArray) -> FloatArray:
        formula_s = moe_formula_time_s(MoeParameters(*(point * scale).tolist()), machine, part.shapes, part.load)
        prior = 0.01 * (point - 1.0)  # so weak that it acts only on what no row determines
        return np.concatenate([np.log(formula_s) - log_time, prior])

    bounds = (low / scale, high / scale)
    start = np.ones_like(scale)
    found = least_squares(residuals, start, bounds=bounds, loss="cauchy", f_scale=ROBUST_SCALE, max_nfev=60)
    return MoeParameters(*(found.x * scale).tolist())


def _token_probes(surface: MoeTimeSurface, shapes: MoeShapes) -> GridProbes:
    """Pairs of close neighbours along tokens, balanced, for layers of the table and mixtures of them."""
    generator = np.random.default_rng(0)
    sizes = (shapes.hidden, shapes.local_inter, shapes.experts_per_token, shapes.num_experts, shapes.expert)
    found = np.unique(np.stack([*sizes, shapes.projections]), axis=1)
    found = found[:, generator.integers(found.shape[1], size=PROBE_PAIRS)]
    mixed = np.stack([generator.permutation(column) for column in found])  # layers nobody measured
    mixed[0] *= generator.choice([0.8, 1.0, 1.25], PROBE_PAIRS)
    mixed[3] = generator.choice([8.0, 16.0, 32.0, 64.0, 128.0, 160.0, 256.0, 384.0, 512.0], PROBE_PAIRS)
    mixed[4] = np.gcd(mixed[4].astype(np.int64), mixed[3].astype(np.int64))
    hidden, inter, chosen, experts, ranks, projections = np.where(np.arange(PROBE_PAIRS) % 2, found, mixed)
    chosen = np.minimum(chosen, experts)
    low = np.floor(2.0 ** generator.uniform(0.0, 16.0, PROBE_PAIRS))
    high = np.maximum(low + 1.0, np.round(PROBE_STEP * low))
    layers = np.stack([hidden, inter, chosen, experts, np.ones_like(low), ranks, projections])
    probes = MoeShapes(np.concatenate([low, high]), *np.concatenate([layers, layers], axis=1))
    load = balanced_rank_load(probes)
    index = np.arange(PROBE_PAIRS)
    log_time_s = np.log(moe_time_s(surface, probes, load))
    return GridProbes(moe_coordinates(probes, load), log_time_s, index, index + PROBE_PAIRS)


def _codes(names: npt.NDArray[np.str_]) -> IntArray:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _groups(columns: list[npt.NDArray[Any]]) -> IntArray:
    """Number of the group of equal columns each row is in."""
    return np.unique(np.stack(columns), axis=1, return_inverse=True)[1].ravel().astype(np.int64)


def _running_minimum(time_s: FloatArray, group: IntArray) -> FloatArray:
    """Least time of the rows before each one in its group; infinite for the first."""
    result = np.full_like(time_s, math.inf)
    for row in range(1, time_s.size):
        if group[row] == group[row - 1]:
            result[row] = min(result[row - 1], time_s[row - 1])
    return result
