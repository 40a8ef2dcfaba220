"""Time of causal prefill attention: eleven numbers of a formula times a residual grid, fitted on measured tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

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

TILE = 64.0
"""Rows of a query tile and of a key tile."""
ELEMENT_BYTES = 2.0
"""Bytes of a bf16 element."""
CACHE_SHARPNESS = 3.0
"""How suddenly operands stop being found in the last-level cache as they outgrow it."""
MAIN_STREAM_FRACTION = 0.85
"""Share of the memory bandwidth a kernel reaches that reads its operands once."""


@dataclass(frozen=True)
class AttentionShapes:
    """Causal attention calls, arrays that broadcast together.

    Attributes
    ----------
    batch, sequence : ndarray
        Sequences and tokens of each; queries and keys are the same tokens.
    heads, kv_heads, head_size : ndarray
        Query heads, key (and value) heads, and elements of one head.
    """

    batch: FloatArray
    sequence: FloatArray
    heads: FloatArray
    kv_heads: FloatArray
    head_size: FloatArray

    @property
    def flops(self) -> FloatArray:
        """Useful FLOPs, 4 d per query and visible key: 2 b h d s (s + 1)."""
        return np.asarray(2.0 * self.batch * self.heads * self.head_size * self.sequence * (self.sequence + 1.0))

    @property
    def operand_bytes(self) -> FloatArray:
        """Bytes of queries, keys, values and result, each moved once."""
        elements = self.batch * self.sequence * self.head_size * 2.0 * (self.heads + self.kv_heads)
        return np.asarray(ELEMENT_BYTES * elements)

    @property
    def working_set_bytes(self) -> FloatArray:
        """Bytes touched besides the result: packed projections (h + 2 kv heads) and the key-value cache (2 kv)."""
        elements = self.batch * self.sequence * self.head_size * (self.heads + 4.0 * self.kv_heads)
        return np.asarray(ELEMENT_BYTES * elements)


@dataclass(frozen=True)
class AttentionParameters:
    """The formula's numbers; :func:`attention_formula_time_s` says what each does.

    The last three are those of a kernel timed by itself; tables of whole operators do not tell them apart.
    """

    fixed_s: float
    compute_fraction: float
    head_64_factor: float
    head_192_factor: float
    head_256_factor: float
    lone_tile_factor: float
    tile_s: float
    extra_passes: float
    token_s: float
    cache_bytes: float
    overlap_exponent: float
    tile_element_s: float = 0.0
    row_bytes: float = 0.0
    stream_exponent: float = 0.0


@dataclass(frozen=True)
class AttentionTimeSurface:
    """Everything that prices causal prefill attention on one device.

    Attributes
    ----------
    peak_flop_per_s, memory_bytes_per_s, compute_units : float
        Datasheet figures the parameters are fractions of.
    parameters : AttentionParameters
        The formula's numbers.
    grids : tuple of ResidualGrid
        Added up, then exponentiated; none leaves the formula alone.
    domain : dict
        Smallest and largest fitted value of each shape field.
    interval_edges_s, interval_half_widths : ndarray
        Bins of predicted time and, one more, the half width of log(measured / predicted) in each.
    """

    device: str
    peak_flop_per_s: float
    memory_bytes_per_s: float
    compute_units: float
    parameters: AttentionParameters
    grids: tuple[ResidualGrid, ...]
    domain: dict[str, tuple[float, float]]
    interval_edges_s: FloatArray
    interval_half_widths: FloatArray


class AttentionDocument(TypedDict):
    """A surface as JSON holds it; other keys (provenance) are for readers."""

    device: str
    figures: dict[str, float]
    parameters: dict[str, float]
    grids: list[GridDocument]
    domain: dict[str, list[float]]
    interval: IntervalDocument


def attention_surface_from_document(document: AttentionDocument) -> AttentionTimeSurface:
    """Build a surface from what its JSON file holds.

    Parameters
    ----------
    document : dict
        As ``json.load`` gives it.

    Returns
    -------
    AttentionTimeSurface
        The surface.
    """
    return AttentionTimeSurface(
        device=document["device"],
        **document["figures"],
        parameters=AttentionParameters(**document["parameters"]),
        grids=grids_from_documents(document["grids"]),
        domain={name: (low, high) for name, (low, high) in document["domain"].items()},
        interval_edges_s=np.array(document["interval"]["edges_s"], dtype=np.float64),
        interval_half_widths=np.array(document["interval"]["half_widths"], dtype=np.float64),
    )


def attention_formula_time_s(
    parameters: AttentionParameters,
    shapes: AttentionShapes,
    *,
    peak_flop_per_s: float,
    memory_bytes_per_s: float,
    compute_units: float,
) -> FloatArray:
    """Time of causal prefill attention without the residual grid.

    Parameters
    ----------
    parameters : AttentionParameters
        The formula's numbers.
    shapes : AttentionShapes
        The calls, arrays that broadcast to (...,).
    peak_flop_per_s, memory_bytes_per_s, compute_units : float
        P, B and S below.

    Returns
    -------
    ndarray of shape (...,)
        Seconds.

    Notes
    -----
    With nq = ceil(s / 64) query tiles, b h nq tiles in all, F = 4 d 64² b h nq (nq + 1) / 2 padded FLOPs (a diagonal
    tile costs a whole one) and an attained rate Pe = P · compute_fraction · (factor of the head size)::

        tt = tile_s + tile_element_s 64 d                        beginning and end of a row of tiles
        tc = F / Pe + tt b h nq / S                              all tiles over all compute units
        tl = tt + lone_tile_factor 4 nq 64² d S / Pe             the longest row of tiles on one compute unit
        tm = f 4 b s d (h + kv) / (0.85 B)                       operands and result once
        tk = ((tc^p + tl^p)^(q/p) + tm^q)^(1/q)                  the kernel
        T  = fixed_s + tk + token_s b s + f (extra_passes 2 b s d (h + 2 kv) / B + row_bytes b s d h / (0.85 B))

    f = 1 / (1 + (cache_bytes / (2 b s d (h + 4 kv)))³) is the share of traffic the last-level cache does not serve: the
    benchmark repeats a call on the same operands. It matters where the cache is large and memory slow (L40S, where the
    fit finds 70 MB of the 96 MB there are). The last two terms are what the measured operator does around the kernel
    (it is a framework's whole operator, hence also the ten microseconds of ``fixed_s``). The factor of the head size is
    1 at 128, linear in log d between its values at 64, 192 and 256, constant outside. Not meant for decoding, nor for
    keys other than the queries' own tokens.

    Kernels timed by themselves tell more: q is ``stream_exponent`` (p where that is 0), as their copies run beside the
    products; ``row_bytes`` per query element are moved by kernels around a backward pass, which do not (see
    ``moesim.study.kernel_calibration``).
    """
    parts = attention_parts(
        parameters,
        shapes,
        peak_flop_per_s=peak_flop_per_s,
        memory_bytes_per_s=memory_bytes_per_s,
        compute_units=compute_units,
    )
    return np.asarray(parameters.fixed_s + kernel_s(parameters, parts) + parts.around_s)


@dataclass(frozen=True)
class AttentionParts:
    """Terms of :func:`attention_formula_time_s`: tc, tl, tm and what stands around the kernel; shape (...,)."""

    full_s: FloatArray
    lone_s: FloatArray
    stream_s: FloatArray
    around_s: FloatArray


def kernel_s(parameters: AttentionParameters, parts: AttentionParts) -> FloatArray:
    """Terms of the kernel joined: tk of :func:`attention_formula_time_s`, shape (...,)."""
    power = parameters.overlap_exponent
    stream_power = parameters.stream_exponent or power
    longest = np.maximum(np.maximum(parts.full_s, parts.lone_s), parts.stream_s)
    full, lone, stream = (part / longest for part in (parts.full_s, parts.lone_s, parts.stream_s))
    tiles = full**power + lone**power
    joined = tiles if stream_power == power else tiles ** (stream_power / power)
    return np.asarray(longest * (joined + stream**stream_power) ** (1.0 / stream_power))


def attention_parts(
    parameters: AttentionParameters,
    shapes: AttentionShapes,
    *,
    peak_flop_per_s: float,
    memory_bytes_per_s: float,
    compute_units: float,
) -> AttentionParts:
    """Terms of :func:`attention_formula_time_s`, which says what they are.

    Parameters
    ----------
    parameters : AttentionParameters
        The formula's numbers.
    shapes : AttentionShapes
        The calls, arrays that broadcast to (...,).
    peak_flop_per_s, memory_bytes_per_s, compute_units : float
        Figures of the device.

    Returns
    -------
    AttentionParts
        Arrays of shape (...,).
    """
    tiles = np.ceil(shapes.sequence / TILE)
    all_tiles = shapes.batch * shapes.heads * tiles
    tile_flops = 4.0 * shapes.head_size * TILE**2
    head_factors = (parameters.head_64_factor, 1.0, parameters.head_192_factor, parameters.head_256_factor)
    head_factor = np.interp(np.log2(shapes.head_size), np.log2((64.0, 128.0, 192.0, 256.0)), head_factors)
    rate = peak_flop_per_s * parameters.compute_fraction * head_factor
    tile_s = parameters.tile_s + parameters.tile_element_s * TILE * shapes.head_size
    full_s = tile_flops * all_tiles * (tiles + 1.0) / 2.0 / rate + tile_s * all_tiles / compute_units
    lone_s = tile_s + parameters.lone_tile_factor * tiles * tile_flops * compute_units / rate
    tokens = shapes.batch * shapes.sequence
    missed = 1.0 / (1.0 + (parameters.cache_bytes / shapes.working_set_bytes) ** CACHE_SHARPNESS)
    stream_s = missed * shapes.operand_bytes / (MAIN_STREAM_FRACTION * memory_bytes_per_s)
    pass_bytes = ELEMENT_BYTES * tokens * shapes.head_size * (shapes.heads + 2.0 * shapes.kv_heads)
    row_bytes = parameters.row_bytes * tokens * shapes.head_size * shapes.heads
    copied_s = parameters.extra_passes * pass_bytes / memory_bytes_per_s
    copied_s = copied_s + row_bytes / (MAIN_STREAM_FRACTION * memory_bytes_per_s)
    around_s = parameters.token_s * tokens + missed * copied_s
    return AttentionParts(*(np.asarray(part) for part in (full_s, lone_s, stream_s, around_s)))


def attention_coordinates(shapes: AttentionShapes) -> dict[str, FloatArray]:
    """Binary logarithms of what a residual grid may depend on.

    Parameters
    ----------
    shapes : AttentionShapes
        The calls, arrays that broadcast to (...,).

    Returns
    -------
    dict
        ``sequence`` (rounded up to whole tiles above one tile, as the formula has it, so that the residual is constant
        where the formula is), ``batch``, ``batch_heads``, ``group`` (query heads per key head), ``head_size`` and
        ``working_set``.
    """
    is_tiled = shapes.sequence > TILE
    padded = np.where(is_tiled, np.ceil(shapes.sequence / TILE) * TILE, shapes.sequence)
    return {
        "sequence": np.log2(padded),
        "batch": np.log2(shapes.batch),
        "batch_heads": np.log2(shapes.batch * shapes.heads),
        "group": np.log2(shapes.heads / shapes.kv_heads),
        "head_size": np.log2(shapes.head_size),
        "working_set": np.log2(shapes.working_set_bytes),
    }


def attention_time_s(surface: AttentionTimeSurface, shapes: AttentionShapes) -> FloatArray:
    """Time of causal prefill attention.

    Parameters
    ----------
    surface : AttentionTimeSurface
        The device's numbers.
    shapes : AttentionShapes
        The calls, arrays that broadcast to (...,).

    Returns
    -------
    ndarray of shape (...,)
        Seconds: :func:`attention_formula_time_s` times exp(sum of the grids), never less than the useful FLOPs take
        at the peak rate, or what the cache cannot hold of the operands at the peak bandwidth.

    Notes
    -----
    Grids are clamped outside their knots, where the formula alone extrapolates.
    """
    time_s = attention_formula_time_s(
        surface.parameters,
        shapes,
        peak_flop_per_s=surface.peak_flop_per_s,
        memory_bytes_per_s=surface.memory_bytes_per_s,
        compute_units=surface.compute_units,
    )
    log_ratio = attention_residual(surface, shapes)
    moved = shapes.operand_bytes - surface.parameters.cache_bytes
    floor_s = np.maximum(shapes.flops / surface.peak_flop_per_s, moved / surface.memory_bytes_per_s)
    return np.asarray(np.maximum(time_s * np.exp(log_ratio), floor_s))


def attention_residual(surface: AttentionTimeSurface, shapes: AttentionShapes) -> FloatArray:
    """Sum of the residual grids at some calls: log of the time over the formula's.

    Parameters
    ----------
    surface : AttentionTimeSurface
        The device's numbers.
    shapes : AttentionShapes
        The calls, arrays that broadcast to (...,).

    Returns
    -------
    ndarray of shape (...,)
        Values.
    """
    return residual(surface.grids, attention_coordinates(shapes))


def attention_half_widths(surface: AttentionTimeSurface, time_s: FloatArray) -> FloatArray:
    """Half width of the 90 % interval: the measured time lies in predicted × exp(± half width).

    Parameters
    ----------
    surface : AttentionTimeSurface
        The device's numbers.
    time_s : ndarray of shape (...,)
        Predicted times.

    Returns
    -------
    ndarray of shape (...,)
        Half widths of log(measured / predicted).
    """
    return surface.interval_half_widths[np.searchsorted(surface.interval_edges_s, time_s, side="right")]


def is_in_attention_domain(surface: AttentionTimeSurface, shapes: AttentionShapes) -> BoolArray:
    """Whether calls lie within the range of the fitted ones, field by field.

    Parameters
    ----------
    surface : AttentionTimeSurface
        The device's numbers.
    shapes : AttentionShapes
        The calls, arrays that broadcast to (...,).

    Returns
    -------
    ndarray of bool of shape (...,)
        False where a field leaves the fitted range.
    """
    return is_within(surface.domain, shapes)
