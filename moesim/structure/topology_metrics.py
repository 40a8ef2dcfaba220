"""Figures of a topology: links by tier, degree, diameter, bisection bandwidth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np

from moesim.structure.columns import FloatArray
from moesim.structure.topology import TIERS, BoolArray, Topology, sums
from moesim.structure.topology_symmetry import DigitSymmetry, RankPattern

BRUTE_FORCE_DEVICES = 10
FLOW_UNITS = 2**30
"""Whole units into which the bandwidth of all devices is divided for the cut: rounding below one part in a million."""


@dataclass(frozen=True)
class TierSummary:
    """Directed links of one tier: how many, their bandwidth together, the slowest and the fastest (bytes/s)."""

    tier: str
    num_links: int
    total_bandwidth: float
    least_bandwidth: float
    largest_bandwidth: float


@dataclass(frozen=True)
class TopologySummary:
    """What ``moesim topology show`` prints.

    ``degree`` counts neighbours of a device (least, most); ``diameter`` hops between the devices farthest apart;
    ``bisection_bandwidth`` is bytes/s in one direction across the tightest of the cuts that halve the devices:
    all of them up to ten devices, else those along a digit of the device number (an axis, a level).
    """

    num_devices: int
    vertices: dict[str, int]
    tiers: tuple[TierSummary, ...]
    degree: tuple[int, int]
    diameter: int
    bisection_bandwidth: float
    is_halved: bool


def summarise(topology: Topology) -> TopologySummary:
    """Figures of a topology."""
    links = topology.links
    pairs = np.unique(np.stack((links.source, links.target)), axis=1)
    degree = np.bincount(pairs[0], minlength=len(topology.vertex_names))[: topology.num_devices]
    tiers = []
    for number, tier in enumerate(TIERS):
        rates = links.bandwidth[links.tier == number]
        if len(rates):
            tiers.append(TierSummary(tier, len(rates), float(rates.sum()), float(rates.min()), float(rates.max())))
    bandwidth, is_halved = bisection(topology)
    return TopologySummary(
        topology.num_devices,
        dict(Counter(topology.vertex_kinds)),
        tuple(tiers),
        (int(degree.min()), int(degree.max())),
        diameter(topology),
        bandwidth,
        is_halved,
    )


def diameter(topology: Topology) -> int:
    """Hops between the two devices that are farthest apart, from one device of each orbit."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import dijkstra

    links, size = topology.links, len(topology.vertex_names)
    quotient = topology.symmetry.quotient(topology.channels, RankPattern(topology.num_devices, topology.num_devices))
    sources = quotient.source if quotient else np.arange(topology.num_devices)
    adjacency = coo_array((np.ones(len(links)), (links.source, links.target)), shape=(size, size)).tocsr()
    hops = dijkstra(adjacency, unweighted=True, indices=sources)
    return int(hops[:, : topology.num_devices].max())


def bisection(topology: Topology) -> tuple[float, bool]:
    """Bandwidth of the tightest cut into halves (bytes/s, one direction), and whether the parts are of equal size."""
    if topology.num_devices < 2:
        return 0.0, False
    halves = list(_halves(topology))
    is_even = [2 * int(half.sum()) == topology.num_devices for half in halves]
    chosen = [half for half, even in zip(halves, is_even, strict=True) if even or not any(is_even)]
    return min(cut_bandwidth(topology, half) for half in chosen), any(is_even)


def _halves(topology: Topology) -> Iterator[BoolArray]:
    """Candidate halves of the devices, shape (n_devices,) each."""
    devices = np.arange(topology.num_devices)
    if topology.num_devices <= BRUTE_FORCE_DEVICES:
        for others in combinations(range(1, topology.num_devices), (topology.num_devices + 1) // 2 - 1):
            yield np.isin(devices, (0, *others))
        return
    radices = (
        [digit.radix for digit in topology.symmetry.digits] if isinstance(topology.symmetry, DigitSymmetry) else []
    )
    for position, radix in enumerate(radices):
        if radix > 1:
            yield devices // prod(radices[:position]) % radix < radix // 2
    if not radices:
        yield devices < topology.num_devices // 2


def cut_bandwidth(topology: Topology, is_left: BoolArray) -> float:
    """Bytes/s that can flow from the devices on the left to all others: the minimum cut between them.

    Parameters
    ----------
    topology : Topology
        The wires.
    is_left : ndarray of shape (n_devices,)
        Which devices send.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    links, size = topology.links, len(topology.vertex_names)
    leaves = sums(links.source, links.bandwidth, size)[: topology.num_devices]
    unit = float(leaves.sum()) / FLOW_UNITS
    devices = np.arange(topology.num_devices)
    start, end = np.full(topology.num_devices, size), np.full(topology.num_devices, size + 1)
    source = np.concatenate((links.source, start[is_left], devices[~is_left]))
    target = np.concatenate((links.target, devices[is_left], end[~is_left]))
    ports: FloatArray = np.full(topology.num_devices, float(leaves.sum()))
    rate = np.concatenate((links.bandwidth, ports)) / unit
    capacity = coo_array((np.rint(rate).astype(np.int32), (source, target)), shape=(size + 2, size + 2)).tocsr()
    return float(maximum_flow(capacity, size, size + 1).flow_value) * unit
