"""Collectives in a logarithmic number of rounds over doubling distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm
from moesim.cost.collective_algorithms.rounds import BlocksOf, Rounds, plan_of, shards_of, side_by_side
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.columns import IntArray
from moesim.structure.communication_plans import CommunicationPlan, Move
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind


@final
class Recursive(AbstractAlgorithm):
    """All-gather by doubling, reduce-scatter by halving, for any number of ranks (Bruck et al. 1997 and its dual).

    On each level, outermost first: round r passes on what a rank has gathered, to the rank 2^r positions back; e - 1
    shards in ceil(log2 e) rounds: (e - 1)/e of the level's buffer, the bytes of a ring in fewer latencies. Rounds
    follow one another.

    Stops being true where distant partners share links, as on a torus.

    Examples
    --------
    All-gather to 16 MB on 2 nodes of 8: 3 rounds and 14 MB inside, 1 round and 1 MB between.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = Recursive().demand("all_gather", traffic, Fabric((node, network), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(3.0, 14000000.0), (1.0, 1000000.0)]
    """

    name: ClassVar[str] = "recursive"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("all_gather", "reduce_scatter")

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """A logarithm of rounds for a ring's bytes."""
        levels = []
        for extent, inside in zip(traffic.extents, traffic.inside, strict=True):
            volume = traffic.num_bytes / inside * (extent - 1.0) / extent
            levels.append(LevelDemand(np.ceil(np.log2(extent)), traffic.num_bytes * 0.0, volume))
        return CollectiveDemand(tuple(levels), traffic.num_bytes / traffic.ranks, self.name, "serial")

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """All-gather from the outermost level in; reduce-scatter is its dual."""
        ranks, rounds = layout.num_ranks, []
        for level in reversed(range(layout.num_levels)):
            shards = shards_of(layout, level, range(level))
            rounds += side_by_side(_doubling(line, shards) for line in layout.lines(level))
        return plan_of(kind, ranks, [rounds], np.full(ranks, num_bytes / ranks), owners=np.arange(ranks))


def _doubling(line: IntArray, blocks: BlocksOf) -> Rounds:
    """Round r: the shards of up to 2^r members from the sender on, to the member 2^r back."""
    size, first = len(line), int(line[0])
    rounds: Rounds = []
    distance = 1
    while distance < size:
        count = min(distance, size - distance)
        rounds.append(
            [
                (int(line[k]), int(line[(k - distance) % size]), _many(blocks, first, k, count=count, size=size))
                for k in range(size)
            ]
        )
        distance *= 2
    return rounds


def _many(blocks: BlocksOf, first: int, member: int, *, count: int, size: int) -> list[int]:
    return [block for step in range(count) for block in blocks(first, (member + step) % size)]


@final
class HalvingDoubling(AbstractAlgorithm):
    """Rabenseifner's all-reduce: halve the buffer while reducing, double it while gathering.

    On a level whose extent is a power of two p: 2 log2 p rounds, 2 (p - 1)/p of the level's buffer. Else the ranks
    beyond the largest such p hand their whole buffer to a partner first and get the result last: two rounds and twice
    the buffer more (Thakur, Rabenseifner and Gropp 2005, section 4.5). Outer levels work on a p-th of it.

    Examples
    --------
    8 MB on 8 ranks: 14 MB in 6 rounds, as many bytes as a ring sends in 14. On 6 ranks: 4 rounds of 12 MB, 2 of 8 MB.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = Fabric((FabricLevel("node", 8, 450e9, False, False, False, 1e-6),), 1)
    >>> traffic = GroupTraffic(np.array([8e6, 8e6]), np.array([[8.0, 6.0]]))
    >>> demand = HalvingDoubling().demand("all_reduce", traffic, node)
    >>> demand.levels[0].rounds.tolist(), demand.levels[0].wire_bytes.tolist()
    ([6.0, 6.0], [14000000.0, 28000000.0])
    """

    name: ClassVar[str] = "halving_doubling"
    kinds: ClassVar[tuple[CollectiveKind, ...]] = ("all_reduce",)

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Halving and doubling, and the fold of what exceeds a power of two."""
        shard, levels = traffic.num_bytes, []
        for extent in traffic.extents:
            power = 2.0 ** np.floor(np.log2(extent))
            folds = (extent > power) * 2.0
            volume = (2.0 * (power - 1.0) / power + folds) * shard
            levels.append(LevelDemand(2.0 * np.log2(power) + folds, traffic.num_bytes * 0.0, volume))
            shard = shard / power
        return CollectiveDemand(tuple(levels), traffic.num_bytes * 0.0, self.name, "serial")

    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """Spread from the outermost level in, and its dual before."""
        powers = [1 << (extent.bit_length() - 1) for extent in layout.extents]
        core = GroupLayout.switched(*powers)
        rank_of = [layout.rank_of(position.tolist()) for position in core.coordinates]
        rounds: Rounds = []
        for level in reversed(range(layout.num_levels)):
            shards = shards_of(core, level, range(level))
            doubled = side_by_side(_doubling(line, shards) for line in core.lines(level))
            rounds += _widened(_renamed(doubled, rank_of), layout, level, powers)
            rounds += _unfold(layout, core, level, powers)
        blocks = core.num_ranks
        return plan_of(kind, layout.num_ranks, [rounds], np.full(blocks, num_bytes / blocks), owners=np.arange(blocks))


def _renamed(rounds: Rounds, rank_of: Sequence[int]) -> Rounds:
    return [[(rank_of[source], rank_of[target], blocks) for source, target, blocks in moves] for moves in rounds]


def _widened(rounds: Rounds, layout: GroupLayout, level: int, powers: Sequence[int]) -> Rounds:
    """Also on the lines whose outer positions lie beyond a power of two: they were unfolded already."""
    outer = [
        position
        for position in layout.coordinates[:, level + 1 :].tolist()
        if any(digit >= power for digit, power in zip(position, powers[level + 1 :], strict=True))
    ]
    shifts = sorted({layout.rank_of([0] * (level + 1) + position) for position in outer})
    stride = layout.stride(level + 1)
    widened: Rounds = []
    for moves in rounds:
        first = [move for move in moves if move[0] < stride]
        widened.append(
            moves + [(source + by, target + by, blocks) for by in shifts for source, target, blocks in first]
        )
    return widened


def _unfold(layout: GroupLayout, core: GroupLayout, level: int, powers: Sequence[int]) -> Rounds:
    """Members beyond the power of two get everything their partner has."""
    power, stride = powers[level], layout.stride(level)
    moves: list[Move] = []
    for source, position in enumerate(layout.coordinates.tolist()):
        inner_is_active = all(digit < powers[inner] for inner, digit in enumerate(position[:level]))
        if inner_is_active and position[level] + power < layout.extents[level]:
            same = (core.coordinates[:, :level] == position[:level]).all(axis=1)
            moves.append((source, source + stride * power, np.flatnonzero(same).tolist()))
    return [moves] if moves else []
