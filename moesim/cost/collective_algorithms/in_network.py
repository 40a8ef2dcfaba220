"""All-reduce with reduction and multicast in the switch of a node (NVLink SHARP)."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm
from moesim.cost.collective_algorithms.rounds import chain_of
from moesim.cost.collective_algorithms.trees import (
    Edges,
    double_tree_volume,
    spread,
    tops,
    tree_depth,
    tree_edges,
    two_trees,
)
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.communication_plans import Chain, CommunicationPlan, Transfers
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind

SWITCH_ROUNDS = 2.0


@final
class Nvls(AbstractAlgorithm):
    """NVLS: the switch reduces what it reads from g devices and multicasts what one of them writes.

    Device i owns the i-th g-th of the buffer: each device gives s to the reducing reads and writes s/g to be multicast,
    s (1 + 1/g) in all; two trips through the switch. Between several domains the reduced shards go over a double binary
    tree, each device by its own NIC (NCCL's NVLSTree).

    Stops being true below three devices, where NCCL does not use it.

    Examples
    --------
    8 MB on 8 devices: 9 MB sent by each. 16 on two nodes: 1 MB by each NIC beside it.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([8e6, 8e6]), np.array([[8.0, 8.0], [1.0, 2.0]]))
    >>> demand = Nvls().demand("all_reduce", traffic, Fabric((node, network), 1))
    >>> [level.wire_bytes.tolist() for level in demand.levels]
    [[9000000.0, 9000000.0], [0.0, 1000000.0]]
    """

    name: ClassVar[str] = "nvls"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("all_reduce",)

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """The switch on the innermost level, trees on the levels outside it."""
        num_bytes, inner = traffic.num_bytes, traffic.extents[0]
        nothing, active = num_bytes * 0.0, inner > 1
        levels = [LevelDemand(SWITCH_ROUNDS * active + nothing, nothing, num_bytes * (1.0 + 1.0 / inner) * active)]
        for extent, inside, is_top in tops(traffic)[1:]:
            volume = np.where(is_top, double_tree_volume(extent), 2.0 * (extent - 1.0) / extent)
            levels.append(LevelDemand(2.0 * tree_depth(extent), nothing, volume * num_bytes / inside))
        return CollectiveDemand(tuple(levels), nothing, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """Per device's shard: all to the switch, sum to the owner, trees between owners, and back by the switch."""
        ranks, size = layout.num_ranks, layout.extents[0]
        inside = layout.top == 0
        trees = [(channel, _no_edges) for channel in range(size)] if inside else two_trees(layout)
        block_bytes = np.full(len(trees), num_bytes / len(trees))
        chains: list[Chain] = []
        for block, tree in enumerate(trees):
            owner = int(layout.coordinates[tree[0], 0])
            collect = [(rank, ranks + rank // size, [block]) for rank in range(ranks)]
            deliver = [(ranks + domain, domain * size + owner, [block]) for domain in range(ranks // size)]
            between = chain_of(kind, [] if inside else spread(layout, tree, [block], tree_edges, lowest=1), block_bytes)
            up = [Transfers.of(collect, block_bytes, adds=True), Transfers.of(deliver, block_bytes)]
            down = [
                Transfers.of([(target, source, blocks) for source, target, blocks in moves], block_bytes)
                for moves in (deliver, collect)
            ]
            chains.append((*up, *between, *down) if size > 1 else between)
        blocks = np.arange(len(trees))
        everyone = np.stack([np.repeat(blocks, ranks), np.tile(np.arange(ranks), len(trees))], axis=1)
        kept = tuple(chain for chain in chains if chain)
        return CommunicationPlan(ranks, kept, block_bytes, ranks // size, starts=everyone, ends=everyone)


def _no_edges(size: int) -> Edges:
    return []
