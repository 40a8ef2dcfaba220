"""Closed forms of collectives on hierarchical and torus fabrics.

Ideal part: latency per round and bytes over the nominal bandwidth of each level. What a library makes of it (base
latency, latency per round and peer, fraction of bandwidth) comes from the stack, per tier of links, in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.describe.hardware import Cluster, CollectiveTier, Device, HierarchicalFabric, Stack, TorusFabric
from moesim.structure.columns import FloatArray
from moesim.structure.placement import group_extents
from moesim.structure.step_graph import Collective, CollectiveKind, RoutedCopies


@dataclass(frozen=True)
class LevelRates:
    """One level of the fabric under one stack, SI.

    ``bandwidth`` nominal bytes/s per device and direction; for a torus dimension that of one link, both directions
    used.
    """

    name: str
    size: int
    bandwidth: float
    is_ring: bool
    wraps: bool
    all_to_all_wraps: bool
    hop_latency_s: float
    base_latency_s: float
    all_to_all_base_latency_s: float
    round_latency_s: float
    peer_latency_s: float
    reduce_fraction: float
    all_to_all_fraction: float
    point_to_point_fraction: float


@dataclass(frozen=True)
class FabricRates:
    """Levels of a fabric, innermost first; ``devices_per_chip`` of a torus share their chip's links."""

    levels: tuple[LevelRates, ...]
    devices_per_chip: int

    @property
    def sizes(self) -> Sequence[int]:
        """Members of each level."""
        return [level.size for level in self.levels]


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
    if work.kind == "all_to_all":
        times = _all_to_all(num_bytes, extents, fabric, work.copies)
    elif work.kind == "point_to_point":
        times = _point_to_point(num_bytes, extents, fabric)
    else:
        times = _ring(work.kind, num_bytes, extents, fabric)
    happens = (num_bytes > 0) & (np.broadcast_to(work.group.size, shape) > 1)
    return CollectiveTime(times.modelled_s * happens, times.ideal_s * happens)


def _ring(kind: CollectiveKind, num_bytes: FloatArray, extents: FloatArray, fabric: FabricRates) -> CollectiveTime:
    """Hierarchical ring: each level works on the shard that the levels inside it left.

    Level l with extent e and shard n: all_gather, reduce_scatter (e - 1)/e * n in e - 1 rounds, all_reduce twice that.
    The levels' transfers are pipelined, so wire times combine by their maximum (NCCL's rings; XLA on a torus uses its
    axes at once); rounds add. A torus axis is a ring of two directions; without wraparound it has one each way.
    """
    passes = 2.0 if kind == "all_reduce" else 1.0
    shard: FloatArray = num_bytes
    wire, ideal, latency = num_bytes * 0.0, num_bytes * 0.0, num_bytes * 0.0
    for level, extent in zip(fabric.levels, extents, strict=True):
        volume = passes * (extent - 1.0) / extent * shard * (fabric.devices_per_chip if level.is_ring else 1.0)
        directions = np.where(_closes(level.wraps, level, extent), 2.0, 1.0) if level.is_ring else 1.0
        ideal_s = volume / (level.bandwidth * directions)
        ideal = np.maximum(ideal, ideal_s)
        wire = np.maximum(wire, ideal_s / level.reduce_fraction)
        rounds = passes * (extent - 1.0)
        latency = latency + (extent > 1) * level.base_latency_s + rounds * level.round_latency_s
        shard = shard / extent
    return CollectiveTime(latency + wire, ideal)


def _closes(wraps: bool, level: LevelRates, extent: FloatArray) -> FloatArray:
    """Whether a group on a torus axis closes its ring: it fills the axis, and the axis wraps."""
    return np.asarray(wraps & (extent >= level.size))


def _all_to_all(
    num_bytes: FloatArray, extents: FloatArray, fabric: FabricRates, copies: RoutedCopies | None
) -> CollectiveTime:
    """Direct all-to-all: bytes/n to each of n peers.

    Switched level: peers beyond the level inside it cross it, (n_l - n_(l-1))/n of the buffer over the device's share
    of the level; the levels' links are different, so wire times combine by maximum. Torus axis of N chips: half of the
    bytes cross the middle; its busiest link carries N/8 of a chip's buffer with wraparound and N/4 without
    (per direction), the whole of a chip's devices together. A library that sends one copy per node cuts the volume: see
    ``_copy_fraction``.
    """
    ranks = np.prod(extents, axis=0)
    wire, ideal, latency = num_bytes * 0.0, num_bytes * 0.0, num_bytes * 0.0
    inside = np.ones_like(num_bytes)
    for level, extent in zip(fabric.levels, extents, strict=True):
        reached = inside * extent
        if level.is_ring:
            closes = _closes(level.all_to_all_wraps, level, extent)
            volume = num_bytes * fabric.devices_per_chip * np.where(closes, extent / 8.0, _mesh_load(extent))
            hops = np.where(closes, np.floor(extent / 2.0), extent - 1.0) * level.hop_latency_s
        else:
            volume = num_bytes * (reached - inside) / ranks * _copy_fraction(copies, ranks / inside, inside)
            hops = num_bytes * 0.0
        ideal_s = volume / level.bandwidth
        ideal = np.maximum(ideal, ideal_s)
        wire = np.maximum(wire, ideal_s / level.all_to_all_fraction)
        base = level.base_latency_s + level.all_to_all_base_latency_s
        latency = latency + (extent > 1) * base + hops + (reached - inside) * level.peer_latency_s
        inside = reached
    return CollectiveTime(latency + wire, ideal)


def _copy_fraction(copies: RoutedCopies | None, domains: FloatArray, inside: FloatArray) -> FloatArray | float:
    """Share of a token's choices that are sent when each domain of a level gets one copy.

    K choices over m domains, of which at most M are visited, reach D(m) = m (1 - (1 - 1/m)^K) of them on average; D(k)
    with the local node reproduces UCCL's printed RDMA bytes within 1 %. M limits nodes, not the devices ``inside`` one.
    """
    if copies is None:
        return 1.0
    limit = np.where(inside > 1, copies.max_nodes, np.inf)
    visited = np.minimum(domains, limit)
    distinct = visited * (1.0 - (1.0 - 1.0 / visited) ** copies.choices)
    return np.asarray(np.minimum(distinct / copies.choices, 1.0))


def _mesh_load(extent: FloatArray) -> FloatArray:
    """Load of the middle link of a line of N chips per unit of a chip's buffer: floor(N/2) ceil(N/2) / N."""
    return np.floor(extent / 2.0) * np.ceil(extent / 2.0) / extent


def _point_to_point(num_bytes: FloatArray, extents: FloatArray, fabric: FabricRates) -> CollectiveTime:
    """One message between neighbours of a group: the slowest level the group crosses (some pair crosses it)."""
    modelled, ideal = num_bytes * 0.0, num_bytes * 0.0
    for level, extent in zip(fabric.levels, extents, strict=True):
        crosses = extent > 1
        wire = num_bytes / level.bandwidth
        ideal = np.maximum(ideal, crosses * wire)
        modelled = np.maximum(modelled, crosses * (level.round_latency_s + wire / level.point_to_point_fraction))
    return CollectiveTime(modelled, ideal)
