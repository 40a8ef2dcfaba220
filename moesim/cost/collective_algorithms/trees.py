"""All-reduce over trees: what goes up reduced comes down broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm
from moesim.cost.collective_algorithms.rounds import Rounds, plan_of
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.columns import FloatArray
from moesim.structure.communication_plans import CommunicationPlan
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind

Edges = list[list[tuple[int, int]]]
"""Parent and child at each depth of a tree."""
RootedTree = tuple[int, Callable[[int], Edges]]
"""Channel, whose device carries the tree, and the tree's edges over the outermost level."""
ALL_REDUCE: tuple[CollectiveKind, ...] = ("all_reduce",)


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
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ALL_REDUCE

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Chains on all levels but the outermost one that the group spans, which has the trees."""
        levels = [
            LevelDemand(
                np.where(is_top & (index > 0), 2.0 * tree_depth(extent), 2.0 * (extent - 1.0)),
                traffic.num_bytes * 0.0,
                np.where(is_top & (index > 0), double_tree_volume(extent), 2.0 * (extent - 1.0) / extent)
                * traffic.num_bytes
                / inside,
            )
            for index, (extent, inside, is_top) in enumerate(tops(traffic))
        ]
        return CollectiveDemand(tuple(levels), traffic.num_bytes * 0.0, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """A chain of rounds per channel and tree; in one node, the chains of its channels."""
        if layout.top == 0:
            trees: list[RootedTree] = [(channel, chain_edges) for channel in range(layout.num_ranks)]
        else:
            trees = two_trees(layout)
        chains = [spread(layout, tree, [block], chain_edges) for block, tree in enumerate(trees)]
        return _tree_plan(kind, num_bytes, layout, chains)


@final
class DoubleBinaryTree(AbstractAlgorithm):
    """Two binary trees over the ranks of a level, each of which carries half; binary trees inside as well.

    As ``Tree`` with a logarithm of rounds on every level: 2 ceil(log2 e). The outermost level that the group spans
    sends at most 2 s; inside it, trees of many channels are rooted at different devices, 2 (e - 1)/e on the average.

    Examples
    --------
    8 MB on 8 ranks: 16 MB in 6 rounds.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = Fabric((FabricLevel("node", 8, 450e9, False, False, False, 1e-6),), 1)
    >>> demand = DoubleBinaryTree().demand("all_reduce", GroupTraffic(np.array([8e6]), np.array([[8.0]])), node)
    >>> float(demand.levels[0].rounds[0]), float(demand.levels[0].wire_bytes[0])
    (6.0, 16000000.0)
    """

    name: ClassVar[str] = "double_binary_tree"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ALL_REDUCE

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Trees on all levels, two of them on the outermost."""
        return CollectiveDemand(_binary_levels(traffic, double_tree_volume), traffic.num_bytes * 0.0, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """A chain of rounds per channel and tree."""
        chains = [spread(layout, tree, [block], tree_edges) for block, tree in enumerate(two_trees(layout))]
        return _tree_plan(kind, num_bytes, layout, chains)


@final
class BinaryTree(AbstractAlgorithm):
    """One binary tree over the outermost level: a rank with two children sends the buffer up once and down twice.

    3 s from four ranks on, against 2 s of the double tree: kept for comparison and for small messages.

    Examples
    --------
    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = Fabric((FabricLevel("node", 8, 450e9, False, False, False, 1e-6),), 1)
    >>> demand = BinaryTree().demand("all_reduce", GroupTraffic(np.array([8e6]), np.array([[8.0]])), node)
    >>> float(demand.levels[0].rounds[0]), float(demand.levels[0].wire_bytes[0])
    (6.0, 24000000.0)
    """

    name: ClassVar[str] = "binary_tree"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ALL_REDUCE

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Trees on all levels, one on the outermost."""
        levels = _binary_levels(traffic, lambda extent: np.minimum(extent - 1.0, 3.0))
        return CollectiveDemand(levels, traffic.num_bytes * 0.0, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """A chain of rounds per channel."""
        channels = range(layout.stride(layout.top))
        chains = [spread(layout, (channel, tree_edges), [channel], tree_edges) for channel in channels]
        return _tree_plan(kind, num_bytes, layout, chains)


def _tree_plan(kind: CollectiveKind, num_bytes: float, layout: GroupLayout, chains: list[Rounds]) -> CommunicationPlan:
    block_bytes = np.full(len(chains), num_bytes / len(chains))
    return plan_of(kind, layout.num_ranks, chains, block_bytes, owners=np.zeros(len(chains), dtype=np.int64))


def tops(traffic: GroupTraffic) -> list[tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]]:
    """Extent, ranks inside, and whether it is the outermost level that the group spans, level by level."""
    return [
        (extent, inside, (extent > 1) & (inside * extent >= traffic.ranks))
        for extent, inside in zip(traffic.extents, traffic.inside, strict=True)
    ]


def _binary_levels(traffic: GroupTraffic, top_volume: Callable[[FloatArray], FloatArray]) -> tuple[LevelDemand, ...]:
    return tuple(
        LevelDemand(
            2.0 * tree_depth(extent),
            traffic.num_bytes * 0.0,
            np.where(is_top, top_volume(extent), 2.0 * (extent - 1.0) / extent) * traffic.num_bytes / inside,
        )
        for extent, inside, is_top in tops(traffic)
    )


def tree_depth(nodes: FloatArray) -> FloatArray:
    """Steps from the deepest leaf to the root of NCCL's binary tree over k nodes: ceil(log2 k).

    Examples
    --------
    >>> tree_depth(np.array([1.0, 2.0, 3.0, 64.0])).tolist()
    [0.0, 1.0, 2.0, 6.0]
    """
    return np.asarray(np.ceil(np.log2(nodes)))


def double_tree_volume(nodes: FloatArray) -> FloatArray:
    """Bytes the busiest node of a double binary tree sends, per byte of the buffer: 0, 1, 1.5, then 2.

    Examples
    --------
    >>> double_tree_volume(np.array([1.0, 2.0, 3.0, 4.0, 64.0])).tolist()
    [0.0, 1.0, 1.5, 2.0, 2.0]
    """
    return np.asarray(np.where(nodes > 1, np.minimum(nodes / 2.0, 2.0), 0.0))


def chain_edges(size: int) -> Edges:
    """Chain 0 -> 1 -> ... -> size - 1."""
    return [[(position, position + 1)] for position in range(size - 1)]


def tree_edges(size: int) -> Edges:
    """NCCL's binary tree: root 0 with one child; the parent of a position clears its lowest bit and sets the next.

    Examples
    --------
    >>> tree_edges(5)
    [[(0, 4)], [(4, 2)], [(2, 1), (2, 3)]]
    """
    children: dict[int, list[int]] = {}
    for position in range(1, size):
        lowest = position & -position
        parent = (position ^ lowest) | lowest << 1
        children.setdefault(parent if parent < size else position ^ lowest, []).append(position)
    edges: Edges = []
    reached = [0]
    while any(parent in children for parent in reached):
        edges.append([(parent, child) for parent in reached for child in children.get(parent, [])])
        reached = [child for _, child in edges[-1]]
    return edges


def mirrored_edges(size: int) -> Edges:
    """NCCL's second tree: the first one mirrored, or shifted by one where the size is odd; leaves become inner nodes.

    Examples
    --------
    >>> mirrored_edges(4)
    [[(3, 1)], [(1, 2), (1, 0)]]
    """
    rename: Callable[[int], int] = (lambda p: (p + 1) % size) if size % 2 else (lambda p: size - 1 - p)
    return [[(rename(parent), rename(child)) for parent, child in pairs] for pairs in tree_edges(size)]


def two_trees(layout: GroupLayout) -> list[RootedTree]:
    """Both trees over the outermost level, for each channel: one channel per device inside it."""
    channels = range(layout.stride(layout.top))
    return [(channel, edges) for channel in channels for edges in (tree_edges, mirrored_edges)]


def spread(
    layout: GroupLayout,
    tree: RootedTree,
    blocks: Sequence[int],
    inner_edges: Callable[[int], Edges],
    *,
    lowest: int = 0,
) -> Rounds:
    """Broadcast over the outermost level among the devices of a channel, then level by level in, to ``lowest``.

    On each level inside, a line starts at the channel's own device.
    """
    channel, top_edges = tree
    coordinates = layout.coordinates
    rounds: Rounds = []
    for level in reversed(range(lowest, layout.top + 1)):
        size, stride, turn = layout.extents[level], layout.stride(level), int(coordinates[channel, level])
        firsts = [int(line[0]) for line in layout.lines(level)]
        holders = [at for at in firsts if (coordinates[at, :level] == coordinates[channel, :level]).all()]
        edges = top_edges(size) if level == layout.top else inner_edges(size)
        for pairs in edges:
            turned = [(stride * ((parent + turn) % size), stride * ((child + turn) % size)) for parent, child in pairs]
            rounds.append([(at + parent, at + child, blocks) for at in holders for parent, child in turned])
    return rounds
