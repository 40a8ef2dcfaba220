"""Broadcast of a message from rank 0."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import TORUS, AbstractAlgorithm, LinkStyle, closes
from moesim.cost.collective_algorithms.exchanges import axis_hops
from moesim.cost.collective_algorithms.rounds import Rounds, plan_of, side_by_side
from moesim.cost.collective_algorithms.trees import chain_edges, spread
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.communication_plans import CommunicationPlan
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind


@final
class PipelinedBroadcast(AbstractAlgorithm):
    """A chain over the nodes on each rail and a chain inside each node, in a pipeline of chunks, as NCCL's ring.

    The root hands the c-th g-th of the message to the device at position c, which passes it on to the next node and
    around its own. The root sends the whole message once; NICs send s/g. Steps: one out from the root and g - 1 around
    a node inside (a single node: g - 1), k - 1 between. t = latencies + max over levels of bytes / bandwidth: the time
    of a long message does not grow with the ranks.

    Examples
    --------
    16 MB to 2 nodes of 8: 8 steps and 16 MB inside, 1 step and 2 MB per NIC between.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = PipelinedBroadcast().demand("broadcast", traffic, Fabric((node, network), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(8.0, 16000000.0), (1.0, 2000000.0)]
    """

    name: ClassVar[str] = "ring"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("broadcast",)

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Steps of the longest way, and the root's bytes inside."""
        num_bytes, ranks, size = traffic.num_bytes, traffic.ranks, traffic.extents[0]
        nothing = num_bytes * 0.0
        steps = np.where(ranks > size, size, size - 1.0) * (size > 1)
        levels = [LevelDemand(steps + nothing, nothing, num_bytes * (size > 1))]
        for extent, inside in zip(traffic.extents[1:], traffic.inside[1:], strict=True):
            domains_below, domains = ranks / inside, ranks / (inside * extent)
            levels.append(LevelDemand(domains_below - domains, nothing, num_bytes / size * (extent > 1)))
        return CollectiveDemand(tuple(levels), nothing, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """One chain per position inside a node; in a single node one chain of all devices."""
        ranks, size = layout.num_ranks, layout.extents[0]
        chains = [_rail(layout, channel) for channel in range(size)] if ranks > size else [_around(0, 0, size, [0])]
        owners = np.zeros(len(chains), dtype=np.int64)
        return plan_of(kind, ranks, chains, np.full(len(chains), num_bytes / len(chains)), owners=owners)


def _rail(layout: GroupLayout, channel: int) -> Rounds:
    """Root to the device of a channel, over its rail from node to node, and around each node."""
    size, nodes = layout.extents[0], layout.num_ranks // layout.extents[0]
    out: Rounds = [[(0, channel, [channel])]] if channel else []
    rail: Rounds = [[(node * size + channel, (node + 1) * size + channel, [channel])] for node in range(nodes - 1)]
    around = side_by_side(_around(node * size, channel, size, [channel]) for node in range(nodes))
    return out + rail + around


def _around(first: int, start: int, size: int, blocks: list[int]) -> Rounds:
    """Chain around a node from the device at ``start``; the root, which has everything, is left out."""
    positions = [(start + step) % size for step in range(size)]
    kept = [first + position for position in positions if position == start or first + position != 0]
    return [[(kept[parent], kept[child], blocks)] for pairs in chain_edges(len(kept)) for parent, child in pairs]


@final
class BinomialBroadcast(AbstractAlgorithm):
    """Everyone who has the message sends it to one more: ceil(log2 e) rounds of s per level, outermost level first.

    t = sum over levels of ceil(log2 e) (latency + s / bandwidth): best for short messages.

    Examples
    --------
    1 MB to 8 ranks: the root sends it 3 times.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = Fabric((FabricLevel("node", 8, 450e9, False, False, False, 1e-6),), 1)
    >>> demand = BinomialBroadcast().demand("broadcast", GroupTraffic(np.array([1e6]), np.array([[8.0]])), node)
    >>> float(demand.levels[0].rounds[0]), float(demand.levels[0].wire_bytes[0])
    (3.0, 3000000.0)
    """

    name: ClassVar[str] = "binomial_tree"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("broadcast",)

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """A logarithm of rounds of the whole message."""
        levels = []
        for extent in traffic.extents:
            rounds = np.ceil(np.log2(extent)) + traffic.num_bytes * 0.0
            levels.append(LevelDemand(rounds, traffic.num_bytes * 0.0, rounds * traffic.num_bytes))
        return CollectiveDemand(tuple(levels), traffic.num_bytes * 0.0, self.name, "serial")

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """Rounds of doubling distance, level by level."""
        rounds = spread(layout, (0, _binomial_edges), [0], _binomial_edges)
        return plan_of(kind, layout.num_ranks, [rounds], np.array([num_bytes]), owners=np.zeros(1, dtype=np.int64))


def _binomial_edges(size: int) -> list[list[tuple[int, int]]]:
    edges = []
    reach = 1
    while reach < size:
        edges.append([(parent, parent + reach) for parent in range(min(reach, size - reach))])
        reach *= 2
    return edges


@final
class TorusBroadcast(AbstractAlgorithm):
    """Along the outermost axis, then from all of it along the next, in a pipeline of chunks, both ways round a ring.

    Every link passes the message on once: t = hops of all axes + s / bandwidth of one link. A closed axis of two chips
    has two links between them.

    Examples
    --------
    1 MB on a closed 8 x 8: 4 hops on each axis.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> axis = FabricLevel("axis", 8, 50e9, True, True, True, 1e-6)
    >>> traffic = GroupTraffic(np.array([1e6]), np.array([[8.0], [8.0]]))
    >>> demand = TorusBroadcast().demand("broadcast", traffic, Fabric((axis, axis), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(4.0, 1000000.0), (4.0, 1000000.0)]
    """

    name: ClassVar[str] = "torus"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("broadcast",)
    links: ClassVar[tuple[LinkStyle, ...]] = TORUS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Hops to the farthest chip, and the message once."""
        nothing, levels = traffic.num_bytes * 0.0, []
        for level, extent in zip(fabric.levels, traffic.extents, strict=True):
            ring = closes(level.wraps and level.is_ring, level.size, extent)
            links = np.where(ring & (extent == 2), 2.0, 1.0)
            rounds = axis_hops(extent, ring) + nothing
            levels.append(LevelDemand(rounds, nothing, (extent > 1) * traffic.num_bytes / links))
        return CollectiveDemand(tuple(levels), nothing, self.name)

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """Chips that have the message pass it on along the next axis."""
        rounds: Rounds = []
        for level in reversed(range(layout.num_levels)):
            size, stride = layout.extents[level], layout.stride(level)
            holders = [int(line[0]) for line in layout.lines(level) if not layout.coordinates[line[0], :level].any()]
            for pairs in _axis_edges(size, layout.closes[level]):
                rounds.append([(at + stride * a, at + stride * b, [0]) for at in holders for a, b in pairs])
        return plan_of(kind, layout.num_ranks, [rounds], np.array([num_bytes]), owners=np.zeros(1, dtype=np.int64))


def _axis_edges(size: int, is_closed: bool) -> list[list[tuple[int, int]]]:
    """From position 0 to the end of a line, or both ways round a ring."""
    if not is_closed:
        return chain_edges(size)
    up = [(at, at + 1) for at in range(size // 2)]
    down = [(-at % size, -at - 1 + size) for at in range((size - 1) // 2)]
    return [[edge, *down[step : step + 1]] for step, edge in enumerate(up)]
