"""All-reduce with reduction and multicast in the switch of a node (NVLink SHARP)."""

from __future__ import annotations

from typing import ClassVar, final

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm
from moesim.cost.collective_algorithms.trees import tree_depth, tree_volume
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
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

    >>> import numpy as np
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
        """The switch on the innermost level, a double binary tree over everything outside it."""
        num_bytes, inner = traffic.num_bytes, traffic.extents[0]
        outside = traffic.ranks / inner
        levels = [
            LevelDemand(SWITCH_ROUNDS * (inner > 1), num_bytes * 0.0, num_bytes * (1.0 + 1.0 / inner) * (inner > 1))
        ]
        for extent, inside in zip(traffic.extents[1:], traffic.inside[1:], strict=True):
            crosses = (extent > 1) & (inside * extent >= traffic.ranks)
            rounds = 2.0 * tree_depth(outside) * crosses
            levels.append(LevelDemand(rounds, num_bytes * 0.0, tree_volume(outside) * num_bytes / inner * crosses))
        return CollectiveDemand(tuple(levels), num_bytes * 0.0, self.name)
