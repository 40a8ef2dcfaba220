"""Predicted times: gloo's plans on moesim's wires, and what the stack ``gloo_tcp`` adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import GroupTraffic, wire_time_s
from moesim.cost.collectives import fabric_rates
from moesim.cost.communication_libraries import FabricRates, LevelRates, Protocol, transfer
from moesim.describe.hardware import Cluster, TorusFabric
from moesim.describe.hardware_library import HardwareLibrary
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CollectiveKind
from moesim.structure.topology import Topology
from moesim.structure.topology_builders import build_topology
from validation.netlab.gloo_plans import PLANS, exchange_times, plan_wire_s
from validation.netlab.topologies import LabTopology, cluster_document

PROFILES = Path(__file__).parent / "profiles"
LIBRARY = "gloo_tcp"
STACK = "gloo_tcp"
HOST_DEVICE = "netlab_host"
SHORTEST_S = 1e-9


@dataclass(frozen=True)
class LibraryConstants:
    """What is fitted: latencies in seconds, and the part of a link's rate that is the collectives' bytes.

    ``exchange_base_s`` is that of one message, so that one group's size tells what a peer adds.
    """

    message_s: float
    peer_s: float
    base_s: float
    round_s: float
    exchange_fraction: float
    reduce_fraction: float
    message_fraction: float

    def applied(self, level: LevelRates) -> LevelRates:
        """A level under these constants; what starts a collective is counted on the innermost one."""
        starts = 1.0 if level.name == "node" else 0.0
        return replace(
            level,
            reduction=Protocol(starts * self.base_s, self.round_s, 0.0, 0.0, self.reduce_fraction, 0.0),
            exchange=Protocol(starts * self.message_s, 0.0, self.peer_s, 0.0, self.exchange_fraction, 0.0),
            message=Protocol(self.message_s, 0.0, 0.0, 0.0, self.message_fraction, 0.0),
        )

    def documents(self, source: str, *, latency_error: float, fraction_error: float) -> dict[str, dict[str, Any]]:
        """Files of the library: of the innermost level, and of the network around it."""
        shared = {
            "round_latency": _us(self.round_s),
            "peer_latency": _us(self.peer_s),
            "point_to_point_latency": _us(self.message_s),
            "reduce_fraction": round(self.reduce_fraction, 4),
            "all_to_all_fraction": round(self.exchange_fraction, 4),
            "point_to_point_fraction": round(self.message_fraction, 4),
        }
        inner = {"base_latency": _us(self.base_s), "all_to_all_base_latency": _us(self.message_s), **shared}
        outer = {"base_latency": _us(0.0), "all_to_all_base_latency": _us(0.0), **shared}
        return {
            name: {
                "schema_version": 1,
                "id": name,
                "kind": "fitted",
                "source": source,
                "systems": 1,
                "latency_error_fraction": round(latency_error, 3),
                "fraction_error_fraction": round(fraction_error, 3),
                "constants": constants,
            }
            for name, constants in ((LIBRARY, inner), (f"{LIBRARY}_network", outer))
        }


def _us(seconds: float) -> str:
    return f"{float(f'{seconds * 1e6:.4g}')} us"


@dataclass(frozen=True)
class Network:
    """One emulated network as moesim sees it: its wires, and gloo's view of one flat group on them.

    ``rates`` are those of as many ranks on one switch: gloo's latencies know no levels.
    """

    topology: Topology
    rates: FabricRates
    tiers: frozenset[str]

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return self.topology.num_devices

    def protocol(self, kind: str) -> Protocol:
        """What the library makes of a kind of collective."""
        level = self.rates.levels[-1]
        if kind == "all_to_all":
            return level.exchange
        return level.message if kind == "point_to_point" else level.reduction

    def link_fractions(self, kind: str) -> dict[str, float]:
        """Part of the bandwidth that long messages reach, on every tier of the network."""
        return dict.fromkeys(self.tiers, min(float(self.protocol(kind).fraction), 1.0))

    def seconds(self, kind: str, num_bytes: float, wire_s: float) -> float:
        """Join wire time and latencies by the library's formula.

        Parameters
        ----------
        kind : str
            Kind of collective.
        num_bytes : float
            Bytes as nccl-tests counts them; what they come to on the wires is in ``wire_s``.
        wire_s : float
            When the flows end.
        """
        if kind == "all_to_all":
            return self._seconds("all_to_all", "direct", num_bytes, wire_s)
        return self._seconds(*PLANS[kind], num_bytes, wire_s)

    def _seconds(self, kind: CollectiveKind, name: str, num_bytes: float, wire_s: float) -> float:
        ranks = 2.0 if kind == "point_to_point" else float(self.ranks)
        traffic = GroupTraffic(np.array([num_bytes]), np.array([[1.0], [ranks]]))
        demand = algorithms_of(kind)[name].demand(kind, traffic, self.rates)
        protocols = [self._protocols(level, kind) for level in range(len(self.rates.levels))]
        fraction = min(float(protocols[-1].fraction), 1.0)
        closed_s = wire_time_s(demand, [level.bandwidth * fraction for level in self.rates.levels])
        shared = replace(traffic, contention=wire_s / closed_s)
        return float(transfer(demand, protocols, shared, self.rates).time_s[0])

    def _protocols(self, level: int, kind: CollectiveKind) -> Protocol:
        rates = self.rates.levels[level]
        if kind == "all_to_all":
            return rates.exchange
        return rates.message if kind == "point_to_point" else rates.reduction

    def exchanges_s(self, exchanges: Sequence[FloatArray], arrivals_s: Sequence[FloatArray]) -> FloatArray:
        """When each rank is through with each of some all-to-alls that share the wires, (n_exchanges, n_ranks).

        The library's latency comes on top of each, as it does for the group as a whole.
        """
        fractions, notice_s = self.link_fractions("all_to_all"), float(self.protocol("point_to_point").base_s) / 2
        through = exchange_times(self.topology, exchanges, arrivals_s, fractions, notice_s=notice_s)
        for rank_s, pair_bytes, arrival_s in zip(through, exchanges, arrivals_s, strict=True):
            mean_bytes = max(float(pair_bytes.sum()) / self.ranks, 1.0)
            wire_s = max(float(rank_s.max() - arrival_s.max()), SHORTEST_S)
            rank_s += self.seconds("all_to_all", mean_bytes, wire_s) - wire_s
        return through

    def exchange_s(self, pair_bytes: FloatArray, arrival_s: FloatArray) -> float:
        """When all ranks are through with one all-to-all."""
        return float(self.exchanges_s([pair_bytes], [arrival_s]).max())

    def collective_s(self, kind: str, num_bytes: float) -> float:
        """Seconds of a collective that all ranks start together."""
        return self.seconds(kind, num_bytes, plan_wire_s(self.topology, kind, num_bytes, self.link_fractions(kind)))


class Predictor:
    """Networks under the constants of the library that a folder of profiles has."""

    def __init__(self, profiles: Path = PROFILES, constants: LibraryConstants | None = None) -> None:
        library = HardwareLibrary([profiles, PROFILES])
        self._device, self._stack = library.device(HOST_DEVICE), library.stack(STACK)
        self._constants = constants
        self._known: dict[LabTopology, Network] = {}

    def network(self, lab: LabTopology) -> Network:
        """One network; built once."""
        if lab not in self._known:
            cluster = Cluster.model_validate(cluster_document(lab))
            flat = Cluster.model_validate(cluster_document(LabTopology("flat", lab.ranks, lab.rate)))
            rates = fabric_rates(flat, self._device, self._stack)
            if self._constants is not None:
                rates = replace(rates, levels=tuple(self._constants.applied(level) for level in rates.levels))
            self._known[lab] = Network(build_topology(cluster, self._device), rates, _tiers(cluster))
        return self._known[lab]


def _tiers(cluster: Cluster) -> frozenset[str]:
    if isinstance(cluster.fabric, TorusFabric):
        return frozenset({"torus"})
    return frozenset(level.tier for level in cluster.fabric.levels)
