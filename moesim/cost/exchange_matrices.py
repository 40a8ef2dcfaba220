"""Demand of a direct all-to-all with any bytes per pair: the busiest device of each level sets the pace."""

from __future__ import annotations

import numpy as np

from moesim.cost.collective_demands import CollectiveDemand, LevelDemand
from moesim.structure.columns import FloatArray
from moesim.structure.group_layouts import GroupLayout


def matrix_demand(pair_bytes: FloatArray, layout: GroupLayout, scales: FloatArray) -> CollectiveDemand:
    """Demand on switched levels, for a matrix times each of several scales.

    A level carries what goes to another domain of the level inside it: t = max over devices of max(sent, received).
    Exact for max-min fair flows where each device's own link is the only limit, as in ``uniform_all_to_all``; a lower
    bound where a busy sender and a busy receiver delay a third.

    Parameters
    ----------
    pair_bytes : ndarray of shape (n, n)
        Bytes from each rank (row) to each rank.
    layout : GroupLayout
        Where the ranks stand; switched levels.
    scales : ndarray of shape (n_cases,)
        Factors of the matrix.

    Returns
    -------
    CollectiveDemand
        Arrays of shape (n_cases,).

    Examples
    --------
    Two nodes of two; rank 0 sends 3 bytes to its neighbour and 5 to rank 2, who also gets 1 from rank 1:

    >>> matrix = np.zeros((4, 4))
    >>> matrix[0, 1], matrix[0, 2], matrix[1, 2] = 3, 5, 1
    >>> demand = matrix_demand(matrix, GroupLayout.switched(2, 2), np.array([1.0]))
    >>> [float(level.wire_bytes[0]) for level in demand.levels]
    [3.0, 6.0]
    """
    coordinates, levels = layout.coordinates, []
    differs = coordinates[:, None, :] != coordinates[None, :, :]
    outermost = np.where(differs.any(axis=2), layout.num_levels - 1 - differs[:, :, ::-1].argmax(axis=2), -1)
    used = max((level for level in range(layout.num_levels) if (pair_bytes[outermost == level] > 0).any()), default=0)
    for level in range(layout.num_levels):
        carried = np.where(outermost == level, pair_bytes, 0.0)
        busiest = max(carried.sum(axis=0).max(), carried.sum(axis=1).max())
        peers = float((carried > 0).sum(axis=1).max())
        rounds = float(level == used and busiest > 0)
        levels.append(LevelDemand(scales * 0.0 + rounds, scales * 0.0 + peers, scales * busiest))
    own = float(np.trace(pair_bytes)) / layout.num_ranks
    return CollectiveDemand(tuple(levels), scales * own, "direct")
