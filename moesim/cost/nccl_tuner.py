"""Which algorithm and protocol NCCL takes: its own tuner's prediction, from the constants it ships.

Source of every number here unless noted: NVIDIA/nccl, src/graph/tuning.cc and topo.h, version 2.30.7 (commit 5067397c);
the ratio 5/6 of in-switch reduction and which bandwidth serves which node count as in the same file at b6475625. Times
decide only between algorithms: NCCL's own prediction misses measured times by a quarter, and a stack's library prices
what was chosen. All-to-all has no entry: it is grouped send and receive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.cost.collective_demands import FabricLevel, GroupTraffic
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.step_graph import CollectiveKind

Generation = Literal["volta", "ampere", "hopper", "blackwell"]
PROTOCOLS: tuple[str, ...] = ("LL", "LL128", "Simple")
SIMPLE = 2

BASE_LATENCY_US: Mapping[str, tuple[float, float, float]] = {"tree": (6.8, 14.0, 8.4), "ring": (6.6, 14.0, 8.4)}
HARDWARE_LATENCY_US: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "nvlink": {"tree": (0.6, 1.25, 4.0), "ring": (0.6, 1.9, 3.4), "nvls": (0.0, 0.0, 25.0)},
    "pci": {"tree": (1.0, 1.9, 4.0), "ring": (1.0, 2.5, 5.7), "nvls": (0.0, 0.0, 0.0)},
    "net": {"tree": (5.0, 8.5, 14.0), "ring": (2.7, 4.0, 14.0), "nvls": (0.0, 0.0, 20.9)},
}
"""Per step, LL, LL128, Simple; nvls between nodes is NVLSTree."""
NET_OVERHEAD_US = (1.0, 1.0, 3.0)
"""Intel hosts; twice that on AMD."""

LL_MOST_GB_S: Mapping[Generation, tuple[float, float, float]] = {
    "volta": (39.0, 39.0, 20.4),
    "ampere": (87.7, 22.5, 19.0),
    "hopper": (141.0, 45.0, 35.0),
    "blackwell": (282.0, 90.0, 70.0),
}
"""On 1, 2 and more nodes. NCCL picks the row of several nodes by the host's CPU; here by the device."""
RING_LL128_MOST_GB_S: Mapping[Generation, float] = {"volta": 20.0, "ampere": 20.0, "hopper": 36.7, "blackwell": 40.0}
TREE_LL128_MOST_GB_S: Mapping[Generation, tuple[float, float, float]] = {
    "volta": (20.0, 20.0, 20.0),
    "ampere": (20.0, 20.0, 20.0),
    "hopper": (36.7, 36.7, 29.0),
    "blackwell": (55.6, 31.67, 20.0),
}
TREE_MOST_GB_S: Mapping[Generation, tuple[float, float, float]] = {
    "volta": (26.5, 18.5, 10.0),
    "ampere": (24.0, 23.6, 17.8),
    "hopper": (38.7, 41.4, 36.0),
    "blackwell": (70.0, 42.8, 24.0),
}
"""Per channel, on 1, 2 and more nodes."""
NVLS_EFFICIENCY: Mapping[Generation, float] = {"hopper": 0.85, "blackwell": 0.74}
NVLS_RATIO = 5.0 / 6.0
LINK_FRACTION: Mapping[Generation, float] = {
    "volta": 20.0 / 25.0,
    "ampere": 20.0 / 25.0,
    "hopper": 20.6 / 25.0,
    "blackwell": 40.1 / 50.0,
}
"""NVLink as NCCL counts it over its nominal rate per direction."""
NET_FRACTION = 12.0 / 12.5
CHANNELS = (24.0, 16.0, 16.0)
"""Channels on 1, 2 and more nodes: assumed, as NCCL's logs on eight-GPU nodes print; they only bound rates."""
RING_PLATEAU: Mapping[Generation, float] = {"volta": 1.9, "ampere": 1.4, "hopper": 1.4, "blackwell": 1.4}
PLATEAU_BYTES = 64.0

TREE_CORRECTION = np.array(
    [
        [1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 1, 1, 1],
        [0.9] * 7 + [0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9, 0.9, 0.9],
    ]
)
"""treeCorrectionFactor: per protocol, for buffers of 64 B, 128 B, ... 512 MB."""


@dataclass(frozen=True)
class TunedChoice:
    """What NCCL takes, arrays (n_cases,): names of algorithms and protocols, and its own predicted seconds."""

    algorithm: tuple[str, ...]
    protocol: tuple[str, ...]
    predicted_s: FloatArray


def nccl_choice(
    kind: CollectiveKind, traffic: GroupTraffic, levels: tuple[FabricLevel, ...], generation: Generation
) -> TunedChoice:
    """Algorithm and protocol that NCCL's tuner predicts to be fastest.

    Parameters
    ----------
    kind : str
        One of all_reduce, all_gather, reduce_scatter.
    traffic : GroupTraffic
        The cases.
    levels : tuple of FabricLevel
        Node, then whatever joins nodes; nominal bandwidths.
    generation : str
        Volta, Ampere, Hopper or Blackwell.

    Returns
    -------
    TunedChoice
        One algorithm (ring, tree, nvls) and protocol (LL, LL128, Simple) per case.

    Examples
    --------
    Eight H100: short buffers take the tree or ring with LL, long ones the switch (as H200 does from 2 MiB on).

    >>> node = FabricLevel("node", 8, 450e9, False, False, False, 1e-6)
    >>> traffic = GroupTraffic(np.array([1024.0, 2.0**30]), np.array([[8.0, 8.0]]))
    >>> choice = nccl_choice("all_reduce", traffic, (node,), "hopper")
    >>> choice.algorithm, choice.protocol
    (('ring', 'nvls'), ('LL', 'Simple'))
    """
    tuner = _Tuner(kind, traffic, levels, generation)
    ways = {("ring", name): tuner.ring_s(index) for index, name in enumerate(PROTOCOLS)}
    if kind == "all_reduce":
        ways |= {("tree", name): tuner.tree_s(index) for index, name in enumerate(PROTOCOLS)}
        if generation in NVLS_EFFICIENCY:
            ways["nvls", PROTOCOLS[SIMPLE]] = tuner.nvls_s()
    names, table = list(ways), np.stack(list(ways.values()))
    best = table.argmin(axis=0)
    return TunedChoice(
        tuple(names[way][0] for way in best), tuple(names[way][1] for way in best), np.asarray(table.min(axis=0))
    )


@dataclass(frozen=True)
class _Tuner:
    """NCCL's predictions for some cases, arrays (n_cases,)."""

    kind: CollectiveKind
    traffic: GroupTraffic
    levels: tuple[FabricLevel, ...]
    generation: Generation

    @property
    def nodes(self) -> FloatArray:
        return np.asarray(self.traffic.ranks / self.traffic.extents[0])

    @property
    def row(self) -> IntArray:
        """Column of NCCL's tables: 1, 2, or more nodes."""
        return (np.minimum(self.nodes, 3) - 1).astype(np.int64)

    @property
    def channels(self) -> FloatArray:
        return np.array(CHANNELS)[self.row]

    @property
    def inside_bandwidth(self) -> float:
        """Bytes/s of a device's NVLinks as NCCL counts them."""
        return self.levels[0].bandwidth * LINK_FRACTION[self.generation]

    @property
    def network_bandwidth(self) -> FloatArray:
        """Bytes/s of a node's NICs together, of the slowest level that the groups span."""
        outside = [
            level.bandwidth
            for level, extent in zip(self.levels[1:], self.traffic.extents[1:], strict=True)
            if extent.max() > 1
        ]
        return np.asarray(min(outside, default=np.inf) * NET_FRACTION * self.traffic.extents[0])

    def most(self, table: Mapping[Generation, tuple[float, float, float]]) -> FloatArray:
        """Bytes/s of a table's column."""
        return np.array(table[self.generation])[self.row] * 1e9

    def bus_bandwidth(self, largest_inside: int) -> FloatArray:
        """Bytes/s of all channels; up to ``largest_inside`` nodes NCCL takes the rate inside a node."""
        inside = self.inside_bandwidth
        return np.where(self.nodes > largest_inside, np.minimum(inside, self.network_bandwidth), inside)

    def ring_s(self, protocol: int) -> FloatArray:
        """Ring: a step per rank; steps inside a node take at least the network's overhead where there is one."""
        ranks, nodes = self.traffic.ranks, self.nodes
        passes = 2.0 if self.kind == "all_reduce" else 1.0
        steps, between = passes * (ranks - 1.0), passes * (nodes - 1.0)
        bandwidth = self.bus_bandwidth(1)
        rates = (
            np.minimum(bandwidth * 0.5, self.most(LL_MOST_GB_S)),
            np.minimum(bandwidth * 0.92, self.channels * RING_LL128_MOST_GB_S[self.generation] * 1e9),
            bandwidth,
        )
        inside = HARDWARE_LATENCY_US["nvlink"]["ring"][protocol]
        inside_us = np.where(nodes > 1, np.maximum(inside, NET_OVERHEAD_US[protocol]), inside)
        step_us = (steps - between) * inside_us + between * HARDWARE_LATENCY_US["net"]["ring"][protocol]
        latency = (BASE_LATENCY_US["ring"][protocol] + step_us) * 1e-6
        if self.kind == "all_reduce" and protocol == SIMPLE:
            plateau = (nodes > 1) & (self.traffic.num_bytes / (self.channels * ranks) >= PLATEAU_BYTES)
            latency = latency * np.where(plateau, RING_PLATEAU[self.generation], 1.0)
        return np.asarray(latency + self.traffic.num_bytes * steps / (rates[protocol] * ranks))

    def tree_s(self, protocol: int) -> FloatArray:
        """Tree: chains inside nodes, a logarithm of steps between them; NCCL's correction by size."""
        num_bytes, nodes = self.traffic.num_bytes, self.nodes
        plain = np.minimum(self.bus_bandwidth(2) * 0.92, self.channels * self.most(TREE_MOST_GB_S))
        rates = (
            np.minimum(plain / 3.8, self.most(LL_MOST_GB_S)),
            np.minimum(
                plain * np.where(nodes > 1, 120.0 / 128.0, 7.0 / 9.0), self.channels * self.most(TREE_LL128_MOST_GB_S)
            ),
            plain,
        )
        inside_us = (self.traffic.extents[0] - 1.0) * HARDWARE_LATENCY_US["nvlink"]["tree"][protocol]
        between_us = np.floor(np.log2(nodes)) * HARDWARE_LATENCY_US["net"]["tree"][protocol]
        latency = (BASE_LATENCY_US["tree"][protocol] + 2.0 * (inside_us + between_us)) * 1e-6
        size = np.floor(np.log2(np.maximum(num_bytes, 64.0) / 64.0)).astype(np.int64)
        last = TREE_CORRECTION.shape[1] - 1
        correction = np.where(size <= last, TREE_CORRECTION[protocol][np.minimum(size, last)], 1.0)
        return np.asarray(latency + num_bytes / (rates[protocol] * 0.5 * correction))

    def nvls_s(self) -> FloatArray:
        """NVLS in a node, NVLSTree over several; not for two devices or fewer."""
        nodes, inside = self.nodes, self.inside_bandwidth
        shared = np.where(nodes > 2, self.network_bandwidth / 2.0, self.network_bandwidth)
        bandwidth = np.where(nodes > 1, np.minimum(inside, shared), inside)
        between_us = 2.0 * np.floor(np.log2(nodes)) * HARDWARE_LATENCY_US["net"]["nvls"][SIMPLE]
        latency = (HARDWARE_LATENCY_US["nvlink"]["nvls"][SIMPLE] + between_us) * 1e-6
        wire = self.traffic.num_bytes / (bandwidth * NVLS_EFFICIENCY[self.generation] * NVLS_RATIO)
        return np.where(self.traffic.extents[0] > 2, latency + wire, np.inf)
