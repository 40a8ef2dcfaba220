"""All-reduce over trees: chains inside the nodes, a pair of binary trees between them."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CollectiveKind


@final
class Tree(AbstractAlgorithm):
    """NCCL's tree: every node a chain of its devices, a double binary tree over the nodes (Sanders et al. 2009).

    Reduced up and broadcast down in a pipeline. A chain sends the buffer twice, on (g - 1)/g of the devices of each of
    its g channels. Each of the two trees carries half of a channel's share; a node is a leaf in one and has at most two
    children in the other, so its NICs send 2 s, but only s when there are two nodes and 1.5 s when there are three.
    Rounds: 2 (g - 1) and 2 ceil(log2 k), the depth of NCCL's trees (src/graph/trees.cc).

    Examples
    --------
    16 MB on 2 nodes of 8: 28 MB inside, 2 MB per NIC (h = 1) in 2 rounds between.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = Tree().demand("all_reduce", traffic, Fabric((node, network), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(14.0, 28000000.0), (2.0, 2000000.0)]
    """

    name: ClassVar[str] = "tree"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("all_reduce",)

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Chains on all levels but the outermost one that the group spans, which has the trees."""
        ranks, num_bytes = traffic.ranks, traffic.num_bytes
        levels = []
        for index, (extent, inside) in enumerate(zip(traffic.extents, traffic.inside, strict=True)):
            is_outermost = (inside * extent >= ranks) & (extent > 1) & (index > 0)
            chain = 2.0 * num_bytes / inside * (extent - 1.0) / extent
            trees = tree_volume(extent) * num_bytes / inside
            rounds = np.where(is_outermost, 2.0 * tree_depth(extent), 2.0 * (extent - 1.0))
            levels.append(LevelDemand(rounds, num_bytes * 0.0, np.where(is_outermost, trees, chain)))
        return CollectiveDemand(tuple(levels), num_bytes * 0.0, self.name)


def tree_depth(nodes: FloatArray) -> FloatArray:
    """Steps from a leaf to the root of a binary tree over k nodes: ceil(log2 k).

    Examples
    --------
    >>> tree_depth(np.array([1.0, 2.0, 3.0, 64.0])).tolist()
    [0.0, 1.0, 2.0, 6.0]
    """
    return np.asarray(np.ceil(np.log2(nodes)))


def tree_volume(nodes: FloatArray) -> FloatArray:
    """Bytes the busiest node of a double binary tree sends, per byte of the buffer: 0, 1, 1.5, then 2.

    Examples
    --------
    >>> tree_volume(np.array([1.0, 2.0, 3.0, 4.0, 64.0])).tolist()
    [0.0, 1.0, 1.5, 2.0, 2.0]
    """
    return np.asarray(np.where(nodes > 1, np.minimum(nodes / 2.0, 2.0), 0.0))
