"""Time of a GEMM from a fitted efficiency surface: a formula with 14 numbers times a small grid of residuals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.structure.columns import FloatArray

TILES = (
    (16, 64), (16, 128), (32, 64), (32, 128), (64, 32), (64, 64), (64, 128), (64, 256), (128, 32), (128, 64),
    (128, 128), (128, 256), (256, 64), (256, 128),
)  # fmt: skip
"""Output tiles (rows, columns) a library may choose from."""
SPLITS = (1, 2, 4, 8, 16, 32)
"""Parts the main loop over k may be split into."""
CHUNK = 64
"""Length of k one iteration of the main loop covers; also the alignment of n and k."""
ELEMENT_BYTES = 2.0
COPIED_ELEMENTS = 8
"""Elements of 16 bytes: what a row must be a multiple of for wide copies."""
FEW_SIZES = 1024
"""Sizes up to which all tiles are tried at once: many calls on small arrays would cost more than the arithmetic."""
FIGURE_TOLERANCE = 1e-3
"""Relative difference up to which figures of two machines count as the same."""


@dataclass(frozen=True)
class GemmMachine:
    """Datasheet figures in SI: dense peak at the precision, memory bandwidth, SMs, L2 cache."""

    peak_flop_rate: float
    memory_bandwidth: float
    compute_units: float
    l2_cache_bytes: float


def are_same_figures(one: GemmMachine, other: GemmMachine) -> bool:
    """Whether peak, bandwidth and units agree: residual grids hold for one machine, formulas for all."""
    pairs = (
        (one.peak_flop_rate, other.peak_flop_rate),
        (one.memory_bandwidth, other.memory_bandwidth),
        (one.compute_units, other.compute_units),
    )
    return all(math.isclose(a, b, rel_tol=FIGURE_TOLERANCE) for a, b in pairs)


@dataclass(frozen=True)
class GemmCore:
    """Constants of the formula; see :func:`core_time_s`.

    Times: ``launch_s`` per kernel, ``chunk_latency_s`` of one iteration of the main loop, ``split_s`` of joining a
    split main loop. Fractions: ``compute_fraction`` of peak, ``memory_fraction`` of bandwidth, ``wave_softness`` and
    ``tile_softness`` (0: whole waves and tiles; 1: proportional), ``cached_activations`` and ``cached_weights`` (share
    of the traffic of operands that fit the L2 cache that still costs memory bandwidth). ``prologue_length`` is in
    elements of k, ``l2_ratio`` the bandwidth of L2 over that of memory; the cache stops helping between
    ``cache_start`` and ``cache_start`` × (1 + ``cache_width``) times its size. ``overlap_exponent`` is p.
    """

    launch_s: float
    compute_fraction: float
    memory_fraction: float
    chunk_latency_s: float
    prologue_length: float
    split_s: float
    wave_softness: float
    tile_softness: float
    overlap_exponent: float
    l2_ratio: float
    cached_activations: float
    cached_weights: float
    cache_start: float
    cache_width: float


@dataclass(frozen=True)
class ResidualGrid:
    """log(measured / formula) at knots of log2 m, n, k; trilinear between them, constant outside.

    ``log_ratio`` has shape (m knots, n knots, k knots).
    """

    log2_m: tuple[float, ...]
    log2_n: tuple[float, ...]
    log2_k: tuple[float, ...]
    log_ratio: FloatArray

    @property
    def knots(self) -> tuple[tuple[float, ...], ...]:
        """Knots of the three axes."""
        return (self.log2_m, self.log2_n, self.log2_k)


@dataclass(frozen=True)
class Domain:
    """Sizes the fit saw, smallest and largest of each."""

    m: tuple[float, float]
    n: tuple[float, float]
    k: tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """Half width of the interval of log(measured / predicted), by predicted time.

    ``edges_s`` part the predicted times, ``half_widths`` has one more number.
    """

    edges_s: tuple[float, ...]
    half_widths: tuple[float, ...]
    level: float


@dataclass(frozen=True)
class GemmSurface:
    """GEMM times of a device: formula × residual grid × misalignment.

    ``penalty_n`` and ``penalty_k``, both >= 1, apply where n or k is not a multiple of 64; such shapes have a spread of
    their own. ``penalty_unaligned`` goes before them where rows of n or k elements are no multiples of 16 bytes, which
    the copy engines of a GPU need.
    """

    machine: GemmMachine
    core: GemmCore
    grid: ResidualGrid
    penalty_n: float
    penalty_k: float
    domain: Domain
    spread: Spread
    misaligned_spread: Spread
    penalty_unaligned: float = 1.0

    def time_s(
        self,
        m: npt.ArrayLike,
        n: npt.ArrayLike,
        k: npt.ArrayLike,
        machine: GemmMachine | None = None,
        *,
        groups: npt.ArrayLike = 1.0,
        operand_bytes: float = ELEMENT_BYTES,
    ) -> FloatArray:
        """Time of ``groups`` products A[m, k] W[n, k]^T in one kernel.

        Parameters
        ----------
        m, n, k : array_like
            Sizes of one product, of shapes that broadcast. A size of 0 is no work and takes no time; m below 1 counts
            as 1.
        machine : GemmMachine, optional
            Figures at another precision. Where peak, bandwidth or units differ from the surface's, the formula alone
            answers: the grid was fitted for one machine.
        groups : array_like, optional
            Products of a batched kernel; the tables have 1 only.
        operand_bytes : float, optional
            Bytes of an element of A and W.

        Returns
        -------
        ndarray
            Seconds, of the shape the sizes broadcast to. Never below 2 groups m n k / peak.

        Notes
        -----
        Never falls as m grows, nor as n or k grow in multiples of 64: the formula never falls, and the grid was fitted
        under the constraint that it falls nowhere faster than the formula rises.
        """
        used = machine or self.machine
        sizes = (np.asarray(size, dtype=np.float64) for size in (m, n, k, groups))
        rows, columns, inner, products = np.broadcast_arrays(*sizes)
        one = tuple(np.maximum(size, 1.0) for size in (rows, columns, inner))
        time_s = core_time_s(self.core, used, *one, groups=products, operand_bytes=operand_bytes)
        if are_same_figures(used, self.machine):
            time_s = time_s * np.exp(grid_value(self.grid, *one))
        time_s = time_s * self.misalignment(columns, inner)
        flops = 2.0 * products * rows * columns * inner
        return np.asarray(np.maximum(time_s, flops / used.peak_flop_rate) * (flops > 0))

    def misalignment(self, n: npt.ArrayLike, k: npt.ArrayLike) -> FloatArray:
        """Penalty >= 1 on the time where n or k is no multiple of 64, or of 8."""
        penalty_n = np.where(np.mod(n, CHUNK) != 0, self.penalty_n, 1.0)
        penalty = penalty_n * np.where(np.mod(k, CHUNK) != 0, self.penalty_k, 1.0)
        is_unaligned = (np.mod(n, COPIED_ELEMENTS) != 0) | (np.mod(k, COPIED_ELEMENTS) != 0)
        return np.asarray(np.where(is_unaligned, np.maximum(penalty, self.penalty_unaligned), penalty))

    def half_width(self, time_s: npt.ArrayLike, is_aligned: npt.ArrayLike = True) -> FloatArray:
        """Half width of the interval: the measured time lies in ``time_s`` × exp(± half width)."""
        widths = []
        for spread in (self.spread, self.misaligned_spread):
            bins = np.searchsorted(np.asarray(spread.edges_s), np.asarray(time_s), side="right")
            widths.append(np.asarray(spread.half_widths)[bins])
        return np.where(is_aligned, *widths)

    def is_inside_domain(self, m: npt.ArrayLike, n: npt.ArrayLike, k: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether the sizes lie between the smallest and the largest the fit saw."""
        pairs = ((m, self.domain.m), (n, self.domain.n), (k, self.domain.k))
        inside = [(np.asarray(size) >= low) & (np.asarray(size) <= high) for size, (low, high) in pairs]
        return np.asarray(inside[0] & inside[1] & inside[2])

    def to_json(self) -> dict[str, Any]:
        """Return the surface as a JSON object; :func:`gemm_surface_from_json` reads it."""
        grid = {f"log2_{axis}": list(knots) for axis, knots in zip("mnk", self.grid.knots, strict=True)}
        return {
            "machine": asdict(self.machine),
            "core": asdict(self.core),
            "grid": {**grid, "log_ratio": self.grid.log_ratio.tolist()},
            "penalty_n": self.penalty_n,
            "penalty_k": self.penalty_k,
            "domain": {axis: list(limits) for axis, limits in asdict(self.domain).items()},
            "spread": _spread_json(self.spread),
            "misaligned_spread": _spread_json(self.misaligned_spread),
        }


def _spread_json(spread: Spread) -> dict[str, Any]:
    return {"edges_s": list(spread.edges_s), "half_widths": list(spread.half_widths), "level": spread.level}


def _spread(data: Mapping[str, Any]) -> Spread:
    return Spread(tuple(data["edges_s"]), tuple(data["half_widths"]), float(data["level"]))


def gemm_surface_from_json(data: Mapping[str, Any]) -> GemmSurface:
    """Build a surface from its JSON object; keys it does not need, such as the provenance, are ignored.

    Parameters
    ----------
    data : mapping
        What :meth:`GemmSurface.to_json` returned.

    Returns
    -------
    GemmSurface
        The surface.
    """
    grid, domain = data["grid"], data["domain"]
    ratio = np.asarray(grid["log_ratio"], dtype=np.float64)
    knots = [tuple(float(knot) for knot in grid[f"log2_{axis}"]) for axis in "mnk"]
    if ratio.shape != tuple(len(axis) for axis in knots):
        raise ValueError(f"the grid has shape {ratio.shape}, its knots ask for {tuple(len(axis) for axis in knots)}")
    limits = {axis: (float(domain[axis][0]), float(domain[axis][1])) for axis in "mnk"}
    return GemmSurface(
        machine=GemmMachine(**data["machine"]),
        core=GemmCore(**data["core"]),
        grid=ResidualGrid(knots[0], knots[1], knots[2], ratio),
        penalty_n=float(data["penalty_n"]),
        penalty_k=float(data["penalty_k"]),
        domain=Domain(limits["m"], limits["n"], limits["k"]),
        spread=_spread(data["spread"]),
        misaligned_spread=_spread(data["misaligned_spread"]),
    )


def core_time_s(
    core: GemmCore,
    machine: GemmMachine,
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
    *,
    groups: FloatArray | float = 1.0,
    operand_bytes: float = ELEMENT_BYTES,
) -> FloatArray:
    """Time of ``groups`` products A[m, k] W[n, k]^T by the formula alone.

    Parameters
    ----------
    core : GemmCore
        Fitted constants.
    machine : GemmMachine
        Datasheet figures: peak P, bandwidth B, S compute units.
    m, n, k : ndarray
        Sizes of one shape, >= 1.
    groups : ndarray or float, optional
        Products of one batched kernel, g below.
    operand_bytes : float, optional
        Bytes of an element of A and W; results have 2.

    Returns
    -------
    ndarray
        Seconds, of the sizes' shape.

    Notes
    -----
    The least over tiles (a, b) and splits s of the main loop of

    t = launch + (compute^p + memory^p + latency^p + l2^p)^(1/p) + [s > 1] (split + 2 g m n s / B),
    tiles = g soft(m / a) soft(n / b);  waves = soft(tiles s / S);  chunks = max(k / (64 s), 1)
    compute = waves (64 chunks + prologue) 2 a b S / (P compute_fraction)
    latency = chunks chunk_latency;  l2 = 2 tiles k (a + b) / (B l2_ratio)
    memory = (weights f(weights) + activations f(activations)) / (B memory_fraction).

    soft(x) lies between ceil(x) (softness 0) and max(x, 1) (softness 1); f rises from the cached share to 1 as the
    operands outgrow the L2 cache: the tables' bench rotated weights and reused activations. No term falls as m, n or
    k grows and the candidates do not depend on them, so neither does the time. Groups fill waves together.
    """
    common, joining = _split_terms(core, machine, (m, n, k), groups, operand_bytes)
    least = np.full(np.shape(common), math.inf)
    at_once = len(TILES) if np.size(m) <= FEW_SIZES else 1
    for start in range(0, len(TILES), at_once):  # the least before the root, which is the same for all tiles
        terms = _tile_terms(core, machine, (m, n, k), groups, TILES[start : start + at_once])
        least = np.minimum(least, terms.min(axis=0))
    times_s = core.launch_s + (least + common) ** (1.0 / core.overlap_exponent) + joining
    return np.asarray(times_s.min(axis=0))


def candidate_times_s(
    core: GemmCore,
    machine: GemmMachine,
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
    *,
    groups: FloatArray | float = 1.0,
    operand_bytes: float = ELEMENT_BYTES,
) -> Iterator[FloatArray]:
    """Times of one tile after another, each of shape (n_splits, ...); :func:`core_time_s` is the least of them."""
    common, joining = _split_terms(core, machine, (m, n, k), groups, operand_bytes)
    for tile in TILES:
        (term,) = _tile_terms(core, machine, (m, n, k), groups, (tile,))
        yield core.launch_s + (term + common) ** (1.0 / core.overlap_exponent) + joining


Extents = tuple[FloatArray, FloatArray, FloatArray]
Tiles = Sequence[tuple[int, int]]


def _splits(m: FloatArray) -> FloatArray:
    """Splits along a new first axis."""
    return np.array(SPLITS, dtype=np.float64).reshape(-1, *(1,) * np.ndim(m))


def _split_terms(
    core: GemmCore, machine: GemmMachine, sizes: Extents, groups: FloatArray | float, operand_bytes: float
) -> tuple[FloatArray, FloatArray]:
    """latency^p + memory^p and the time of joining, which depend on the split alone; shape (n_splits, ...)."""
    m, n, k = sizes
    splits, p = _splits(m), core.overlap_exponent
    latency_s = core.chunk_latency_s * np.maximum(k / (CHUNK * splits), 1.0)
    joined = ELEMENT_BYTES * (groups * m * n) * splits
    joining = (splits > 1) * (core.split_s + joined / machine.memory_bandwidth)
    return latency_s**p + memory_time_s(core, machine, sizes, groups, operand_bytes) ** p, joining


def _tile_terms(
    core: GemmCore, machine: GemmMachine, sizes: Extents, groups: FloatArray | float, tiles: Tiles
) -> FloatArray:
    """compute^p + l2^p of some tiles, of shape (n_tiles, n_splits, ...)."""
    compute_s, l2_s = _tile_times(core, machine, sizes, groups, tiles)
    return np.asarray(compute_s**core.overlap_exponent + l2_s**core.overlap_exponent)


def _tile_times(
    core: GemmCore, machine: GemmMachine, sizes: Extents, groups: FloatArray | float, tiles: Tiles
) -> tuple[FloatArray, FloatArray]:
    """``compute``, of shape (n_tiles, n_splits, ...), and ``l2``, (n_tiles, 1, ...), of some tiles."""
    m, n, k = sizes
    splits = _splits(m)
    tile_m, tile_n = np.array(tiles, dtype=np.float64).T.reshape(2, -1, *(1,) * splits.ndim)
    number = groups * _soft_ceil(m / tile_m, core.tile_softness) * _soft_ceil(n / tile_n, core.tile_softness)
    waves = _soft_ceil(number * splits / machine.compute_units, core.wave_softness)
    rate = machine.peak_flop_rate * core.compute_fraction / (2.0 * tile_m * tile_n * machine.compute_units)
    loop_length = CHUNK * np.maximum(k / (CHUNK * splits), 1.0) + core.prologue_length
    l2_bytes = ELEMENT_BYTES * number * k * (tile_m + tile_n)
    return waves * loop_length / rate, np.asarray(l2_bytes / (machine.memory_bandwidth * core.l2_ratio))


@dataclass(frozen=True)
class CoreParts:
    """Terms of the best tile and split of one product or batch: what :func:`core_time_s` is made of, scalars."""

    tile: tuple[int, int]
    split: int
    compute_s: float
    memory_s: float
    latency_s: float
    l2_s: float
    joining_s: float


def core_parts(
    core: GemmCore,
    machine: GemmMachine,
    sizes: Extents,
    *,
    groups: FloatArray | float = 1.0,
    operand_bytes: float = ELEMENT_BYTES,
) -> CoreParts:
    """Take :func:`core_time_s` apart for one case.

    Parameters
    ----------
    core : GemmCore
        Fitted constants.
    machine : GemmMachine
        Datasheet figures.
    sizes : tuple of ndarray
        Sizes m, n and k of one case, shape ().
    groups : ndarray or float, optional
        Products of one batched kernel.
    operand_bytes : float, optional
        Bytes of an element of A and W.

    Returns
    -------
    CoreParts
        Terms of the candidate with the least time.
    """
    m, n, k = sizes
    times = np.stack(list(candidate_times_s(core, machine, m, n, k, groups=groups, operand_bytes=operand_bytes)))
    tile_index, split_index = (int(at) for at in np.unravel_index(np.argmin(times), times.shape))
    split = SPLITS[split_index]
    compute_s, l2_s = _tile_times(core, machine, sizes, groups, (TILES[tile_index],))
    _, joining = _split_terms(core, machine, sizes, groups, operand_bytes)
    return CoreParts(
        tile=TILES[tile_index],
        split=split,
        compute_s=float(compute_s[0, split_index]),
        memory_s=float(memory_time_s(core, machine, sizes, groups, operand_bytes)),
        latency_s=core.chunk_latency_s * max(float(k) / (CHUNK * split), 1.0),
        l2_s=float(l2_s[0, 0]),
        joining_s=float(joining[split_index]),
    )


def memory_time_s(
    core: GemmCore,
    machine: GemmMachine,
    sizes: Extents,
    groups: FloatArray | float = 1.0,
    operand_bytes: float = ELEMENT_BYTES,
) -> FloatArray:
    """Time of the traffic to memory that the L2 cache does not save: the formula's ``memory``.

    Parameters
    ----------
    core : GemmCore
        Fitted constants.
    machine : GemmMachine
        Datasheet figures.
    sizes : tuple of ndarray
        Sizes m, n and k, of one shape.
    groups : ndarray or float, optional
        Products of one batched kernel.
    operand_bytes : float, optional
        Bytes of an element of A and W.

    Returns
    -------
    ndarray
        Seconds, of the sizes' shape.
    """
    m, n, k = sizes
    weights = operand_bytes * groups * n * k
    activations = groups * m * (ELEMENT_BYTES * n + operand_bytes * k)
    fill = (weights + activations) / (machine.l2_cache_bytes * core.cache_start)
    missed = np.clip((fill - 1.0) / core.cache_width, 0.0, 1.0)
    shares = [cached + (1.0 - cached) * missed for cached in (core.cached_weights, core.cached_activations)]
    read = weights * shares[0] + activations * shares[1]
    return np.asarray(read / (machine.memory_bandwidth * core.memory_fraction))


def _soft_ceil(x: FloatArray, softness: float) -> FloatArray:
    whole = np.ceil(x)
    return np.asarray(whole + softness * (np.maximum(x, 1.0) - whole))


def grid_value(grid: ResidualGrid, m: FloatArray, n: FloatArray, k: FloatArray) -> FloatArray:
    """Trilinear interpolation of the grid at log2 of the sizes.

    Parameters
    ----------
    grid : ResidualGrid
        Knots and values.
    m, n, k : ndarray
        Sizes of one shape, >= 1.

    Returns
    -------
    ndarray
        Value of the grid, of the sizes' shape.
    """
    corners, weights = grid_corners(grid.knots, m, n, k)
    values = grid.log_ratio.ravel()
    total = np.zeros(np.shape(m))
    for corner, weight in zip(corners, weights, strict=True):  # one order of adding, however many sizes there are
        total = total + weight * values[corner]
    return np.asarray(total)


def grid_corners(
    knots: Sequence[Sequence[float]], m: FloatArray, n: FloatArray, k: FloatArray
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Corners of the cell that holds each size, and their weights.

    Parameters
    ----------
    knots : sequence of 3 sequences of float
        Knots of log2 m, n, k, increasing, at least two each.
    m, n, k : ndarray
        Sizes of one shape, >= 1.

    Returns
    -------
    corners : ndarray of shape (8, ...)
        Flat index into the grid of values.
    weights : ndarray of shape (8, ...)
        Weights >= 0 that sum to 1.
    """
    shape = np.shape(m)
    corners = np.zeros((1, *shape), dtype=np.int64)
    weights = np.ones((1, *shape))
    for axis_knots, size in zip(knots, (m, n, k), strict=True):
        at = np.asarray(axis_knots, dtype=np.float64)
        place = np.clip(np.log2(size), at[0], at[-1])
        cell = np.clip(np.searchsorted(at, place, side="right") - 1, 0, at.size - 2)
        share = (place - at[cell]) / (at[cell + 1] - at[cell])
        corners = np.concatenate([corners * at.size + cell, corners * at.size + cell + 1])
        weights = np.concatenate([weights * (1.0 - share), weights * share])
    return corners, weights
