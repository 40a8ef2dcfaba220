"""Algorithms of collectives: small classes, each with its ideal demand; one table of what there is."""

from __future__ import annotations

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm
from moesim.cost.collective_algorithms.direct import DirectAllToAll, PointToPoint
from moesim.cost.collective_algorithms.in_network import Nvls
from moesim.cost.collective_algorithms.rings import HierarchicalRing, Ring
from moesim.cost.collective_algorithms.trees import Tree
from moesim.structure.step_graph import CollectiveKind

_EVERY: tuple[AbstractAlgorithm, ...] = (
    DirectAllToAll(),
    Ring(),
    HierarchicalRing(),
    Tree(),
    Nvls(),
    PointToPoint(),
)


def algorithms_of(kind: CollectiveKind) -> dict[str, AbstractAlgorithm]:
    """Algorithms that can carry out a kind of collective, by name.

    Parameters
    ----------
    kind : str
        Kind of the collective.

    Returns
    -------
    dict of str to AbstractAlgorithm
        In the order of preference where times are equal.

    Examples
    --------
    >>> list(algorithms_of("all_gather"))
    ['ring', 'hierarchical_ring']
    """
    return {algorithm.name: algorithm for algorithm in _EVERY if kind in algorithm.kinds}
