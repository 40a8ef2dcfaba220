"""Rings: all-reduce, all-gather and reduce-scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import ANY_LINKS, TORUS, AbstractAlgorithm, LinkStyle, closes, passes
from moesim.cost.collective_algorithms.rounds import Rounds, plan_of, ring_gather, staged_gather
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.communication_plans import CommunicationPlan
from moesim.structure.group_layouts import GroupLayout
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
    phases_overlap: ClassVar[bool] = False

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

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """One chain per channel: the same ring of nodes, entered and left at another device."""
        ranks, channels = layout.num_ranks, layout.stride(layout.top)
        chains = [_channel(layout, channel) for channel in range(channels)]
        block_bytes = np.full(channels * ranks, num_bytes / (channels * ranks))
        return plan_of(kind, ranks, chains, block_bytes, owners=np.tile(np.arange(ranks), channels))


def _channel(layout: GroupLayout, channel: int) -> Rounds:
    """Ring that leaves every domain at the device ``channel``: positions inside are turned by its own, plus one."""
    turned = layout.coordinates.copy()
    exits = layout.coordinates[channel]
    for level in range(layout.top):
        turned[:, level] = (turned[:, level] + exits[level] + 1) % layout.extents[level]
    order = np.array([layout.rank_of(position.tolist()) for position in turned])
    return ring_gather(order, lambda _, member: [channel * layout.num_ranks + int(order[member])])


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
    phases_overlap: ClassVar[bool] = False
    links: ClassVar[tuple[LinkStyle, ...]] = ANY_LINKS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """A ring's rounds and bytes on each level's shard."""
        return CollectiveDemand(_ring_levels(kind, traffic, fabric), traffic.num_bytes / traffic.ranks, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """All-gather from the outermost level in; reduce-scatter from the innermost out."""
        return _staged_plan(kind, num_bytes, layout)


@final
class Hierarchical(AbstractAlgorithm):
    """Level after level: reduce-scatter inside, all-reduce of the shards between, all-gather inside.

    Bytes and rounds are those of ``HierarchicalRing``; a level waits for the level before it, so times add:
    t = sum over levels of passes (e - 1) (latency + shard / (e bandwidth)). As collectives of a framework that calls
    one process group after the other.

    Examples
    --------
    All-reduce of 16 MB on 2 nodes of 8 at 28 and 2 GB/s: 1 ms inside and 1 ms between.

    >>> from moesim.cost.collective_demands import FabricLevel, ideal_time_s
    >>> node = FabricLevel("node", 8, 28e9, False, False, False, 0.0)
    >>> network = FabricLevel("network", 4, 2e9, False, False, False, 0.0)
    >>> fabric = Fabric((node, network), 1)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> float(ideal_time_s(Hierarchical().demand("all_reduce", traffic, fabric), fabric)[0])
    0.002
    """

    name: ClassVar[str] = "hierarchical"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = REDUCTIONS
    phases_overlap: ClassVar[bool] = False

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """A ring's rounds and bytes on each level's shard, one level after the other."""
        levels = _ring_levels(kind, traffic, fabric)
        return CollectiveDemand(levels, traffic.num_bytes / traffic.ranks, self.name, "serial")

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """As ``HierarchicalRing``: the rounds are the same, only nothing is cut into chunks."""
        return _staged_plan(kind, num_bytes, layout)


def _staged_plan(kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
    ranks = layout.num_ranks
    rounds = staged_gather(layout, range(layout.num_levels), 0)
    return plan_of(
        kind, ranks, [rounds], np.full(2 * ranks, num_bytes / (2 * ranks)), owners=np.tile(np.arange(ranks), 2)
    )


def _ring_levels(kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> tuple[LevelDemand, ...]:
    shard = traffic.num_bytes
    levels = []
    for level, extent in zip(fabric.levels, traffic.extents, strict=True):
        shared_by = fabric.devices_per_chip if level.is_ring else 1.0
        directions = np.where(closes(level.wraps, level.size, extent), 2.0, 1.0) if level.is_ring else 1.0
        volume = passes(kind) * (extent - 1.0) / extent * shard * shared_by
        rounds = passes(kind) * (extent - 1.0)
        levels.append(LevelDemand(rounds, traffic.num_bytes * 0.0, volume / directions))
        shard = shard / extent
    return tuple(levels)


@final
class TorusRings(AbstractAlgorithm):
    """All axes of a torus at once: each of the d parts of the buffer takes the axes in another order.

    XLA's way to use all links: part p reduces along axis p first, then along the next with what is left, and gathers
    back. An axis of extent e carries, over the parts, passes (e - 1)/e of s/d over what the axes before it left;
    halved where the ring closes, since both directions work. Devices of a chip first reduce among themselves.
    Latency: passes (e - 1) hops per axis. Chunks are pipelined, so the axes' times combine by maximum.

    Stops being true for buffers too small to cut into parts.

    Examples
    --------
    All-gather of 16 MB on a closed 4 x 4: half of it takes an axis first (3/4 of 8 MB) and half second (3/4 of 2 MB),
    each over two directions.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> axis = FabricLevel("axis", 4, 50e9, True, True, True, 1e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[4.0], [4.0]]))
    >>> demand = TorusRings().demand("all_gather", traffic, Fabric((axis, axis), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(3.0, 3750000.0), (3.0, 3750000.0)]
    """

    name: ClassVar[str] = "torus"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = REDUCTIONS
    phases_overlap: ClassVar[bool] = False
    links: ClassVar[tuple[LinkStyle, ...]] = TORUS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """A ring's rounds per axis, and the bytes of all parts on it."""
        orders = axis_orders([level.is_ring for level in fabric.levels])
        levels = []
        for index, (level, extent) in enumerate(zip(fabric.levels, traffic.extents, strict=True)):
            shared_by = fabric.devices_per_chip if level.is_ring else 1.0
            directions = np.where(closes(level.wraps, level.size, extent), 2.0, 1.0) if level.is_ring else 1.0
            volume = traffic.num_bytes * 0.0
            for order in orders:
                before = np.prod(traffic.extents[list(order[: order.index(index)])], axis=0)
                volume = volume + traffic.num_bytes / len(orders) / before
            volume = passes(kind) * (extent - 1.0) / extent * volume * shared_by / directions
            levels.append(LevelDemand(passes(kind) * (extent - 1.0), traffic.num_bytes * 0.0, volume))
        return CollectiveDemand(tuple(levels), traffic.num_bytes / traffic.ranks, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """One chain per part of the buffer."""
        ranks, orders = layout.num_ranks, axis_orders(layout.is_ring)
        chains = [staged_gather(layout, order, 2 * ranks * part) for part, order in enumerate(orders)]
        blocks = 2 * ranks * len(orders)
        owners = np.tile(np.arange(ranks), 2 * len(orders))
        return plan_of(kind, ranks, chains, np.full(blocks, num_bytes / blocks), owners=owners)


def axis_orders(is_ring: Sequence[bool]) -> list[tuple[int, ...]]:
    """Orders of the levels, innermost first: the chip's own level stays first, the axes rotate.

    Examples
    --------
    >>> axis_orders([False, True, True])
    [(0, 1, 2), (0, 2, 1)]
    """
    axes = [level for level, ring in enumerate(is_ring) if ring]
    inside = [level for level, ring in enumerate(is_ring) if not ring]
    return [tuple(inside + axes[turn:] + axes[:turn]) for turn in range(len(axes))]
