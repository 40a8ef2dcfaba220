"""One message between neighbours, as between the stages of a pipeline."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import ANY_LINKS, AbstractAlgorithm, LinkStyle, closes
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.columns import FloatArray
from moesim.structure.communication_plans import CommunicationPlan, Move, Transfers
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind


@final
class PointToPoint(AbstractAlgorithm):
    """Every rank sends one message to its neighbour on each level: t = latency + bytes / bandwidth of the slowest.

    Some pair of neighbours crosses each level that the group spans; the slowest level sets the pace of a pipeline. The
    devices of a torus chip send over the same link; a closed axis of two chips has two links between them.

    Examples
    --------
    >>> from moesim.cost.collective_demands import FabricLevel, ideal_time_s
    >>> network = Fabric((FabricLevel("network", 4, 50e9, False, False, False, 3e-6),), 1)
    >>> demand = PointToPoint().demand("point_to_point", GroupTraffic(np.array([50e6]), np.array([[2.0]])), network)
    >>> round(float(ideal_time_s(demand, network)[0]) * 1e6, 6)
    1003.0
    """

    name: ClassVar[str] = "send"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("point_to_point",)
    links: ClassVar[tuple[LinkStyle, ...]] = ANY_LINKS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """The message once on each level that some pair of neighbours crosses."""
        nothing = traffic.num_bytes * 0.0
        levels = []
        for level, extent in zip(fabric.levels, traffic.extents, strict=True):
            shared_by: FloatArray | float = 1.0
            if level.is_ring:
                shared_by = fabric.devices_per_chip / np.where(
                    closes(level.wraps, level.size, extent) & (extent == 2), 2.0, 1.0
                )
            levels.append(LevelDemand((extent > 1) + nothing, nothing, (extent > 1) * traffic.num_bytes * shared_by))
        return CollectiveDemand(tuple(levels), nothing, self.name, "slowest")

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """One round, in which every rank sends to the next position along each level, where there is one."""
        pairs = [
            (int(first), int(second))
            for level in range(layout.num_levels)
            for line in layout.lines(level)
            for first, second in pairwise(line)
        ]
        block_bytes = np.full(len(pairs), num_bytes)
        moves: list[Move] = [(source, target, [block]) for block, (source, target) in enumerate(pairs)]
        starts = np.array([[block, source] for block, (source, _) in enumerate(pairs)], np.int64).reshape(-1, 2)
        ends = np.array([[block, target] for block, (_, target) in enumerate(pairs)], np.int64).reshape(-1, 2)
        chains = ((Transfers.of(moves, block_bytes),),) if moves else ()
        return CommunicationPlan(layout.num_ranks, chains, block_bytes, starts=starts, ends=ends)
