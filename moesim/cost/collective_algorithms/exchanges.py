"""All-to-all on any matrix of bytes per pair: direct, pairwise and Bruck."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import ANY_LINKS, AbstractAlgorithm, LinkStyle, closes
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.communication_plans import Chain, CommunicationPlan, Transfers
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind, RoutedCopies

MOST_BITS = 40


class AbstractAllToAll(AbstractAlgorithm):
    """An all-to-all: a uniform one is the matrix with bytes/n for every pair."""

    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("all_to_all",)

    @abstractmethod
    def routes(self, layout: GroupLayout) -> list[list[IntArray]]:
        """Where the block of each pair is after each round, one list per part that the blocks are cut into.

        Parameters
        ----------
        layout : GroupLayout
            Where the group's ranks stand.

        Returns
        -------
        list of list of ndarray of shape (n * n,)
            Per part and round the rank that holds the block from i to j, at i n + j.
        """

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """Plan of a uniform all-to-all: the rank's own block stays where it is."""
        ranks = layout.num_ranks
        return self.plan_of_matrix(np.full((ranks, ranks), num_bytes / ranks), layout)

    def plan_of_matrix(self, pair_bytes: FloatArray, layout: GroupLayout) -> CommunicationPlan:
        """Plan of an all-to-all-v.

        Parameters
        ----------
        pair_bytes : ndarray of shape (n, n)
            Bytes from each rank (row) to each rank; pairs without bytes send nothing.
        layout : GroupLayout
            Where the ranks stand.

        Returns
        -------
        CommunicationPlan
            Blocks are numbered pair by pair, part after part.
        """
        routes = self.routes(layout)
        ranks, parts = layout.num_ranks, len(routes)
        pairs = np.flatnonzero(np.ravel(pair_bytes) > 0)
        block_bytes = np.tile(np.ravel(pair_bytes)[pairs] / parts, parts)
        source, target = pairs // ranks, pairs % ranks
        chains = [
            _routed_chain(source, [places[pairs] for places in places_of_part], part * len(pairs), block_bytes)
            for part, places_of_part in enumerate(routes)
        ]
        blocks = np.arange(len(block_bytes))
        starts = np.stack([blocks, np.tile(source, parts)], axis=1)
        ends = np.stack([blocks, np.tile(target, parts)], axis=1)
        kept = tuple(chain for chain in chains if chain)
        return CommunicationPlan(ranks, kept, block_bytes, starts=starts, ends=ends)


def _routed_chain(start: IntArray, places: Sequence[IntArray], offset: int, block_bytes: FloatArray) -> Chain:
    """Rounds that carry each block from place to place; blocks with the same way travel together."""
    rounds = []
    before = start
    for after in places:
        together: dict[tuple[int, int], list[int]] = {}
        for index in np.flatnonzero(before != after).tolist():
            together.setdefault((int(before[index]), int(after[index])), []).append(offset + index)
        if together:
            moves = [(source, target, blocks) for (source, target), blocks in sorted(together.items())]
            rounds.append(Transfers.of(moves, block_bytes))
        before = after
    return tuple(rounds)


def pair_coordinates(layout: GroupLayout) -> tuple[IntArray, IntArray]:
    """Coordinates of the sender and of the receiver of each pair, each (n * n, n_levels)."""
    ranks = layout.num_ranks
    return np.repeat(layout.coordinates, ranks, axis=0), np.tile(layout.coordinates, (ranks, 1))


def ranks_at(layout: GroupLayout, coordinates: IntArray) -> IntArray:
    """Ranks at coordinates of shape (..., n_levels)."""
    strides = np.array([layout.stride(level) for level in range(layout.num_levels)])
    return np.asarray((coordinates * strides).sum(axis=-1))


@final
class DirectAllToAll(AbstractAllToAll):
    """All pairs at once: bytes/n to each of n - 1 peers, as NCCL's grouped send and receive.

    Switched level: peers beyond the level inside it cross it, (n_l - n_(l-1))/n of the buffer over the device's share
    of the level. Torus axis of N chips: half of the bytes cross the middle; its busiest link carries N/8 of a chip's
    buffer with wraparound and N/4 without (per direction; odd N: floor(N^2/4)/2N and twice that), the whole of a chip's
    devices together. The levels' links are different, so their times combine by maximum. A library that sends one copy
    per node cuts the volume: see ``copy_fraction``. Latency: that of the outermost level, or the hops of all axes.

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
    links: ClassVar[tuple[LinkStyle, ...]] = ANY_LINKS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """One round on the outermost level (a torus axis: its hops), all peers."""
        ranks, num_bytes = traffic.ranks, traffic.num_bytes
        levels = []
        for level, extent, inside in zip(fabric.levels, traffic.extents, traffic.inside, strict=True):
            reached = inside * extent
            if level.is_ring:
                ring = closes(level.all_to_all_wraps, level.size, extent)
                volume = num_bytes * fabric.devices_per_chip * axis_load(extent, ring)
                rounds = axis_hops(extent, ring)
            else:
                fraction = copy_fraction(traffic.copies, ranks / inside, inside)
                volume = num_bytes * (reached - inside) / ranks * fraction
                rounds = ((extent > 1) & (reached >= ranks)) * 1.0
            levels.append(LevelDemand(rounds, reached - inside, volume))
        return CollectiveDemand(tuple(levels), num_bytes / ranks, self.name)

    def routes(self, layout: GroupLayout) -> list[list[IntArray]]:
        """Straight to the receiver."""
        return [[np.tile(np.arange(layout.num_ranks), layout.num_ranks)]]


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
    return distinct_fraction(np.minimum(domains, limit), copies.choices)


def distinct_fraction(domains: FloatArray, choices: float) -> FloatArray:
    """Expected distinct domains among K even choices of m, per choice: m (1 - (1 - 1/m)^K) / K.

    Examples
    --------
    >>> float(distinct_fraction(np.array(2.0), 2.0))
    0.75
    """
    distinct = domains * (1.0 - (1.0 - 1.0 / domains) ** choices)
    return np.asarray(np.minimum(distinct / choices, 1.0))


def axis_load(extent: FloatArray, ring: FloatArray) -> FloatArray:
    """Load of the busiest link of an axis of N chips, per unit of a chip's buffer.

    A line: floor(N/2) chips send ceil(N/2)/N of it over the middle link. A ring has the choice of two ways, and
    antipodes take both: half of that.

    Examples
    --------
    >>> axis_load(np.array([4.0, 5.0, 8.0]), np.array([False, False, True])).tolist()
    [1.0, 1.2, 1.0]
    """
    line = np.floor(extent / 2.0) * np.ceil(extent / 2.0) / extent
    return np.where(ring, line / 2.0, line)


def axis_hops(extent: FloatArray, ring: FloatArray) -> FloatArray:
    """Hops between the two chips of an axis that are farthest apart."""
    return np.where(ring, np.floor(extent / 2.0), extent - 1.0)


@final
class PairwiseAllToAll(AbstractAllToAll):
    """n - 1 rounds, in each of which every rank has one partner to send to; partners differ by the round's shift.

    Shifts go digit by digit over the levels, so that all ranks cross the same level in a round: n_l - n_(l-1) rounds of
    bytes/n on level l, one after another. t = sum over levels of rounds (latency + s/(n bandwidth)).

    Stops being true if ranks run ahead of each other: rounds then overlap.

    Examples
    --------
    16 MB on 2 nodes of 8: 7 rounds inside and 8 between, 1 MB each.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = PairwiseAllToAll().demand("all_to_all", traffic, Fabric((node, network), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(7.0, 7000000.0), (8.0, 8000000.0)]
    """

    name: ClassVar[str] = "pairwise"

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """A round per peer."""
        levels = []
        for extent, inside in zip(traffic.extents, traffic.inside, strict=True):
            peers = inside * extent - inside
            levels.append(LevelDemand(peers, peers, traffic.num_bytes * peers / traffic.ranks))
        return CollectiveDemand(tuple(levels), traffic.num_bytes / traffic.ranks, self.name, "serial")

    def routes(self, layout: GroupLayout) -> list[list[IntArray]]:
        """Round r takes the blocks whose receiver is r positions on, counted digit by digit."""
        senders, receivers = pair_coordinates(layout)
        shifts = ranks_at(layout, (receivers - senders) % np.array(layout.extents))
        source, target = ranks_at(layout, senders), ranks_at(layout, receivers)
        return [[np.where(shifts <= turn, target, source) for turn in range(1, layout.num_ranks)]]


@final
class BruckAllToAll(AbstractAllToAll):
    """Bruck et al. 1997: ceil(log2 n) rounds; round r sends all blocks whose way has bit r set, 2^r positions on.

    On several levels once per level, innermost first: a block travels the bits of its way along the level. Level with
    extent e: ceil(log2 e) rounds that send s times the mean number of bits set in 0 .. e - 1 (about log2(e)/2): fewer
    latencies than direct for more bytes. Rounds follow one another.

    Leaves out the two local reorderings of the buffer.

    Examples
    --------
    8 MB over 8 ranks: 3 rounds of 4 MB.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = Fabric((FabricLevel("node", 8, 450e9, False, False, False, 1e-6),), 1)
    >>> demand = BruckAllToAll().demand("all_to_all", GroupTraffic(np.array([8e6]), np.array([[8.0]])), node)
    >>> float(demand.levels[0].rounds[0]), float(demand.levels[0].wire_bytes[0])
    (3.0, 12000000.0)
    """

    name: ClassVar[str] = "bruck"

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Rounds and bits of each level."""
        levels = []
        for extent in traffic.extents:
            rounds = np.ceil(np.log2(extent))
            levels.append(LevelDemand(rounds, rounds, traffic.num_bytes * bits_below(extent) / extent))
        return CollectiveDemand(tuple(levels), traffic.num_bytes / traffic.ranks, self.name, "serial")

    def routes(self, layout: GroupLayout) -> list[list[IntArray]]:
        """Bit by bit, level by level."""
        return [list(self._places(layout))]

    def _places(self, layout: GroupLayout) -> Iterator[IntArray]:
        senders, receivers = pair_coordinates(layout)
        at = senders.copy()
        for level, extent in enumerate(layout.extents):
            way = (receivers[:, level] - senders[:, level]) % extent
            for bit in range((extent - 1).bit_length()):
                at[:, level] = (at[:, level] + (way & 1 << bit)) % extent
                yield ranks_at(layout, at)


def bits_below(count: FloatArray) -> FloatArray:
    """Number of bits set in 0 .. count - 1, together.

    Examples
    --------
    >>> bits_below(np.array([1.0, 2.0, 5.0, 8.0])).tolist()
    [0.0, 1.0, 5.0, 12.0]
    """
    total = count * 0.0
    for bit in range(MOST_BITS):
        half = 2.0**bit
        total = total + np.floor(count / (2 * half)) * half + np.maximum(count % (2 * half) - half, 0.0)
    return np.asarray(total)
