"""Time of a fused MoE layer on one rank: grouped GEMMs, permutation and routing, times small residual grids."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from moesim.cost.moe_rank_loads import TILE_ROWS, MoeShapes, RankLoad, Remainder
from moesim.cost.residual_grids import (
    GridDocument,
    IntervalDocument,
    ResidualGrid,
    grids_from_documents,
    is_within,
    residual,
)
from moesim.structure.columns import FloatArray

BoolArray = npt.NDArray[np.bool_]

TILE_COLUMNS = (64, 128, 256)
LARGEST_TILE = 32768
"""Columns of the output tiles a grouped GEMM may choose from; rows × columns up to LARGEST_TILE."""
STREAMED_ROWS, STREAMED_COLUMNS = 64, 128
"""Output tile of the kernels that read a matrix larger than the cache once per row of tiles."""
CYCLIC_STEPS = 12
CHUNK = 64
"""Length of the inner dimension one iteration of the main loop covers."""
ELEMENT_BYTES = 2.0
ROUTER_KERNEL_EXPERTS = 128
"""Experts up to which the router's own kernel serves; above, general softmax and top-k kernels do."""
CEILING_SLACK = 1e-9
Shares = tuple[FloatArray | float, FloatArray | float]
UNCACHED: Shares = (1.0, 1.0)
"""Shares of weights and of rows that memory serves where nothing is found in the cache."""


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
    cache_width: float
    activation_weight: float
    cached_ratio: float
    pass_cache_bytes: float
    pass_sharpness: float
    slab_bytes: float
    shared_tiles: float


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
    return MoeTimeSurface(
        device=document["device"],
        machine=MoeMachine(**document["figures"]),
        parameters=MoeParameters(**document["parameters"]),
        grids=grids_from_documents(document["grids"]),
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

        T = fixed_s + expert_s E + slot_s R + a (slot_passes 2 R H + token_passes 2 t H) / Be
            + router(t, E) + G(N = (projections - 1) I, K = H) + G(N = H, K = I)
        router = router_token_s t                                             up to 128 experts, else
                 general_fixed_s + (general_token_s + general_token_expert_s E) t
        G = min over tiles (a, b) of (tc^p + tm^p + tl^p)^(1/p) + wave_s W
        W  = ceil(row_tiles(a) ceil(N / b) / S)                               whole waves of output tiles
        tc = W 2 a b 64 ceil(K / 64) S (1 + small_tile_cost (1/a + 1/b)) / (P compute_fraction)
        tm = 2 ((f A + g r) N K + a R (K + N)) / Be                            weights of the experts hit, and rows
        r  = max(min(u, sqrt(u shared_tiles)) min(ceil(N / 128) / S, 1) - A, 0)
                                                                              weights read again; u = row_tiles(64)
        tl = chunk_s K / 64                                                   one main loop

    Shares of traffic that memory serves, the rest coming from the last-level cache: f of the weights rises from 0 to 1
    as weights plus activation_weight × 2 (2 t H + 2 R H + projections R I) bytes grow from cache_bytes to
    cache_bytes (1 + cache_width); a of the rows is c + (1 - c) / cached_ratio with
    c = 1 / (1 + (pass_cache_bytes / 4 R H)^pass_sharpness); g of weights read again for another row of tiles rises from
    0 to 1 as one expert's matrix of 2 N K bytes grows from slab_bytes by the same width. They matter where the cache is
    large and memory slow: on the L40S whole layers fit, and experts that do not are read once per 64 rows.

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
    working_set = _working_set(shapes, load, parameters.activation_weight)
    missed = _ramp(working_set, parameters.cache_bytes, parameters.cache_width)
    moved = np.maximum(2.0 * ELEMENT_BYTES * slots * shapes.hidden, 1.0)
    spilled = 1.0 / (1.0 + (parameters.pass_cache_bytes / moved) ** parameters.pass_sharpness)
    rows_share = spilled + (1.0 - spilled) / parameters.cached_ratio
    passes = parameters.slot_passes * slots + parameters.token_passes * shapes.tokens
    around_s = rows_share * passes * ELEMENT_BYTES * shapes.hidden / stream + parameters.slot_s * slots
    shares = (missed, rows_share)
    up_s = _grouped_gemm_s(parameters, machine, load, ((shapes.projections - 1.0) * inter, shapes.hidden), shares)
    down_s = _grouped_gemm_s(parameters, machine, load, (shapes.hidden, inter), shares)
    fixed_s = parameters.fixed_s + parameters.expert_s * shapes.num_experts
    return np.asarray(fixed_s + router_s + around_s + up_s + down_s)


def _working_set(shapes: MoeShapes, load: RankLoad, activation_weight: float) -> FloatArray:
    """Bytes of the weights of experts hit, and of activations: tokens in and out, rows in, out and between."""
    weights = load.active_experts * shapes.hidden * shapes.local_inter * shapes.projections
    rows = 2.0 * shapes.hidden + shapes.local_inter * shapes.projections
    activations = 2.0 * shapes.tokens * shapes.hidden + load.slots * rows
    return np.asarray(ELEMENT_BYTES * (weights + activation_weight * activations))


def _ramp(num_bytes: FloatArray, start: float, width: float) -> FloatArray:
    """Share that a cache of ``start`` bytes misses: 0 up to it, 1 from ``start`` × (1 + width)."""
    return np.clip((num_bytes / start - 1.0) / width, 0.0, 1.0)


def _cyclic_miss(size: FloatArray) -> FloatArray:
    """Share of misses of operands ``size`` times a cache with random replacement, read again and again in one order.

    The root m of m = 1 - exp(-size m): 0 up to 1, 0.35 at 1.22, 0.80 at 2, towards 1.
    """
    missed = np.ones_like(size)
    for _ in range(CYCLIC_STEPS):
        missed = 1.0 - np.exp(-size * missed)
    return np.where(size > 1.0, missed, 0.0)


def _grouped_gemm_s(
    parameters: MoeParameters,
    machine: MoeMachine,
    load: RankLoad,
    sizes: tuple[FloatArray, FloatArray],
    shares: Shares,
    *,
    operand_bytes: float = ELEMENT_BYTES,
) -> FloatArray:
    """``G`` of :func:`moe_formula_time_s` for ``sizes`` (columns, inner)."""
    power, (columns, inner) = parameters.overlap_exponent, sizes
    common = _stream_s(parameters, machine, load, sizes, shares, operand_bytes=operand_bytes) ** power
    common = common + (parameters.chunk_s * inner / CHUNK) ** power
    best = np.asarray(np.inf)
    for tile in _tiles():
        compute_s, waves = _tile_times(parameters, machine, load, columns, inner, tile)
        best = np.minimum(best, (compute_s**power + common) ** (1.0 / power) + parameters.wave_s * waves)
    return best


def _tiles() -> list[tuple[int, int]]:
    """Output tiles to choose from, as positions in ``TILE_ROWS`` and columns."""
    every = itertools.product(range(len(TILE_ROWS)), TILE_COLUMNS)
    return [(position, columns) for position, columns in every if TILE_ROWS[position] * columns <= LARGEST_TILE]


def _stream_s(
    parameters: MoeParameters,
    machine: MoeMachine,
    load: RankLoad,
    sizes: tuple[FloatArray, FloatArray],
    shares: Shares,
    *,
    operand_bytes: float,
) -> FloatArray:
    """``tm``; ``shares`` of weights and of rows come from memory."""
    columns, inner = sizes
    missed, rows_share = shares
    reads = load.row_tiles[..., TILE_ROWS.index(STREAMED_ROWS)]
    reads = np.minimum(reads, np.sqrt(reads * parameters.shared_tiles))
    reads = reads * np.minimum(np.ceil(columns / STREAMED_COLUMNS) / machine.compute_units, 1.0)
    slab_bytes = operand_bytes * columns * inner
    again = np.maximum(reads - load.active_experts, 0.0) * _cyclic_miss(slab_bytes / parameters.slab_bytes)
    rows_bytes = load.slots * (operand_bytes * inner + ELEMENT_BYTES * columns)
    num_bytes = (missed * load.active_experts + again) * slab_bytes + rows_share * rows_bytes
    return np.asarray(num_bytes / (machine.memory_bytes_per_s * parameters.memory_fraction))


def _tile_times(
    parameters: MoeParameters,
    machine: MoeMachine,
    load: RankLoad,
    columns: FloatArray,
    inner: FloatArray,
    tile: tuple[int, int],
) -> tuple[FloatArray, FloatArray]:
    """``tc`` and ``W`` of a tile."""
    (position, tile_columns), units = tile, machine.compute_units
    tile_rows = TILE_ROWS[position]
    waves = np.ceil(load.row_tiles[..., position] * np.ceil(columns / tile_columns) / units)
    small = 1.0 + parameters.small_tile_cost * (1.0 / tile_rows + 1.0 / tile_columns)
    rate = machine.peak_flop_per_s * parameters.compute_fraction / (2.0 * tile_rows * tile_columns * units)
    return waves * (np.ceil(inner / CHUNK) * CHUNK) * small / rate, waves


def grouped_gemm_time_s(
    parameters: MoeParameters,
    machine: MoeMachine,
    shape: tuple[FloatArray, FloatArray, FloatArray],
    *,
    groups: FloatArray,
    operand_bytes: float = ELEMENT_BYTES,
    row_dispersion: FloatArray | float = 0.0,
) -> FloatArray:
    """Time of the grouped GEMM alone: ``G`` of :func:`moe_formula_time_s` with groups of about the same size.

    Parameters
    ----------
    parameters : MoeParameters
        The formula's numbers.
    machine : MoeMachine
        Peak P at the precision, bandwidth B and compute units S.
    shape : tuple of ndarray
        Rows of one group, columns N and inner length K, arrays that broadcast to (...,).
    groups : ndarray
        Experts; each pads its rows to whole tiles and has its weights read.
    operand_bytes : float, optional
        Bytes of an element of rows and weights; results have 2.
    row_dispersion : ndarray or float, optional
        Variance of the groups' rows over their mean.

    Returns
    -------
    ndarray of shape (...,)
        Seconds without launch, routing and permutation.

    Notes
    -----
    The numbers come from whole fused layers, of which these products are 30 to 98 % of the time (10th to 90th
    percentile, more than 64 tokens per expert). Without the residual grids, which depend on the layer, that whole is
    off by 5-6 / 14-17 % on held-out layers with more than 64 tokens per expert (median / 90th percentile; 4-5 / 11-14 %
    with them; L40S 9 / 29 %). Two other forms were tried on the same rows of A100, H100 and B200 and are worse: the
    dense GEMM surface with waves over all groups (10-29 / 22-42 %, mostly too fast) and the larger of the two (5-6 /
    14-19 %; on B200 15 % too slow above 1,024 tokens per expert). Neither weights nor rows are found in the cache: in a
    step other layers' data has passed meanwhile.
    """
    load = _group_load(shape[0], groups, row_dispersion)
    return _grouped_gemm_s(parameters, machine, load, shape[1:], UNCACHED, operand_bytes=operand_bytes)


def _group_load(rows: FloatArray, groups: FloatArray, dispersion: FloatArray | float) -> RankLoad:
    """Groups whose rows have a mean and a variance of ``dispersion`` times that."""
    spread = np.minimum(np.sqrt(12.0 * dispersion * rows), 2.0 * rows)
    tiles = np.stack([groups * _mean_ceiling(rows / size, spread / size) for size in TILE_ROWS], axis=-1)
    return RankLoad(groups * rows, groups, tiles, np.zeros_like(rows))


def _mean_ceiling(mean: FloatArray, spread: FloatArray) -> FloatArray:
    """Mean of the ceiling of numbers that lie evenly within ``spread`` around ``mean``; the ceiling of it without."""
    exact = np.ceil(mean - CEILING_SLACK)
    if not np.any(spread):
        return np.asarray(exact)
    low, high = _ceiling_integral(mean - spread / 2.0), _ceiling_integral(mean + spread / 2.0)
    is_spread = spread > CEILING_SLACK
    return np.where(is_spread, (high - low) / np.where(is_spread, spread, 1.0), exact)


def _ceiling_integral(end: FloatArray) -> FloatArray:
    """Integral of the ceiling from 0 to ``end``."""
    whole = np.floor(end)
    return np.asarray(whole * (whole + 1.0) / 2.0 + (whole + 1.0) * (end - whole))


@dataclass(frozen=True)
class GroupedGemmParts:
    """Terms of the best tile of one grouped GEMM: tc, tm, tl and the waves' start-up, scalars."""

    tile: tuple[int, int]
    compute_s: float
    stream_s: float
    latency_s: float
    waves_s: float


def grouped_gemm_parts(
    parameters: MoeParameters,
    machine: MoeMachine,
    shape: tuple[FloatArray, FloatArray, FloatArray],
    *,
    groups: FloatArray,
    operand_bytes: float = ELEMENT_BYTES,
    row_dispersion: FloatArray | float = 0.0,
) -> GroupedGemmParts:
    """Take :func:`grouped_gemm_time_s` apart for one case.

    Parameters
    ----------
    parameters : MoeParameters
        The formula's numbers.
    machine : MoeMachine
        Figures of the device.
    shape : tuple of ndarray
        Rows, columns and inner length of one case, shape ().
    groups : ndarray
        Experts.
    operand_bytes : float, optional
        Bytes of an element of rows and weights.
    row_dispersion : ndarray or float, optional
        Variance of the groups' rows over their mean.

    Returns
    -------
    GroupedGemmParts
        Terms of the tile with the least time.
    """
    rows, columns, inner = shape
    load, power = _group_load(rows, groups, row_dispersion), parameters.overlap_exponent
    stream_s = float(_stream_s(parameters, machine, load, shape[1:], UNCACHED, operand_bytes=operand_bytes))
    latency_s = float(parameters.chunk_s * inner / CHUNK)
    found = []
    for tile in _tiles():
        compute_s, waves = (float(x) for x in _tile_times(parameters, machine, load, columns, inner, tile))
        waves_s = parameters.wave_s * waves
        time_s = (compute_s**power + stream_s**power + latency_s**power) ** (1.0 / power) + waves_s
        found.append((time_s, (TILE_ROWS[tile[0]], tile[1]), compute_s, waves_s))
    _, best_tile, compute_s, waves_s = min(found)
    return GroupedGemmParts(best_tile, compute_s, stream_s, latency_s, waves_s)


def moe_coordinates(shapes: MoeShapes, load: RankLoad) -> dict[str, FloatArray]:
    """Values the residual grids may depend on: binary logarithms, but for ``unevenness`` and ``ragged``.

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
        ``active_experts``, ``tokens``, ``slots`` (rows), ``expert_ranks``, ``slab`` (bytes of an expert's first
        matrices), ``weights`` (bytes of the experts hit), ``activations`` (bytes of tokens and of rows in and out),
        ``working_set`` (bytes), ``unevenness`` and ``ragged`` (1 where the local inner size is no multiple of CHUNK).
    """
    columns = {
        "expert_tokens": load.slots / np.maximum(load.active_experts, 1.0),
        "inter": shapes.local_inter,
        "hidden": shapes.hidden,
        "experts": shapes.num_experts,
        "local_experts": shapes.local_experts,
        "active_experts": load.active_experts,
        "tokens": shapes.tokens,
        "slots": load.slots,
        "expert_ranks": shapes.expert,
        "weights": ELEMENT_BYTES * load.active_experts * shapes.hidden * shapes.local_inter * shapes.projections,
        "activations": ELEMENT_BYTES * (shapes.tokens + 2.0 * load.slots) * shapes.hidden,
        "slab": ELEMENT_BYTES * (shapes.projections - 1.0) * shapes.local_inter * shapes.hidden,
        "working_set": _working_set(shapes, load, 1.0),
    }
    shape = np.broadcast_shapes(*(np.shape(column) for column in columns.values()))
    logs = {name: np.broadcast_to(np.log2(np.maximum(column, 1.0)), shape) for name, column in columns.items()}
    ragged = np.where(shapes.local_inter % CHUNK != 0.0, 1.0, 0.0)
    return {**logs, "unevenness": np.broadcast_to(load.unevenness, shape), "ragged": np.broadcast_to(ragged, shape)}


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
    ratio = np.exp(residual(surface.grids, moe_coordinates(shapes, load)))
    return np.asarray(np.maximum(time_s * ratio, moe_flops(shapes, load) / surface.machine.peak_flop_per_s))


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
    return is_within(surface.domain, shapes)
