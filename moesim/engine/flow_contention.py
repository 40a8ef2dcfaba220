"""What sharing real wires adds to a collective's wire time: flows over the closed form, per kind and group.

The closed forms take each device's share of a level as its own. On the wires of a cluster, flows of all groups at once
may meet: on the uplinks of an oversubscribed leaf, on links of a torus between strided ranks. Groups that lie across
the ends of domains, which closed forms do not know, run rings of their own. The factor is the time of
the flows over that of the closed form, both on links of the stack's fractions; it multiplies the wire time of the
library's formula, whose latencies stay. Without contention it is 1; across ends it may be below.

What the wires inside a scale-up domain lose (a hybrid cube mesh) is in the stack's fraction, which was measured on such
domains: they count as crossbars here. Flows of one size that start together scale with their bytes, so each kind and
group is simulated once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import GroupTraffic, wire_time_s
from moesim.cost.communication_libraries import FabricRates
from moesim.describe.hardware import Cluster, Device, HierarchicalFabric
from moesim.engine.flow_network_traffic import Flows, simulate_flows, uniform_all_to_all
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.placement import ProcessGroup, crossed_level, group_extents
from moesim.structure.step_graph import CollectiveKind
from moesim.structure.topology import Topology
from moesim.structure.topology_builders import build_topology
from moesim.structure.topology_symmetry import RankPattern

LONG_BYTES = 1e15
"""So long that the latency of hops does not count."""
CROSSBAR = "crossbar"


@dataclass
class FlowContention:
    """Contention factors of one cluster, simulated when first asked for.

    Attributes
    ----------
    cluster, device
        Whose wires.
    fabric : FabricRates
        Levels under the stack, without contention.
    num_ranks : int
        Ranks of the job; all groups of a kind run at once.
    """

    cluster: Cluster
    device: Device
    fabric: FabricRates
    num_ranks: int
    _topology: Topology | None = None
    _known: dict[tuple[CollectiveKind, int, int], float] = field(default_factory=dict)

    def __call__(self, kind: CollectiveKind, group: ProcessGroup) -> FloatArray:
        """Factors of groups, of the shape that sizes and strides broadcast to; at least 1 but across ends."""
        size, stride = np.broadcast_arrays(group.size, group.stride)
        pairs, inverse = np.unique(np.stack([size.ravel(), stride.ravel()]), axis=1, return_inverse=True)
        factors = np.array([self._factor(kind, int(pair[0]), int(pair[1])) for pair in pairs.T])
        return factors[inverse.ravel()].reshape(size.shape)

    def _factor(self, kind: CollectiveKind, size: int, stride: int) -> float:
        if (kind, size, stride) not in self._known:
            factor = self.flows_over_closed_form(kind, size, stride) or 1.0
            lowest = 0.0 if self._lies_across(size, stride) else 1.0
            self._known[kind, size, stride] = max(factor, lowest)
        return self._known[kind, size, stride]

    def flows_over_closed_form(self, kind: CollectiveKind, size: int, stride: int) -> float | None:
        """Wire time of the flows of all groups at once over that of the closed form.

        None for broadcasts and for groups that do not fill the job: they are not simulated.
        """
        extents = group_extents(_group(size, stride), self.fabric.sizes)
        if size < 2 or self.num_ranks % (size * stride) or kind == "broadcast":
            return None
        traffic = GroupTraffic(np.array([LONG_BYTES]), extents)
        is_across, algorithm = self._lies_across(size, stride), ALGORITHMS[kind]
        if is_across and algorithm == "hierarchical_ring" and not any(level.is_ring for level in self.fabric.levels):
            algorithm = "ring"
        demand = algorithms_of(kind)[algorithm].demand(kind, traffic, self._as_routed)
        closed = float(wire_time_s(demand, self._bandwidths(kind))[0])
        if kind == "all_to_all":
            flows = self._exchange_s(size, stride)
        elif is_across:
            flows = self._ring_s(kind, size, stride)
        else:
            flows = self._steps_s(kind, size, stride, extents)
        return flows / closed if closed > 0 else None

    def _lies_across(self, size: int, stride: int) -> bool:
        """Whether some group has members in more domains than another, so that its extents are rough."""
        return crossed_level(_group(size, stride), self.fabric.sizes) is not None

    @cached_property
    def _as_routed(self) -> FabricRates:
        """The fabric whose all-to-alls go the shorter way round, as flows do, whatever the library makes of them."""
        levels = tuple(replace(level, all_to_all_wraps=level.wraps) for level in self.fabric.levels)
        return replace(self.fabric, levels=levels)

    def _bandwidths(self, kind: CollectiveKind) -> list[float]:
        return [level.bandwidth * self._fraction(kind, index) for index, level in enumerate(self.fabric.levels)]

    def _fraction(self, kind: CollectiveKind, level: int) -> float:
        rates = self.fabric.levels[level]
        protocol = {"all_to_all": rates.exchange, "point_to_point": rates.message}.get(kind, rates.reduction)
        return min(float(protocol.fraction), 1.0)

    def _link_fractions(self, kind: CollectiveKind) -> dict[str, float]:
        fabric = self.cluster.fabric
        if not isinstance(fabric, HierarchicalFabric):
            return {"torus": self._fraction(kind, len(self.fabric.levels) - 1)}
        return {level.tier: self._fraction(kind, index) for index, level in enumerate(fabric.levels)}

    @property
    def topology(self) -> Topology:
        """Wires of the cluster, scale-up domains as crossbars; built when first used."""
        if self._topology is None:
            self._topology = build_topology(_with_crossbars(self.cluster), self.device)
        return self._topology

    def _exchange_s(self, size: int, stride: int) -> float:
        pattern, fractions = RankPattern(self.num_ranks, size, stride), self._link_fractions("all_to_all")
        return uniform_all_to_all(self.topology, pattern, LONG_BYTES / size, link_fractions=fractions).makespan_s

    def _steps_s(self, kind: CollectiveKind, size: int, stride: int, extents: FloatArray) -> float:
        """Steps of the ring on each level, all groups at once; levels are pipelined, so the slowest counts.

        A message between neighbours is one such step.
        """
        pattern, position = RankPattern(self.num_ranks, size, stride), np.arange(size)
        inside, slowest = 1, 0.0
        for index, extent in enumerate(extents[:, 0].astype(np.int64)):
            if extent > 1:
                digit = position // inside % extent
                ahead = position + inside * ((digit + 1) % extent - digit)
                each = LONG_BYTES / inside / extent * (2.0 if kind == "all_reduce" else 1.0) * (extent - 1)
                if kind == "point_to_point":
                    each, ahead = LONG_BYTES, np.where(digit + 1 < extent, ahead, position)
                level = self.fabric.levels[index]
                both_ways = level.is_ring and level.wraps and extent >= level.size and kind != "point_to_point"
                slowest = max(slowest, self._step_s(kind, pattern, ahead, each, both_ways=both_ways))
            inside *= int(extent)
        return slowest

    def _ring_s(self, kind: CollectiveKind, size: int, stride: int) -> float:
        """Rings through all members, domain by domain: size - 1 steps of a part each, an all-reduce twice as many.

        There are as many rings at once as the smallest part of a group has members, each entering a domain at another
        one, so that a library's channels use several adapters. A message between neighbours is one step from each
        member to the next.
        """
        pattern, position = RankPattern(self.num_ranks, size, stride), np.arange(size)
        if kind == "point_to_point":
            return self._step_s(kind, pattern, np.minimum(position + 1, size - 1), LONG_BYTES, both_ways=False)
        domain = crossed_level(_group(size, stride), self.fabric.sizes) or self.num_ranks
        steps = (size - 1) * (2 if kind == "all_reduce" else 1)
        everyone = np.arange(self.num_ranks)
        firsts = everyone[everyone // stride % size == 0]
        parts = [_rings(members, domain) for members in pattern.peers(firsts)]
        source = np.concatenate([rings.ravel() for rings in parts])
        target = np.concatenate([np.roll(rings, -1, axis=1).ravel() for rings in parts])
        each = np.concatenate([np.full(rings.size, LONG_BYTES / size / len(rings)) for rings in parts])
        flows = Flows.of(source, target, each)
        return steps * simulate_flows(self.topology, flows, link_fractions=self._link_fractions(kind)).makespan_s

    def _step_s(
        self, kind: CollectiveKind, pattern: RankPattern, ahead: IntArray, each: float, *, both_ways: bool
    ) -> float:
        everyone = np.arange(self.num_ranks)
        place = everyone // pattern.stride % pattern.size
        target = pattern.peers(everyone)[everyone, ahead[place]]
        source = everyone
        if both_ways:
            source, target, each = np.concatenate([source, target]), np.concatenate([target, source]), each / 2.0
        fractions = self._link_fractions(kind)
        return simulate_flows(self.topology, Flows.of(source, target, each), link_fractions=fractions).makespan_s


ALGORITHMS: dict[CollectiveKind, str] = {
    "all_to_all": "direct",
    "all_reduce": "hierarchical_ring",
    "all_gather": "hierarchical_ring",
    "reduce_scatter": "hierarchical_ring",
    "point_to_point": "send",
}
"""Whose flows are compared with whose closed form; rings across ends of switched domains with that of one ring."""


def _rings(members: IntArray, domain: int) -> IntArray:
    """Orders of a group's members, shape (n_rings, size): domain by domain, each ring over other borders.

    Where all parts have two or more places of their domains in common, a ring leaves and enters domains at the same
    place, its rail; else it enters every part at another member.

    >>> _rings(np.array([0, 1, 2, 8, 9]), 8).tolist()
    [[0, 2, 1, 9, 8], [1, 2, 0, 8, 9]]
    >>> _rings(np.array([6, 7, 8, 9, 10]), 8).tolist()
    [[6, 7, 8, 9, 10], [7, 6, 9, 10, 8]]
    """
    parts = np.split(members, np.flatnonzero(np.diff(members // domain)) + 1)
    rails = sorted(set.intersection(*(set((part % domain).tolist()) for part in parts)))
    if len(rails) < 2:
        turns = range(min(map(len, parts)))
        return np.stack([np.concatenate([np.roll(part, -turn) for part in parts]) for turn in turns])
    borders = [(rail, rails[(place + 1) % len(rails)]) for place, rail in enumerate(rails)]
    rings = []
    for ends in borders:
        pieces = [_between(part, domain, ends if index % 2 == 0 else ends[::-1]) for index, part in enumerate(parts)]
        rings.append(np.concatenate(pieces))
    return np.stack(rings)


def _between(part: IntArray, domain: int, ends: tuple[int, ...]) -> IntArray:
    """A part's members from the one at the first place to the one at the last."""
    place = part % domain
    inner = part[~np.isin(place, ends)]
    return np.concatenate([part[place == ends[0]], inner, part[place == ends[1]]])


def _group(size: int, stride: int) -> ProcessGroup:
    return ProcessGroup(np.array([float(size)]), np.array([float(stride)]))


def _with_crossbars(cluster: Cluster) -> Cluster:
    fabric = cluster.fabric
    if not isinstance(fabric, HierarchicalFabric):
        return cluster
    levels = [
        level.model_copy(update={"medium": CROSSBAR, "wiring": None}) if level.tier == "scale_up" else level
        for level in fabric.levels
    ]
    return cluster.model_copy(update={"fabric": fabric.model_copy(update={"levels": levels})})
