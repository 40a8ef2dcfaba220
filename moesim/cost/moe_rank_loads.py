"""Fused MoE layers, and the tokens their experts serve on the timed rank: balanced, a drawn power law, or counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesim.structure.columns import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
Remainder = Literal["idle_experts", "spread_experts", "busy_experts"]
"""Who gets the tokens that rounding a power-law draw leaves over."""

UNGATED_KERNEL = "moe_torch_flow_nongated"
"""Kernel source of experts without a gate."""
TILE_ROWS = (16, 32, 64, 128, 256)
"""Rows of the output tiles a grouped GEMM may choose from."""
DRAWS = 16
"""Draws of a power law that are averaged."""
STEEPEST = 10.0
"""Largest exponent of a power law that has a name."""
HARMONIC = 1e-9
"""Stands for 1 - exponent at exponent 1, whose inverse CDF is the limit."""


@dataclass(frozen=True)
class MoeShapes:
    """Fused MoE layers, arrays that broadcast to (...,).

    Attributes
    ----------
    tokens : ndarray
        Tokens routed, of all ranks of the expert group.
    hidden, inter : ndarray
        Hidden size, and intermediate size of an expert before it is split.
    experts_per_token, num_experts : ndarray
        Experts a token chooses, and experts of the layer.
    tensor, expert : ndarray
        Ranks an expert is split over, and ranks the experts are spread over.
    projections : ndarray
        Weight matrices of an expert: 3 gated (gate, up, down), 2 not.
    """

    tokens: FloatArray
    hidden: FloatArray
    inter: FloatArray
    experts_per_token: FloatArray
    num_experts: FloatArray
    tensor: FloatArray
    expert: FloatArray
    projections: FloatArray

    @property
    def local_inter(self) -> FloatArray:
        """Intermediate size on one rank."""
        return np.asarray(self.inter / self.tensor)

    @property
    def local_experts(self) -> FloatArray:
        """Experts on one rank."""
        return np.asarray(self.num_experts / self.expert)


@dataclass(frozen=True)
class RankLoad:
    """Tokens the experts of the timed rank serve.

    Attributes
    ----------
    slots : ndarray of shape (...,)
        Token-expert pairs on the rank.
    active_experts : ndarray of shape (...,)
        Experts with at least one token; their weights are read.
    row_tiles : ndarray of shape (..., 5)
        Tiles of ``TILE_ROWS`` rows that cover every expert's tokens.
    unevenness : ndarray of shape (...,)
        Share of the slots that would have to move to make experts equal, 0 to 1.
    """

    slots: FloatArray
    active_experts: FloatArray
    row_tiles: FloatArray
    unevenness: FloatArray


def rank_load_of_counts(counts: FloatArray) -> RankLoad:
    """Load of a rank whose experts' tokens are known.

    Parameters
    ----------
    counts : ndarray of shape (..., experts)
        Tokens of each expert on the rank.

    Returns
    -------
    RankLoad
        Arrays of shape (...,).

    Examples
    --------
    >>> load = rank_load_of_counts(np.array([40.0, 0.0, 8.0]))
    >>> load.row_tiles.tolist(), float(load.active_experts)
    ([4.0, 3.0, 2.0, 2.0, 2.0], 2.0)
    """
    slots = counts.sum(axis=-1)
    tiles = [np.ceil(counts / rows).sum(axis=-1) for rows in TILE_ROWS]
    share = counts / np.maximum(slots, 1.0)[..., None]
    unevenness = 0.5 * np.abs(share - 1.0 / counts.shape[-1]).sum(axis=-1) * (slots > 0)
    return RankLoad(slots, (counts > 0).sum(axis=-1).astype(np.float64), np.stack(tiles, axis=-1), unevenness)


def balanced_rank_load(shapes: MoeShapes) -> RankLoad:
    """Load of the first rank if experts differ by at most one token.

    Parameters
    ----------
    shapes : MoeShapes
        Arrays that broadcast to (...,).

    Returns
    -------
    RankLoad
        Arrays of shape (...,).
    """
    experts = shapes.local_experts
    slots = np.ceil(shapes.tokens * shapes.experts_per_token / shapes.expert)
    low = np.floor(slots / experts)
    extra = slots - low * experts
    tiles = [extra * np.ceil((low + 1.0) / rows) + (experts - extra) * np.ceil(low / rows) for rows in TILE_ROWS]
    unevenness = np.zeros_like(slots)
    return RankLoad(slots, np.where(low > 0, experts, extra), np.stack(tiles, axis=-1), unevenness)


def power_law_counts(
    tokens: int,
    experts_per_token: int,
    num_experts: int,
    expert: int,
    *,
    exponent: float,
    remainder: Remainder = "idle_experts",
    draws: int = DRAWS,
    seed: int = 0,
) -> FloatArray:
    """Tokens of each expert on the most loaded rank, as the tables' bench draws them.

    Parameters
    ----------
    tokens, experts_per_token, num_experts, expert : int
        As in :class:`MoeShapes`.
    exponent : float
        Exponent of the power law.
    remainder : str, optional
        Who gets what rounding leaves over; read off the weights that tables of large experts show were moved.
        ``idle_experts``: Hopper and Blackwell, from one token on. ``spread_experts``: idle ones of all ranks in turn,
        L40S. ``busy_experts``: A100.
    draws, seed : int, optional
        Draws and their seed.

    Returns
    -------
    ndarray of shape (draws, num_experts // expert)
        Tokens of each expert.

    Notes
    -----
    Weights by inverse CDF, x = ((b^c - a^c) u + a^c)^(1/c) with c = 1 - exponent, between a = 1 and b = 0.8 tokens, or
    0.01 and 2 while there are no more choices than experts; scaled to the number of choices and rounded. Missing
    choices go one by one to the experts with fewest tokens (first ones first, or rank by rank in turn) or to those with
    most; surplus ones leave those with most. Above
    ``tokens`` an expert is full; the rest goes to the first experts of the rank that have room.
    """
    generator = np.random.default_rng(seed)
    low, high = (1.0, 0.8 * tokens) if tokens * experts_per_token > num_experts else (0.01, 2.0)
    c = 1.0 - exponent or HARMONIC
    weight = ((high**c - low**c) * generator.random((draws, num_experts)) + low**c) ** (1.0 / c)
    choices = tokens * experts_per_token
    counts = np.round(weight / weight.sum(axis=1, keepdims=True) * choices)
    local = num_experts // expert
    place = np.arange(num_experts)
    turn = place % local * expert + place // local if remainder == "spread_experts" else place
    for row in counts:
        missing = int(choices - row.sum())
        is_for_idle = missing > 0 and remainder != "busy_experts"
        order = np.lexsort((turn, row if is_for_idle else -row))
        np.add.at(row, order[np.arange(abs(missing)) % num_experts], np.sign(missing))
    by_rank = np.maximum(counts, 0.0).reshape(draws, expert, local)
    chosen = by_rank[np.arange(draws), by_rank.sum(axis=2).argmax(axis=1)]
    kept = np.minimum(chosen, tokens)
    surplus = (chosen - kept).sum(axis=1, keepdims=True)
    room = tokens - kept
    before = np.cumsum(room, axis=1) - room
    return np.asarray(kept + np.clip(surplus - before, 0.0, room))


def power_law_rank_load(
    shapes: MoeShapes, exponent: FloatArray, *, remainder: Remainder = "idle_experts", seed: int = 0
) -> RankLoad:
    """Load of the most loaded rank of a power law, averaged over draws.

    Parameters
    ----------
    shapes : MoeShapes
        Whole numbers, arrays that broadcast to (...,).
    exponent : ndarray
        Exponent of the power law of each.
    remainder, seed : optional
        As for :func:`power_law_counts`.

    Returns
    -------
    RankLoad
        Arrays of shape (...,); each distinct routing is drawn once.
    """
    routing = (shapes.tokens, shapes.experts_per_token, shapes.num_experts, shapes.expert, exponent)
    columns = np.broadcast_arrays(*(np.asarray(column, dtype=np.float64) for column in routing))
    shape = columns[0].shape
    keys, inverse = np.unique(np.stack([column.ravel() for column in columns]), axis=1, return_inverse=True)
    loads = []
    for tokens, chosen, experts, ranks, alpha in keys.T:
        sizes = (int(tokens), int(chosen), int(experts), int(ranks))
        loads.append(rank_load_of_counts(power_law_counts(*sizes, exponent=alpha, remainder=remainder, seed=seed)))
    rows = inverse.reshape(shape)
    return RankLoad(
        slots=np.array([load.slots.mean() for load in loads])[rows],
        active_experts=np.array([load.active_experts.mean() for load in loads])[rows],
        row_tiles=np.array([load.row_tiles.mean(axis=0) for load in loads])[rows],
        unevenness=np.array([load.unevenness.mean() for load in loads])[rows],
    )


def power_law_exponent(distribution: str) -> float | None:
    """Exponent of a distribution's name.

    Parameters
    ----------
    distribution : str
        ``balanced`` or ``power_law_<exponent>``.

    Returns
    -------
    float or None
        The exponent; None if balanced.

    Raises
    ------
    ValueError
        If the name is neither.

    Examples
    --------
    >>> power_law_exponent("power_law_1.2")
    1.2
    """
    if distribution == "balanced":
        return None
    prefix, _, text = distribution.rpartition("_")
    try:
        exponent = float(text)
    except ValueError:
        exponent = math.nan
    if prefix != "power_law" or not 0 < exponent <= STEEPEST:
        raise ValueError(f"distribution {distribution!r} is neither 'balanced' nor 'power_law_<exponent>'")
    return exponent


def rank_load_of_distributions(
    shapes: MoeShapes, distributions: npt.NDArray[np.str_], *, remainder: Remainder = "idle_experts"
) -> RankLoad:
    """Load of the timed rank of each row of a table.

    Parameters
    ----------
    shapes : MoeShapes
        Arrays of shape (n_rows,).
    distributions : ndarray of str of shape (n_rows,)
        Names as :func:`power_law_exponent` takes them.
    remainder : str, optional
        As for :func:`power_law_counts`.

    Returns
    -------
    RankLoad
        Arrays of shape (n_rows,).
    """
    balanced = balanced_rank_load(shapes)
    names, inverse = np.unique(distributions, return_inverse=True)
    exponents = [power_law_exponent(str(name)) for name in names]
    is_skewed = np.array([exponent is not None for exponent in exponents])[inverse]
    if not is_skewed.any():
        return balanced
    exponent = np.array([exponent or 0.0 for exponent in exponents])[inverse]
    skewed = power_law_rank_load(
        select_moe_shapes(shapes, np.flatnonzero(is_skewed)), exponent[is_skewed], remainder=remainder
    )
    parts = []
    for even, uneven in zip(_load_fields(balanced), _load_fields(skewed), strict=True):
        field = even.copy()
        field[is_skewed] = uneven
        parts.append(field)
    return RankLoad(*parts)


def _load_fields(load: RankLoad) -> tuple[FloatArray, ...]:
    return load.slots, load.active_experts, load.row_tiles, load.unevenness


def select_moe_shapes(shapes: MoeShapes, rows: IntArray | BoolArray) -> MoeShapes:
    """Keep some rows.

    Parameters
    ----------
    shapes : MoeShapes
        Arrays of shape (n_rows,).
    rows : ndarray of int or bool
        Rows to keep.

    Returns
    -------
    MoeShapes
        Arrays of shape (n_kept,).
    """
    fields = (shapes.tokens, shapes.hidden, shapes.inter, shapes.experts_per_token, shapes.num_experts)
    return MoeShapes(*(field[rows] for field in (*fields, shapes.tensor, shapes.expert, shapes.projections)))


def select_rank_loads(load: RankLoad, rows: IntArray | BoolArray) -> RankLoad:
    """Keep some rows.

    Parameters
    ----------
    load : RankLoad
        Arrays of shape (n_rows,).
    rows : ndarray of int or bool
        Rows to keep.

    Returns
    -------
    RankLoad
        Arrays of shape (n_kept,).
    """
    return RankLoad(*(field[rows] for field in _load_fields(load)))
