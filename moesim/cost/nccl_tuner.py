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
    times: dict[tuple[str, str], FloatArray] = {}
    names = ("ring", "tree", "nvls") if kind == "all_reduce" else ("ring",)
    for name in names:
        for index, protocol in enumerate(PROTOCOLS):
            time = _predicted_s(name, index, kind, traffic, levels, generation)
            if time is not None:
                times[name, protocol] = time
    ways, table = list(times), np.stack(list(times.values()))
    best = table.argmin(axis=0)
    return TunedChoice(
        tuple(ways[way][0] for way in best), tuple(ways[way][1] for way in best), np.asarray(table.min(axis=0))
    )


def _predicted_s(
    name: str,
    protocol: int,
    kind: CollectiveKind,
    traffic: GroupTraffic,
    levels: tuple[FabricLevel, ...],
    generation: Generation,
) -> FloatArray | None:
    """Latency plus bytes over the algorithm's bandwidth; None for what NCCL does not offer."""
    if name == "nvls":
        offered = protocol == SIMPLE and generation in NVLS_EFFICIENCY
        return _nvls_s(traffic, levels, generation) if offered else None
    nodes = traffic.ranks / traffic.extents[0]
    row = (np.minimum(nodes, 3) - 1).astype(np.int64)
    bandwidth = _bus_bandwidth(traffic, levels, generation, name)
    channels = np.array(CHANNELS)[row]
    if name == "ring":
        return _ring_s(kind, protocol, traffic, generation, bandwidth, row, channels)
    return _tree_s(protocol, traffic, generation, bandwidth, row, channels)


def _bus_bandwidth(
    traffic: GroupTraffic, levels: tuple[FabricLevel, ...], generation: Generation, name: str
) -> FloatArray:
    """Bytes/s of all channels: links of a device inside a node; at most the node's NICs between several.

    A tree over two nodes is predicted with the rate inside them, as NCCL does.
    """
    inside = levels[0].bandwidth * LINK_FRACTION[generation]
    outside = [
        level.bandwidth for level, extent in zip(levels[1:], traffic.extents[1:], strict=True) if extent.max() > 1
    ]
    nodes = traffic.ranks / traffic.extents[0]
    if not outside:
        return np.broadcast_to(np.float64(inside), nodes.shape)
    network = min(outside) * NET_FRACTION * traffic.extents[0]
    crosses = nodes > (2 if name == "tree" else 1)
    return np.where(crosses, np.minimum(inside, network), inside)


def _ring_s(
    kind: CollectiveKind,
    protocol: int,
    traffic: GroupTraffic,
    generation: Generation,
    bandwidth: FloatArray,
    row: IntArray,
    channels: FloatArray,
) -> FloatArray:
    ranks, nodes = traffic.ranks, traffic.ranks / traffic.extents[0]
    passes = 2.0 if kind == "all_reduce" else 1.0
    steps, between = passes * (ranks - 1.0), passes * (nodes - 1.0)
    rates = (
        np.minimum(bandwidth * 0.5, np.array(LL_MOST_GB_S[generation])[row] * 1e9),
        np.minimum(bandwidth * 0.92, channels * RING_LL128_MOST_GB_S[generation] * 1e9),
        bandwidth,
    )
    inside = HARDWARE_LATENCY_US["nvlink"]["ring"][protocol]
    inside_us = np.where(nodes > 1, np.maximum(inside, NET_OVERHEAD_US[protocol]), inside)
    step_us = (steps - between) * inside_us + between * HARDWARE_LATENCY_US["net"]["ring"][protocol]
    latency = (BASE_LATENCY_US["ring"][protocol] + step_us) * 1e-6
    if kind == "all_reduce" and protocol == SIMPLE:
        plateau = (nodes > 1) & (traffic.num_bytes / (channels * ranks) >= PLATEAU_BYTES)
        latency = latency * np.where(plateau, RING_PLATEAU[generation], 1.0)
    return np.asarray(latency + traffic.num_bytes * steps / (rates[protocol] * ranks))


def _tree_s(
    protocol: int,
    traffic: GroupTraffic,
    generation: Generation,
    bandwidth: FloatArray,
    row: IntArray,
    channels: FloatArray,
) -> FloatArray:
    nodes = traffic.ranks / traffic.extents[0]
    plain = np.minimum(bandwidth * 0.92, channels * np.array(TREE_MOST_GB_S[generation])[row] * 1e9)
    rates = (
        np.minimum(plain / 3.8, np.array(LL_MOST_GB_S[generation])[row] * 1e9),
        np.minimum(
            plain * np.where(nodes > 1, 120.0 / 128.0, 7.0 / 9.0),
            channels * np.array(TREE_LL128_MOST_GB_S[generation])[row] * 1e9,
        ),
        plain,
    )
    inside_us = (traffic.extents[0] - 1.0) * HARDWARE_LATENCY_US["nvlink"]["tree"][protocol]
    between_us = np.floor(np.log2(nodes)) * HARDWARE_LATENCY_US["net"]["tree"][protocol]
    latency = (BASE_LATENCY_US["tree"][protocol] + 2.0 * (inside_us + between_us)) * 1e-6
    size = np.floor(np.log2(np.maximum(traffic.num_bytes, 64.0) / 64.0)).astype(np.int64)
    correction = np.where(
        size < TREE_CORRECTION.shape[1], TREE_CORRECTION[protocol][np.minimum(size, TREE_CORRECTION.shape[1] - 1)], 1.0
    )
    return np.asarray(latency + traffic.num_bytes / (rates[protocol] * 0.5 * correction))


def _nvls_s(traffic: GroupTraffic, levels: tuple[FabricLevel, ...], generation: Generation) -> FloatArray:
    """NVLS in a node, NVLSTree over several; not for two devices or fewer."""
    nodes = traffic.ranks / traffic.extents[0]
    inside = levels[0].bandwidth * LINK_FRACTION[generation]
    outside = [
        level.bandwidth for level, extent in zip(levels[1:], traffic.extents[1:], strict=True) if extent.max() > 1
    ]
    network = (min(outside) if outside else np.inf) * NET_FRACTION * traffic.extents[0]
    shared = np.where(nodes > 2, network / 2.0, network)
    bandwidth = np.where(nodes > 1, np.minimum(inside, shared), inside) * NVLS_EFFICIENCY[generation] * NVLS_RATIO
    between_us = 2.0 * np.floor(np.log2(nodes)) * HARDWARE_LATENCY_US["net"]["nvls"][SIMPLE]
    latency = (HARDWARE_LATENCY_US["nvlink"]["nvls"][SIMPLE] + between_us) * 1e-6
    return np.where(traffic.extents[0] > 2, latency + traffic.num_bytes / bandwidth, np.inf)
