"""Rank order -> strides of process groups -> which links of the fabric a group spans.

Ranks are numbered with the fastest mesh dimension first and devices are filled in the same order, innermost level
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import Columns, FloatArray

MOST_RANKS = 1_000_000
"""Ranks that a text may name."""
MESH_COLUMN: dict[str, str] = {
    "tensor": "tensor",
    "context": "context",
    "data": "data",
    "pipeline": "stages",
    "expert_tensor": "expert_tensor",
    "expert": "expert",
    "expert_data": "expert_data",
}


@dataclass(frozen=True)
class ProcessGroup:
    """Ranks ``r, r + stride, ..., r + (size - 1) * stride``; arrays of shape (n_cases,).

    ``dimension`` is the mesh dimension in which they differ, empty where it is none of them.
    """

    size: FloatArray
    stride: FloatArray
    dimension: str = ""


def dense_mesh(rank_order: Sequence[str]) -> tuple[str, ...]:
    """Mesh of the non-expert parameters: the expert dimension is folded into data."""
    return tuple(dimension for dimension in rank_order if dimension != "expert")


def expert_mesh(rank_order: Sequence[str]) -> tuple[str, ...]:
    """Mesh of the experts: expert_tensor stands where tensor stood, expert_data where data stood; context is folded."""
    renamed = {"tensor": "expert_tensor", "data": "expert_data"}
    return tuple(renamed.get(dimension, dimension) for dimension in rank_order if dimension != "context")


def group_columns(rank_order: Sequence[str], dimension: str) -> tuple[str, ...]:
    """Columns that decide a group's size and stride."""
    mesh = expert_mesh(rank_order) if dimension.startswith("expert") else dense_mesh(rank_order)
    return tuple(MESH_COLUMN[name] for name in mesh[: mesh.index(dimension) + 1])


def process_group(columns: Columns, rank_order: Sequence[str], dimension: str) -> ProcessGroup:
    """Group of ranks that differ only in one mesh dimension."""
    names = group_columns(rank_order, dimension)
    stride = np.ones(len(columns))
    for name in names[:-1]:
        stride = stride * columns[name]
    return ProcessGroup(columns[names[-1]], stride, dimension)


def gradient_group(columns: Columns, rank_order: Sequence[str]) -> ProcessGroup:
    """Ranks that hold the same non-expert parameters: data times context.

    They are taken as one strided group that begins at the faster of the two dimensions; exact when the two are
    neighbours in the rank order, as in the default order.
    """
    data = process_group(columns, rank_order, "data")
    context = process_group(columns, rank_order, "context")
    return ProcessGroup(data.size * context.size, np.minimum(data.stride, context.stride))


def group_extents(group: ProcessGroup, level_sizes: Sequence[int]) -> FloatArray:
    """How many members a group has along each level of a fabric.

    Parameters
    ----------
    group : ProcessGroup
        Sizes and strides of shape (n_cases,).
    level_sizes : sequence of int
        Members of each level, innermost first; their product is the device count.

    Returns
    -------
    ndarray of shape (n_levels, n_cases)
        Extents, >= 1; their product is the group's size where strides divide the levels, else it is rounded up (the
        last level takes what is left).

    Examples
    --------
    Eight ranks with stride 4 on nodes of 8: two share each node, over four nodes.

    >>> group_extents(ProcessGroup(np.array([8.0]), np.array([4.0])), [8, 60]).ravel().tolist()
    [2.0, 4.0]
    """
    skip, remaining = group.stride, group.size
    extents = []
    for size in level_sizes[:-1]:
        room = np.maximum(np.floor(size / skip), 1.0)
        extent = np.minimum(remaining, room)
        extents.append(extent)
        remaining = np.maximum(np.ceil(remaining / extent - 1e-9), 1.0)
        skip = np.maximum(skip / size, 1.0)
    extents.append(remaining)
    return np.stack(np.broadcast_arrays(*extents))


def crossed_level(group: ProcessGroup, level_sizes: Sequence[int]) -> int | None:
    """Members of the innermost domain across whose end some group of equal size and stride lies, for the first case.

    Groups fill blocks of size * stride ranks. Where that block or the stride neither divides a domain nor is divided
    by it, some group has members in more domains than another; closed forms know only even extents.

    Parameters
    ----------
    group : ProcessGroup
        Sizes and strides of shape (n_cases,).
    level_sizes : sequence of int
        Members of each level, innermost first.

    Returns
    -------
    int or None
        Devices of that domain; None where groups and domains fit.

    Examples
    --------
    >>> five, four = (ProcessGroup(np.array([size]), np.array([1.0])) for size in (5.0, 4.0))
    >>> crossed_level(five, [8, 60]), crossed_level(four, [8, 60])
    (8, None)
    """
    size, stride = round(float(group.size[0])), round(float(group.stride[0]))
    domain = 1
    for members in level_sizes[:-1]:
        domain *= members
        if size > 1 and any(max(width, domain) % min(width, domain) for width in (stride, size * stride)):
            return domain
    return None


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ascending numbers as ranges.

    Examples
    --------
    >>> rank_ranges([0, 1, 2, 8, 10, 11])
    '0-2, 8, 10-11'
    """
    numbers = np.asarray(ranks, dtype=np.int64)
    if not len(numbers):
        return ""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def parse_rank_ranges(text: str) -> tuple[int, ...]:
    """Numbers of a text such as ``rank_ranges`` writes.

    Raises
    ------
    ValueError
        If the text is no list of numbers and rising ranges, or names more than ``MOST_RANKS``.

    Examples
    --------
    >>> parse_rank_ranges("0-2, 8")
    (0, 1, 2, 8)
    """
    ranks: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        span = range(int(first), int(last if dash else first) + 1)
        if not span:
            raise ValueError(f"{part.strip()} is no rising range")
        if len(ranks) + len(span) > MOST_RANKS:
            raise ValueError(f"more than {MOST_RANKS:,} ranks")
        ranks += span
    return tuple(ranks)
