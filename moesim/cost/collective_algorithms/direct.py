"""Every rank sends to each of its partners itself: all-to-all and point-to-point."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm, closes
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CollectiveKind, RoutedCopies


@final
class DirectAllToAll(AbstractAlgorithm):
    """All pairs at once: bytes/n to each of n - 1 peers, as NCCL's grouped send and receive.

    Switched level: peers beyond the level inside it cross it, (n_l - n_(l-1))/n of the buffer over the device's share
    of the level. Torus axis of N chips: half of the bytes cross the middle; its busiest link carries N/8 of a chip's
    buffer with wraparound and N/4 without (per direction), the whole of a chip's devices together. The levels' links
    are different, so their times combine by maximum. A library that sends one copy per node cuts the volume: see
    ``copy_fraction``.

    Stops being true where the transfers of a rank are not fair (stragglers), or a network is oversubscribed.

    Examples
    --------
    16 ranks on nodes of 8, 16 MB each: 7 MB stay in the node, 8 MB leave it.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = DirectAllToAll().demand("all_to_all", traffic, Fabric((node, network), 1))
    >>> [(float(level.peers[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(7.0, 7000000.0), (8.0, 8000000.0)]
    """

    name: ClassVar[str] = "direct"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("all_to_all",)

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """One round per level crossed (a torus axis: its hops), all peers."""
        ranks, num_bytes = traffic.ranks, traffic.num_bytes
        levels = []
        for level, extent, inside in zip(fabric.levels, traffic.extents, traffic.inside, strict=True):
            reached = inside * extent
            if level.is_ring:
                ring = closes(level.all_to_all_wraps, level.size, extent)
                volume = num_bytes * fabric.devices_per_chip * np.where(ring, extent / 8.0, mesh_load(extent))
                rounds = np.where(ring, np.floor(extent / 2.0), extent - 1.0)
            else:
                fraction = copy_fraction(traffic.copies, ranks / inside, inside)
                volume = num_bytes * (reached - inside) / ranks * fraction
                rounds = (extent > 1) * 1.0
            levels.append(LevelDemand(rounds, reached - inside, volume))
        return CollectiveDemand(tuple(levels), num_bytes / ranks, self.name)


def copy_fraction(copies: RoutedCopies | None, domains: FloatArray, inside: FloatArray) -> FloatArray | float:
    """Share of a token's choices that are sent when each domain of a level gets one copy.

    K choices over m domains, of which at most M are visited, reach D(m) = m (1 - (1 - 1/m)^K) of them on average; D(k)
    with the local node reproduces UCCL's printed RDMA bytes within 1 %. M limits nodes, not the devices ``inside`` one.

    Examples
    --------
    8 choices over 4 nodes reach 3.6 of them:

    >>> float(8 * copy_fraction(RoutedCopies(8.0, np.inf), np.array(4.0), np.array(8.0))).__round__(3)
    3.6
    """
    if copies is None:
        return 1.0
    limit = np.where(inside > 1, copies.max_nodes, np.inf)
    visited = np.minimum(domains, limit)
    distinct = visited * (1.0 - (1.0 - 1.0 / visited) ** copies.choices)
    return np.asarray(np.minimum(distinct / copies.choices, 1.0))


def mesh_load(extent: FloatArray) -> FloatArray:
    """Load of the middle link of a line of N chips per unit of a chip's buffer: floor(N/2) ceil(N/2) / N.

    Examples
    --------
    >>> mesh_load(np.array([4.0, 5.0])).tolist()
    [1.0, 1.2]
    """
    return np.floor(extent / 2.0) * np.ceil(extent / 2.0) / extent


@final
class PointToPoint(AbstractAlgorithm):
    """One message between neighbours of a group, over one level: t = latency + bytes / bandwidth.

    Some pair of neighbours crosses each level that the group spans; the slowest level sets the time of a pipeline.

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

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """The message once on each level that some pair of neighbours crosses."""
        nothing = traffic.num_bytes * 0.0
        levels = [
            LevelDemand((extent > 1) + nothing, nothing, (extent > 1) * traffic.num_bytes) for extent in traffic.extents
        ]
        return CollectiveDemand(tuple(levels), nothing, self.name, "slowest")
