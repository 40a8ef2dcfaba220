"""Time of a fused MoE layer on one rank: grouped GEMMs, permutation and routing, times small residual grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from moesim.cost.attention_surface import GridDocument, IntervalDocument, ResidualGrid, grid_corners
from moesim.cost.moe_rank_loads import TILE_ROWS, MoeShapes, RankLoad, Remainder
from moesim.structure.columns import FloatArray

BoolArray = npt.NDArray[np.bool_]

TILE_COLUMNS = (64, 128, 256)
LARGEST_TILE = 32768
"""Columns of the output tiles a grouped GEMM may choose from; rows × columns up to LARGEST_TILE."""
CHUNK = 64
"""Length of the inner dimension one iteration of the main loop covers."""
ELEMENT_BYTES = 2.0
ROUTER_KERNEL_EXPERTS = 128
"""Experts up to which the router's own kernel serves; above, general softmax and top-k kernels do."""
CACHE_SHARPNESS = 16.0
"""How suddenly weights stop being found in the last-level cache as they outgrow it: all or nothing on the L40S."""


@dataclass(frozen=True)
class MoeMachine:
    """Datasheet figures a surface's parameters are fractions of."""

    peak_flop_per_s: float
    memory_bytes_per_s: float
    compute_units: float


@dataclass(frozen=True)
class MoeParameters:
    """The formula's numbers; :func:`moe_formula_time_s` says what each does."""

    fixed_s: float
    compute_fraction: float
    memory_fraction: float
    overlap_exponent: float
    small_tile_cost: float
    chunk_s: float
    wave_s: float
    slot_passes: float
    slot_s: float
    token_passes: float
    expert_s: float
    router_token_s: float
    general_fixed_s: float
    general_token_s: float
    general_token_expert_s: float
    cache_bytes: float


@dataclass(frozen=True)
class MoeTimeSurface:
    """Everything that prices a fused MoE layer on one device.

    Attributes
    ----------
    machine : MoeMachine
        Datasheet figures.
    parameters : MoeParameters
        The formula's numbers.
    grids : tuple of ResidualGrid
        Added up, then exponentiated; none leaves the formula alone.
    domain : dict
        Smallest and largest fitted value of each shape field.
    remainder : str
        How the device's table draws power laws.
    interval_edges_s, interval_half_widths : ndarray
        Bins of predicted time and, one more, the half width of log(measured / predicted) in each.
    """

    device: str
    machine: MoeMachine
    parameters: MoeParameters
    grids: tuple[ResidualGrid, ...]
    domain: dict[str, tuple[float, float]]
    remainder: Remainder
    interval_edges_s: FloatArray
    interval_half_widths: FloatArray


class MoeDocument(TypedDict):
    """A surface as JSON holds it; other keys (provenance) are for readers."""

    device: str
    figures: dict[str, float]
    parameters: dict[str, float]
    grids: list[GridDocument]
    domain: dict[str, list[float]]
    remainder: Remainder
    interval: IntervalDocument


def moe_surface_from_document(document: MoeDocument) -> MoeTimeSurface:
    """Build a surface from what its JSON file holds.

    Parameters
    ----------
    document : dict
        As ``json.load`` gives it.

    Returns
    -------
    MoeTimeSurface
        The surface.
    """
    grids = []
    for grid in document["grids"]:
        knots = tuple(np.array(axis, dtype=np.float64) for axis in grid["knots"])
        values = np.array(grid["values"], dtype=np.float64).reshape([axis.size for axis in knots])
        grids.append(ResidualGrid(tuple(grid["axes"]), knots, values))
    return MoeTimeSurface(
        device=document["device"],
        machine=MoeMachine(**document["figures"]),
        parameters=MoeParameters(**document["parameters"]),
        grids=tuple(grids),
        domain={name: (low, high) for name, (low, high) in document["domain"].items()},
        remainder=document["remainder"],
        interval_edges_s=np.array(document["interval"]["edges_s"], dtype=np.float64),
        interval_half_widths=np.array(document["interval"]["half_widths"], dtype=np.float64),
    )


def moe_formula_time_s(parameters: MoeParameters, machine: MoeMachine, shapes: MoeShapes, load: RankLoad) -> FloatArray:
    """Time of a fused MoE layer on one rank without the residual grids.

    Parameters
    ----------
    parameters : MoeParameters
        The formula's numbers.
    machine : MoeMachine
        Peak P, bandwidth B and compute units S below.
    shapes : MoeShapes
        The layers, arrays that broadcast to (...,).
    load : RankLoad
        What the timed rank serves.

    Returns
    -------
    ndarray of shape (...,)
        Seconds.

    Notes
    -----
    With R slots and A active experts on the rank, t tokens, E experts, hidden size H, local intermediate size I and
    Be = B · memory_fraction::

        T = fixed_s + expert_s E + slot_s R + (slot_passes 2 R H + token_passes 2 t H) / Be
            + router(t, E) + G(N = (projections - 1) I, K = H) + G(N = H, K = I)
        router = router_token_s t                                             up to 128 experts, else
                 general_fixed_s + (general_token_s + general_token_expert_s E) t
        G = min over tiles (a, b) of (tc^p + tm^p + tl^p)^(1/p) + wave_s W
        W  = ceil(row_tiles(a) ceil(N / b) / S)                               whole waves of output tiles
        tc = W 2 a b 64 ceil(K / 64) S (1 + small_tile_cost (1/a + 1/b)) / (P compute_fraction)
        tm = 2 (f A N K + R (K + N)) / Be                                     weights of the experts hit, and rows
        tl = chunk_s K / 64                                                   one main loop
        f  = 1 / (1 + (cache_bytes / weights)^16)                               weights the cache does not hold

    Routing is paid for all t tokens on every rank, with or without experts of theirs. No term falls as tokens grow if
    no load does. Collectives are not part of it. p near 1 says that these kernels hardly overlap streaming and
    computing, so ``compute_fraction`` alone is no physical rate.
    """
    stream = machine.memory_bytes_per_s * parameters.memory_fraction
    inter, slots = shapes.local_inter, load.slots
    is_general = shapes.num_experts > ROUTER_KERNEL_EXPERTS
    general_token_s = parameters.general_token_s + parameters.general_token_expert_s * shapes.num_experts
    general_s = parameters.general_fixed_s + general_token_s * shapes.tokens
    router_s = np.where(is_general, general_s, parameters.router_token_s * shapes.tokens)
    passes = parameters.slot_passes * slots + parameters.token_passes * shapes.tokens
    around_s = passes * ELEMENT_BYTES * shapes.hidden / stream + parameters.slot_s * slots
    weights = ELEMENT_BYTES * load.active_experts * shapes.hidden * inter * shapes.projections
    missed = 1.0 / (1.0 + (parameters.cache_bytes / np.maximum(weights, 1.0)) ** CACHE_SHARPNESS)
    up_s = _grouped_gemm_s(parameters, machine, load, (shapes.projections - 1.0) * inter, shapes.hidden, missed)
    down_s = _grouped_gemm_s(parameters, machine, load, shapes.hidden, inter, missed)
    fixed_s = parameters.fixed_s + parameters.expert_s * shapes.num_experts
    return np.asarray(fixed_s + router_s + around_s + up_s + down_s)


def _grouped_gemm_s(
    parameters: MoeParameters,
    machine: MoeMachine,
    load: RankLoad,
    columns: FloatArray,
    inner: FloatArray,
    missed: FloatArray,
) -> FloatArray:
    power, units = parameters.overlap_exponent, machine.compute_units
    weight_elements = missed * load.active_experts * columns * inner
    elements = weight_elements + load.slots * (columns + inner)
    stream_s = ELEMENT_BYTES * elements / (machine.memory_bytes_per_s * parameters.memory_fraction)
    other = stream_s**power + (parameters.chunk_s * inner / CHUNK) ** power
    padded = np.ceil(inner / CHUNK) * CHUNK
    best = np.asarray(np.inf)
    for position, tile_rows in enumerate(TILE_ROWS):
        for tile_columns in TILE_COLUMNS:
            if tile_rows * tile_columns > LARGEST_TILE:
                continue
            waves = np.ceil(load.row_tiles[..., position] * np.ceil(columns / tile_columns) / units)
            small = 1.0 + parameters.small_tile_cost * (1.0 / tile_rows + 1.0 / tile_columns)
            rate = machine.peak_flop_per_s * parameters.compute_fraction / (2.0 * tile_rows * tile_columns * units)
            compute_s = waves * padded * small / rate
            best = np.minimum(best, (compute_s**power + other) ** (1.0 / power) + parameters.wave_s * waves)
    return best


def moe_coordinates(shapes: MoeShapes, load: RankLoad) -> dict[str, FloatArray]:
    """Values the residual grids may depend on: binary logarithms, but for ``unevenness``.

    Parameters
    ----------
    shapes : MoeShapes
        The layers, arrays that broadcast to (...,).
    load : RankLoad
        What the timed rank serves.

    Returns
    -------
    dict
        ``expert_tokens`` (per active expert), ``inter`` (local), ``hidden``, ``experts``, ``local_experts``,
        ``active_experts``, ``tokens`` and ``unevenness``.
    """
    columns = {
        "expert_tokens": load.slots / np.maximum(load.active_experts, 1.0),
        "inter": shapes.local_inter,
        "hidden": shapes.hidden,
        "experts": shapes.num_experts,
        "local_experts": shapes.local_experts,
        "active_experts": load.active_experts,
        "tokens": shapes.tokens,
    }
    shape = np.broadcast_shapes(*(np.shape(column) for column in columns.values()))
    logs = {name: np.broadcast_to(np.log2(np.maximum(column, 1.0)), shape) for name, column in columns.items()}
    return {**logs, "unevenness": np.broadcast_to(load.unevenness, shape)}


def moe_flops(shapes: MoeShapes, load: RankLoad) -> FloatArray:
    """Useful FLOPs of the rank's experts.

    Parameters
    ----------
    shapes : MoeShapes
        The layers, arrays that broadcast to (...,).
    load : RankLoad
        What the timed rank serves.

    Returns
    -------
    ndarray of shape (...,)
        Twice the multiplications of slots with weights.
    """
    return np.asarray(2.0 * load.slots * shapes.hidden * shapes.local_inter * shapes.projections)


def moe_time_s(surface: MoeTimeSurface, shapes: MoeShapes, load: RankLoad) -> FloatArray:
    """Time of a fused MoE layer on one rank.

    Parameters
    ----------
    surface : MoeTimeSurface
        The device's numbers.
    shapes : MoeShapes
        The layers, arrays that broadcast to (...,).
    load : RankLoad
        What the timed rank serves, see :mod:`moesim.cost.moe_rank_loads`.

    Returns
    -------
    ndarray of shape (...,)
        Seconds: :func:`moe_formula_time_s` times exp(sum of the grids), never less than the useful FLOPs take at the
        peak rate.
    """
    time_s = moe_formula_time_s(surface.parameters, surface.machine, shapes, load)
    coordinates = moe_coordinates(shapes, load)
    residual = np.zeros_like(time_s)
    for grid in surface.grids:
        corners = grid_corners(grid.knots, [coordinates[axis] for axis in grid.axes])
        residual = residual + np.sum(grid.values.ravel()[corners.index] * corners.weight, axis=-1)
    return np.asarray(np.maximum(time_s * np.exp(residual), moe_flops(shapes, load) / surface.machine.peak_flop_per_s))


def moe_half_widths(surface: MoeTimeSurface, time_s: FloatArray) -> FloatArray:
    """Half width of the 90 % interval: the measured time lies in predicted × exp(± half width).

    Parameters
    ----------
    surface : MoeTimeSurface
        The device's numbers.
    time_s : ndarray of shape (...,)
        Predicted times.

    Returns
    -------
    ndarray of shape (...,)
        Half widths of log(measured / predicted).
    """
    return surface.interval_half_widths[np.searchsorted(surface.interval_edges_s, time_s, side="right")]


def is_in_moe_domain(surface: MoeTimeSurface, shapes: MoeShapes) -> BoolArray:
    """Whether layers lie within the range of the fitted ones, field by field.

    Parameters
    ----------
    surface : MoeTimeSurface
        The device's numbers.
    shapes : MoeShapes
        The layers, arrays that broadcast to (...,).

    Returns
    -------
    ndarray of bool of shape (...,)
        False where a field leaves the fitted range.
    """
    is_inside = np.asarray(True)
    for name, (low, high) in surface.domain.items():
        value = getattr(shapes, name)
        is_inside = is_inside & (value >= low) & (value <= high)
    return np.asarray(is_inside)
