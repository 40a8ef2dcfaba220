"""Rings: all-reduce, all-gather and reduce-scatter."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm, closes, passes
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.step_graph import CollectiveKind

REDUCTIONS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")


@final
class Ring(AbstractAlgorithm):
    """One ring over all ranks, one channel per device of a node, as NCCL builds it on switched levels.

    A rank sends (n - 1)/n of the buffer (all-reduce: twice). Each of the g channels leaves a node at another device, so
    each device's share of the network carries 1/g of it, and (g - 1)/g stays inside. Rounds as NCCL counts them: of the
    n - 1 steps k - 1 cross between the k nodes, n - k stay inside (src/graph/tuning.cc); a block that starts in the
    middle of a node crosses once more.

    Stops being true on a torus, where a ring over all chips would waste the other axes.

    Examples
    --------
    All-gather to 16 MB on 2 nodes of 8: 14 steps inside, 1 between; 15 MB pass each node's border over 8 devices.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = Ring().demand("all_gather", traffic, Fabric((node, network), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(14.0, 13125000.0), (1.0, 1875000.0)]
    """

    name: ClassVar[str] = "ring"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = REDUCTIONS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Steps and bytes by the borders that the ring crosses."""
        ranks, num_bytes = traffic.ranks, traffic.num_bytes
        volume = passes(kind) * num_bytes * (ranks - 1.0) / ranks
        levels = []
        for extent, inside in zip(traffic.extents, traffic.inside, strict=True):
            domains_below, domains = ranks / inside, ranks / (inside * extent)
            stays = np.where(domains > 1, (extent - 1.0) / extent, (extent > 1) * 1.0)
            rounds = passes(kind) * (domains_below - domains)
            levels.append(LevelDemand(rounds, num_bytes * 0.0, volume / inside * stays))
        return CollectiveDemand(tuple(levels), num_bytes / ranks, self.name)


@final
class HierarchicalRing(AbstractAlgorithm):
    """A ring on each level, working on the shard that the levels inside it left.

    Level l with extent e and shard n: all_gather, reduce_scatter (e - 1)/e * n in e - 1 rounds, all_reduce twice that.
    Chunks are pipelined over the levels, so wire times combine by their maximum; rounds add. A torus axis is a ring of
    two directions; without wraparound it has one each way; the devices of a chip share its links.

    Stops being true where a library does not pipeline its levels (then the levels' times add).

    Examples
    --------
    All-reduce of 16 MB on 2 nodes of 8: 2 * 7/8 of it inside, 2 * 1/2 of an eighth between.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = HierarchicalRing().demand("all_reduce", traffic, Fabric((node, network), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(14.0, 28000000.0), (2.0, 2000000.0)]
    """

    name: ClassVar[str] = "hierarchical_ring"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = REDUCTIONS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """A ring's rounds and bytes on each level's shard."""
        shard = traffic.num_bytes
        levels = []
        for level, extent in zip(fabric.levels, traffic.extents, strict=True):
            shared_by = fabric.devices_per_chip if level.is_ring else 1.0
            directions = np.where(closes(level.wraps, level.size, extent), 2.0, 1.0) if level.is_ring else 1.0
            volume = passes(kind) * (extent - 1.0) / extent * shard * shared_by
            rounds = passes(kind) * (extent - 1.0)
            levels.append(LevelDemand(rounds, traffic.num_bytes * 0.0, volume / directions))
            shard = shard / extent
        return CollectiveDemand(tuple(levels), traffic.num_bytes / traffic.ranks, self.name)
