"""What sharing real wires adds to a collective's wire time: flows over the closed form, per kind and group.

The closed forms take each device's share of a level as its own. On the wires of a cluster, flows of all groups at once
may meet: on the uplinks of an oversubscribed leaf, on links of a torus between strided ranks. The factor is the time of
the flows over that of the closed form, both on links of the stack's fractions; it multiplies the wire time of the
library's formula, whose latencies stay. Without contention it is 1.

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
from moesim.structure.placement import ProcessGroup, group_extents
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
        """Factors of groups, of the shape that sizes and strides broadcast to; at least 1."""
        size, stride = np.broadcast_arrays(group.size, group.stride)
        pairs, inverse = np.unique(np.stack([size.ravel(), stride.ravel()]), axis=1, return_inverse=True)
        factors = np.array([self._factor(kind, int(pair[0]), int(pair[1])) for pair in pairs.T])
        return factors[inverse.ravel()].reshape(size.shape)

    def _factor(self, kind: CollectiveKind, size: int, stride: int) -> float:
        if (kind, size, stride) not in self._known:
            self._known[kind, size, stride] = max(self.flows_over_closed_form(kind, size, stride) or 1.0, 1.0)
        return self._known[kind, size, stride]

    def flows_over_closed_form(self, kind: CollectiveKind, size: int, stride: int) -> float | None:
        """Wire time of the flows of all groups at once over that of the closed form.

        None for broadcasts and for groups that do not fill the job or their levels evenly: they are not simulated.
        """
        group = ProcessGroup(np.array([float(size)]), np.array([float(stride)]))
        extents = group_extents(group, self.fabric.sizes)
        if size < 2 or self.num_ranks % (size * stride) or np.prod(extents) != size or kind == "broadcast":
            return None
        traffic = GroupTraffic(np.array([LONG_BYTES]), extents)
        demand = algorithms_of(kind)[ALGORITHMS[kind]].demand(kind, traffic, self._as_routed)
        closed = float(wire_time_s(demand, self._bandwidths(kind))[0])
        flows = self._exchange_s(size, stride) if kind == "all_to_all" else self._steps_s(kind, size, stride, extents)
        return flows / closed if closed > 0 else None

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
"""Whose flows are compared with whose closed form."""


def _with_crossbars(cluster: Cluster) -> Cluster:
    fabric = cluster.fabric
    if not isinstance(fabric, HierarchicalFabric):
        return cluster
    levels = [
        level.model_copy(update={"medium": CROSSBAR, "wiring": None}) if level.tier == "scale_up" else level
        for level in fabric.levels
    ]
    return cluster.model_copy(update={"fabric": fabric.model_copy(update={"levels": levels})})
