"""Seconds of collectives: an algorithm's ideal demand, and what the stack's library makes of it, in one place.

Ideal part: rounds and bytes on each level of links (``collective_algorithms``). What a library makes of it (base
latency, latency per round and peer, fraction of bandwidth) comes from the stack, per tier of links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import CollectiveDemand, Fabric, FabricLevel, GroupTraffic, LevelDemand
from moesim.describe.hardware import Cluster, CollectiveTier, Device, HierarchicalFabric, Stack, TorusFabric
from moesim.structure.columns import FloatArray
from moesim.structure.placement import group_extents
from moesim.structure.step_graph import Collective, CollectiveKind


@dataclass(frozen=True)
class LevelRates(FabricLevel):
    """One level of the fabric under one stack, SI."""

    base_latency_s: float
    all_to_all_base_latency_s: float
    round_latency_s: float
    peer_latency_s: float
    reduce_fraction: float
    all_to_all_fraction: float
    point_to_point_fraction: float


@dataclass(frozen=True)
class FabricRates(Fabric):
    """Levels of a fabric under one stack, innermost first."""

    levels: tuple[LevelRates, ...]
    devices_per_chip: int


DEFAULT_ALGORITHMS: dict[CollectiveKind, str] = {
    "all_to_all": "direct",
    "all_reduce": "hierarchical_ring",
    "all_gather": "hierarchical_ring",
    "reduce_scatter": "hierarchical_ring",
    "broadcast": "binomial_tree",
    "point_to_point": "send",
}
"""Algorithm of each kind of collective in an estimate."""


@dataclass(frozen=True)
class CollectiveTime:
    """Seconds, arrays (n_cases,): modelled time, and wire time at nominal bandwidth without latency."""

    modelled_s: FloatArray
    ideal_s: FloatArray


def fabric_rates(cluster: Cluster, device: Device, stack: Stack) -> FabricRates:
    """Join a cluster's links with what the stack makes of them.

    Raises
    ------
    KeyError
        If the stack has no constants for a tier; legality checks report it before.
    """
    fabric = cluster.fabric
    if isinstance(fabric, HierarchicalFabric):
        levels = tuple(
            _level(
                level.name,
                level.size,
                level.bandwidth_per_device.value,
                level.latency.value,
                stack.collectives[level.tier],
            )
            for level in fabric.levels
        )
        return FabricRates(levels, 1)
    return FabricRates(_torus_levels(fabric, device, stack), device.devices_per_chip)


def required_tiers(cluster: Cluster) -> set[str]:
    """Tiers of links a stack must have constants for."""
    if isinstance(cluster.fabric, TorusFabric):
        return {"torus"}
    return {level.tier for level in cluster.fabric.levels}


def _torus_levels(fabric: TorusFabric, device: Device, stack: Stack) -> tuple[LevelRates, ...]:
    tier = stack.collectives["torus"]
    bandwidth = fabric.link_bandwidth.value
    levels = []
    if device.devices_per_chip > 1:
        on_chip = fabric.on_chip_bandwidth.value if fabric.on_chip_bandwidth else 4 * bandwidth
        levels.append(_level("chip", device.devices_per_chip, on_chip, 0.0, tier))
    for axis, (size, wraps) in enumerate(zip(fabric.dimensions, fabric.wraparound, strict=True)):
        name = f"torus_{'xyz'[axis]}"
        levels.append(_level(name, size, bandwidth, fabric.hop_latency.value, tier, is_ring=True, wraps=wraps))
    return tuple(levels)


def _level(
    name: str,
    size: int,
    bandwidth: float,
    hop_latency_s: float,
    tier: CollectiveTier,
    *,
    is_ring: bool = False,
    wraps: bool = False,
) -> LevelRates:
    return LevelRates(
        name=name,
        size=size,
        bandwidth=bandwidth,
        is_ring=is_ring,
        wraps=wraps,
        all_to_all_wraps=wraps and tier.all_to_all_uses_wraparound,
        hop_latency_s=hop_latency_s,
        base_latency_s=tier.base_latency.value if tier.base_latency else 0.0,
        all_to_all_base_latency_s=tier.all_to_all_base_latency.value if tier.all_to_all_base_latency else 0.0,
        round_latency_s=max(tier.round_latency.value, hop_latency_s),
        peer_latency_s=tier.peer_latency.value,
        reduce_fraction=tier.reduce_fraction.value,
        all_to_all_fraction=tier.all_to_all_fraction.value,
        point_to_point_fraction=tier.point_to_point_fraction.value,
    )


def collective_time(work: Collective, fabric: FabricRates) -> CollectiveTime:
    """Time of a collective of equal groups that all run at once; zero for groups of one rank or no bytes."""
    extents = group_extents(work.group, fabric.sizes)
    shape = np.broadcast_shapes(extents.shape[1:], work.num_bytes.shape)
    extents = np.broadcast_to(extents, (extents.shape[0], *shape))
    num_bytes = np.broadcast_to(work.num_bytes, shape)
    algorithm = algorithms_of(work.kind)[DEFAULT_ALGORITHMS[work.kind]]
    demand = algorithm.demand(work.kind, GroupTraffic(num_bytes, extents, work.copies), fabric)
    times = _library_time(work.kind, demand, extents, fabric)
    happens = (num_bytes > 0) & (np.broadcast_to(work.group.size, shape) > 1)
    return CollectiveTime(times.modelled_s * happens, times.ideal_s * happens)


def _library_time(
    kind: CollectiveKind, demand: CollectiveDemand, extents: FloatArray, fabric: FabricRates
) -> CollectiveTime:
    """Latencies and fractions of the stack applied to an ideal demand, level by level."""
    ideal, wire, latency = (np.zeros(extents.shape[1:]) for _ in range(3))
    slowest = ideal
    for level, asks, extent in zip(fabric.levels, demand.levels, extents, strict=True):
        ideal_s = asks.wire_bytes / level.bandwidth
        wire_s = ideal_s / _fraction(kind, level)
        latency_s = _latency_s(kind, level, asks, extent)
        ideal = np.maximum(ideal, ideal_s)
        wire = np.maximum(wire, wire_s)
        latency = latency + latency_s
        slowest = np.maximum(slowest, latency_s + wire_s)
    return CollectiveTime(slowest if demand.levels_combine == "slowest" else latency + wire, ideal)


def _fraction(kind: CollectiveKind, level: LevelRates) -> float:
    """Fraction of the nominal bandwidth that large messages of a kind reach."""
    match kind:
        case "all_to_all":
            return level.all_to_all_fraction
        case "point_to_point":
            return level.point_to_point_fraction
        case "all_reduce" | "all_gather" | "reduce_scatter" | "broadcast":
            return level.reduce_fraction


def _latency_s(kind: CollectiveKind, level: LevelRates, asks: LevelDemand, extent: FloatArray) -> FloatArray:
    """Base latency of a level that is entered, latency per round, and per peer of an all-to-all."""
    match kind:
        case "all_to_all":
            base = level.base_latency_s + level.all_to_all_base_latency_s
            hops = asks.rounds * level.hop_latency_s if level.is_ring else 0.0
            return np.asarray((extent > 1) * base + hops + asks.peers * level.peer_latency_s)
        case "point_to_point":
            return asks.rounds * level.round_latency_s
        case "all_reduce" | "all_gather" | "reduce_scatter" | "broadcast":
            return (extent > 1) * level.base_latency_s + asks.rounds * level.round_latency_s
