"""Algorithms of collectives: small classes, each with its ideal demand and its plan; one table of what there is."""

from __future__ import annotations

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm
from moesim.cost.collective_algorithms.broadcasts import BinomialBroadcast, PipelinedBroadcast, TorusBroadcast
from moesim.cost.collective_algorithms.exchanges import BruckAllToAll, DirectAllToAll, PairwiseAllToAll
from moesim.cost.collective_algorithms.in_network import Nvls
from moesim.cost.collective_algorithms.point_to_point import PointToPoint
from moesim.cost.collective_algorithms.recursive import HalvingDoubling, Recursive
from moesim.cost.collective_algorithms.rings import Hierarchical, HierarchicalRing, Ring, TorusRings
from moesim.cost.collective_algorithms.staged_exchanges import HierarchicalAllToAll, RailAlignedAllToAll, TorusAllToAll
from moesim.cost.collective_algorithms.trees import BinaryTree, DoubleBinaryTree, Tree
from moesim.structure.step_graph import CollectiveKind

ALGORITHMS: tuple[AbstractAlgorithm, ...] = (
    DirectAllToAll(),
    PairwiseAllToAll(),
    BruckAllToAll(),
    HierarchicalAllToAll(),
    RailAlignedAllToAll(),
    TorusAllToAll(),
    Ring(),
    HierarchicalRing(),
    Hierarchical(),
    TorusRings(),
    Tree(),
    DoubleBinaryTree(),
    BinaryTree(),
    Nvls(),
    HalvingDoubling(),
    Recursive(),
    PipelinedBroadcast(),
    BinomialBroadcast(),
    TorusBroadcast(),
    PointToPoint(),
)
"""Every algorithm there is. A new one stands here; tests find it and hold its plan against its demand."""


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
    ['ring', 'hierarchical_ring', 'hierarchical', 'torus', 'recursive']
    """
    return {algorithm.name: algorithm for algorithm in ALGORITHMS if kind in algorithm.kinds}
