"""All-to-all in stages, one per level of links: hierarchical, rail-aligned, and a torus axis by axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np

from moesim.cost.collective_algorithms.algorithm import TORUS, LinkStyle, closes
from moesim.cost.collective_algorithms.exchanges import (
    AbstractAllToAll,
    axis_hops,
    axis_load,
    distinct_fraction,
    pair_coordinates,
    ranks_at,
)
from moesim.cost.collective_algorithms.rings import axis_orders
from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic, LevelDemand
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.communication_plans import CommunicationPlan, Move, Transfers
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind


def _stages(layout: GroupLayout, order: Sequence[int]) -> list[IntArray]:
    """Places of the blocks when each stage takes them to the receiver's position along one level."""
    at, receivers = pair_coordinates(layout)
    places = []
    for level in order:
        at = at.copy()
        at[:, level] = receivers[:, level]
        places.append(ranks_at(layout, at))
    return places


@final
class HierarchicalAllToAll(AbstractAllToAll):
    """Two-dimensional hierarchical all-to-all of Tutel and DeepSpeed: inside the node first, then between nodes.

    A device first collects, inside its node, what all devices of the node send to its own position in other nodes; then
    it exchanges with the same position of every other node: (g - 1)/g of the buffer inside, (k - 1)/k between, in k - 1
    messages of s/k instead of n - g of s/n. Stages follow one another, so times add. More than two levels likewise.

    Leaves out the strided copies between the stages (Tutel, section 3.4: aligned by two more passes over the buffer).

    Examples
    --------
    16 MB on 2 nodes of 8: 14 MB inside, then 8 MB to one peer between.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]))
    >>> demand = HierarchicalAllToAll().demand("all_to_all", traffic, Fabric((node, network), 1))
    >>> [(float(level.peers[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(7.0, 14000000.0), (1.0, 8000000.0)]
    """

    name: ClassVar[str] = "hierarchical"

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """One direct exchange per level."""
        levels = [
            LevelDemand((extent > 1) * 1.0, extent - 1.0, traffic.num_bytes * (extent - 1.0) / extent)
            for extent in traffic.extents
        ]
        return CollectiveDemand(tuple(levels), traffic.num_bytes / traffic.ranks, self.name, "serial")

    def routes(self, layout: GroupLayout) -> list[list[IntArray]]:
        """Innermost level first."""
        return [_stages(layout, range(layout.num_levels))]


@final
class RailAlignedAllToAll(AbstractAllToAll):
    """Over the network to the same position in the receiver's node, then forwarded over NVLink, as DeepEP's kernels.

    Between nodes a device talks to its own rail only: k - 1 peers, (k - 1)/k of the buffer; what arrives is forwarded
    inside, (g - 1)/g. Forwarding runs while more arrives, so the times combine by maximum. Where a token has K choices
    and each node gets one copy (at most M nodes), the network carries D(k)/K of it, D(m) = m (1 - (1 - 1/m)^K), and
    NVLink one copy per distinct device, D(n)/K; D over min(k, M) nodes (DeepSeek-V3, arXiv:2412.19437, 3.2.2).

    Choices are taken as independent and even; a real router's are neither.

    Examples
    --------
    16 MB of 8 choices on 2 nodes of 8: 1.992 nodes and 6.45 devices per token, 2 MB per choice.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> from moesim.structure.step_graph import RoutedCopies
    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> network = FabricLevel("network", 4, 50e9, False, False, False, 3e-6)
    >>> traffic = GroupTraffic(np.array([16e6]), np.array([[8.0], [2.0]]), RoutedCopies(8.0, np.inf))
    >>> demand = RailAlignedAllToAll().demand("all_to_all", traffic, Fabric((node, network), 1))
    >>> [round(float(level.wire_bytes[0]) / 1e6, 3) for level in demand.levels]
    [11.292, 1.992]
    """

    name: ClassVar[str] = "rail_aligned"

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """One direct exchange per level on what the copies leave, pipelined."""
        ranks, copies = traffic.ranks, traffic.copies
        levels = []
        for index, (extent, inside) in enumerate(zip(traffic.extents, traffic.inside, strict=True)):
            volume = traffic.num_bytes * (extent - 1.0) / extent
            if copies is not None:
                node = extent if index == 0 else inside * 0.0 + 1.0
                visited = np.minimum(ranks / (inside * node), copies.max_nodes) * node
                volume = volume * distinct_fraction(visited, copies.choices)
            levels.append(LevelDemand((extent > 1) * 1.0, extent - 1.0, volume))
        return CollectiveDemand(tuple(levels), traffic.num_bytes / ranks, self.name)

    def routes(self, layout: GroupLayout) -> list[list[IntArray]]:
        """Outermost level first."""
        return [_stages(layout, range(layout.num_levels)[::-1])]


def plan_of_tokens(
    sources: Sequence[int], chosen: Sequence[Sequence[int]], token_bytes: float, layout: GroupLayout
) -> CommunicationPlan:
    """Rail-aligned plan of tokens, each sent once to every domain that holds one of its chosen ranks.

    Parameters
    ----------
    sources : sequence of int
        Rank of each token.
    chosen : sequence of sequence of int
        Ranks of each token's experts; one named twice gets one copy.
    token_bytes : float
        Bytes of a token.
    layout : GroupLayout
        Where the ranks stand.

    Returns
    -------
    CommunicationPlan
        One block per token.
    """
    block_bytes = np.full(len(sources), token_bytes)
    coordinates, holders = layout.coordinates, [{source} for source in sources]
    rounds = []
    for level in reversed(range(layout.num_levels)):
        together: dict[tuple[int, int], list[int]] = {}
        for token, ranks in enumerate(chosen):
            arrived: set[int] = set()
            for rank in ranks:
                position = coordinates[sources[token]].copy()
                position[level + 1 :] = coordinates[rank, level + 1 :]
                before = layout.rank_of(position.tolist())
                position[level] = coordinates[rank, level]
                after = layout.rank_of(position.tolist())
                if after not in holders[token] | arrived:
                    together.setdefault((before, after), []).append(token)
                    arrived.add(after)
            holders[token] |= arrived
        moves: list[Move] = [(source, target, tokens) for (source, target), tokens in sorted(together.items())]
        if moves:
            rounds.append(Transfers.of(moves, block_bytes))
    starts = np.array([[token, source] for token, source in enumerate(sources)], dtype=np.int64).reshape(-1, 2)
    ends = [[token, rank] for token, ranks in enumerate(chosen) for rank in sorted(set(ranks))]
    chains = (tuple(rounds),) if rounds else ()
    wanted = np.array(ends, dtype=np.int64).reshape(-1, 2)
    return CommunicationPlan(layout.num_ranks, chains, block_bytes, starts=starts, ends=wanted)


@final
class TorusAllToAll(AbstractAllToAll):
    """Axis by axis: each of the d parts of every block takes the axes of a torus in another order.

    On each axis the whole buffer moves to the receiver's position: its busiest link carries N/8 of a chip's buffer with
    wraparound, N/4 without, as in the direct exchange with dimension-order routing, but in messages of s e/n to the
    e - 1 peers of the axis. The parts keep all axes busy, so times combine by maximum; latency adds the hops of the
    axes. Devices of a chip first exchange among themselves.

    Examples
    --------
    1 MB per chip on a closed 8 x 8: 8/8 of it on each link.

    >>> from moesim.cost.collective_demands import FabricLevel
    >>> axis = FabricLevel("axis", 8, 50e9, True, True, True, 1e-6)
    >>> traffic = GroupTraffic(np.array([1e6]), np.array([[8.0], [8.0]]))
    >>> demand = TorusAllToAll().demand("all_to_all", traffic, Fabric((axis, axis), 1))
    >>> [(float(level.rounds[0]), float(level.wire_bytes[0])) for level in demand.levels]
    [(4.0, 1000000.0), (4.0, 1000000.0)]
    """

    name: ClassVar[str] = "torus"
    links: ClassVar[tuple[LinkStyle, ...]] = TORUS

    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Hops and busiest link of each axis."""
        levels = []
        for level, extent in zip(fabric.levels, traffic.extents, strict=True):
            rounds: FloatArray = (extent > 1) * 1.0
            volume = traffic.num_bytes * (extent - 1.0) / extent
            if level.is_ring:
                ring = closes(level.all_to_all_wraps, level.size, extent)
                rounds = axis_hops(extent, ring)
                volume = traffic.num_bytes * fabric.devices_per_chip * axis_load(extent, ring)
            levels.append(LevelDemand(rounds, extent - 1.0, volume))
        return CollectiveDemand(tuple(levels), traffic.num_bytes / traffic.ranks, self.name)

    def routes(self, layout: GroupLayout) -> list[list[IntArray]]:
        """One part per order of the axes."""
        return [_stages(layout, order) for order in axis_orders(layout.is_ring)]
