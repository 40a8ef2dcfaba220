"""Seconds of collectives: a cluster's levels of links joined with what the stack's library makes of them.

Demands are the algorithms' (``collective_algorithms``), the library's part is ``communication_libraries``'.
"""

from __future__ import annotations

import numpy as np

from moesim.cost.collective_demands import GroupTraffic
from moesim.cost.communication_libraries import CollectiveTime, FabricRates, LevelRates, Protocol, library_times
from moesim.cost.measured_levels import LevelMeasurement, with_measurements
from moesim.describe.hardware import (
    Cluster,
    CollectiveTier,
    Device,
    LinkLevel,
    ProtocolConstants,
    Stack,
    TorusFabric,
)
from moesim.describe.quantities import Figure
from moesim.structure.placement import group_extents
from moesim.structure.step_graph import Collective


def fabric_rates(cluster: Cluster, device: Device, stack: Stack) -> FabricRates:
    """Join a cluster's links with what the stack makes of them.

    Raises
    ------
    KeyError
        If the stack has no constants for a tier; legality checks report it before.
    ScenarioError
        If a measurement of a level cannot be: see ``measured_levels``.
    """
    fabric = cluster.fabric
    if isinstance(fabric, TorusFabric):
        return FabricRates(_torus_levels(fabric, device, stack), device.devices_per_chip)
    levels = tuple(_switched_level(level, stack.collectives[level.tier]) for level in fabric.levels)
    inner = stack.collectives[fabric.levels[0].tier]
    own_copy = _value(inner.own_copy)
    rates = FabricRates(
        levels,
        1,
        own_copy=own_copy,
        exchange_own_copy=own_copy if inner.all_to_all_own_copy is None else inner.all_to_all_own_copy.value,
        exchange_algorithm="rail_aligned" if stack.sends_one_copy_per_node else "direct",
        levels_exponent=inner.levels_exponent.value if inner.levels_exponent else np.inf,
    )
    return with_measurements(rates, [_measurement(level) for level in fabric.levels])


def required_tiers(cluster: Cluster) -> set[str]:
    """Tiers of links a stack must have constants for."""
    if isinstance(cluster.fabric, TorusFabric):
        return {"torus"}
    return {level.tier for level in cluster.fabric.levels}


def _measurement(level: LinkLevel) -> LevelMeasurement:
    return LevelMeasurement(
        domains=level.measured_domains or level.size,
        latency_s=level.measured_latency.value if level.measured_latency else None,
        bus_bandwidth=level.measured_bus_bandwidth.value if level.measured_bus_bandwidth else None,
    )


def _value(figure: Figure | None) -> float:
    return figure.value if figure else 0.0


def _torus_levels(fabric: TorusFabric, device: Device, stack: Stack) -> tuple[LevelRates, ...]:
    tier = stack.collectives["torus"]
    bandwidth, hop_s = fabric.link_bandwidth.value, fabric.hop_latency.value
    levels = []
    if device.devices_per_chip > 1:
        on_chip = fabric.on_chip_bandwidth.value if fabric.on_chip_bandwidth else 4 * bandwidth
        levels.append(_torus_level("chip", device.devices_per_chip, on_chip, 0.0, tier, is_ring=False))
    for axis, (size, wraps) in enumerate(zip(fabric.dimensions, fabric.wraparound, strict=True)):
        levels.append(_torus_level(f"torus_{'xyz'[axis]}", size, bandwidth, hop_s, tier, wraps=wraps))
    return tuple(levels)


def _torus_level(
    name: str,
    size: int,
    bandwidth: float,
    hop_s: float,
    tier: CollectiveTier,
    *,
    is_ring: bool = True,
    wraps: bool = False,
) -> LevelRates:
    """An axis of a torus, or the devices of a chip: linear, an all-to-all's messages take their hops."""
    round_s = max(tier.round_latency.value, hop_s)
    base_s, peer_s = _value(tier.base_latency), tier.peer_latency.value
    exchange_s = base_s + _value(tier.all_to_all_base_latency)
    return LevelRates(
        name=name,
        size=size,
        bandwidth=bandwidth,
        is_ring=is_ring,
        wraps=wraps,
        all_to_all_wraps=wraps and tier.all_to_all_uses_wraparound,
        hop_latency_s=hop_s,
        reduction=Protocol(base_s, round_s, 0.0, 0.0, tier.reduce_fraction.value, 0.0),
        exchange=Protocol(exchange_s, hop_s, peer_s, 0.0, tier.all_to_all_fraction.value, 0.0),
        message=Protocol(0.0, round_s, 0.0, 0.0, tier.point_to_point_fraction.value, 0.0),
    )


def _switched_level(level: LinkLevel, tier: CollectiveTier) -> LevelRates:
    base_s, hop_s = _value(tier.base_latency), level.latency.value
    exchange_s = tier.all_to_all_base_latency.value if tier.all_to_all_base_latency else base_s
    message_s = max(
        tier.point_to_point_latency.value if tier.point_to_point_latency else tier.round_latency.value, hop_s
    )
    exchange_c = _value(tier.all_to_all_pipelining)
    return LevelRates(
        name=level.name,
        size=level.size,
        bandwidth=level.bandwidth_per_device.value,
        is_ring=False,
        wraps=False,
        all_to_all_wraps=False,
        hop_latency_s=hop_s,
        reduction=Protocol(
            base_s,
            max(tier.round_latency.value, hop_s),
            0.0,
            0.0,
            tier.reduce_fraction.value,
            _value(tier.pipelining),
        ),
        exchange=Protocol(
            exchange_s,
            0.0,
            tier.peer_latency.value,
            _value(tier.all_to_all_doubling_latency),
            tier.all_to_all_fraction.value,
            exchange_c,
        ),
        message=Protocol(message_s, 0.0, 0.0, 0.0, tier.point_to_point_fraction.value, exchange_c),
        quick_reduction=_protocol(tier.quick, hop_s),
        quick_exchange=_protocol(tier.quick_all_to_all, hop_s),
        in_switch=_protocol(tier.in_switch, 0.0),
        switch_s=tier.switch_time.value if tier.switch_time else np.inf,
        in_switch_s=tier.in_switch_time.value if tier.in_switch_time else np.inf,
    )


def _protocol(constants: ProtocolConstants | None, hop_s: float) -> Protocol | None:
    """A second protocol; a round never takes less than the hop that the fabric states."""
    if constants is None:
        return None
    round_s = max(constants.round_latency.value, hop_s) if constants.round_latency else 0.0
    return Protocol(
        _value(constants.base_latency),
        round_s,
        _value(constants.peer_latency),
        0.0,
        constants.fraction.value,
        _value(constants.pipelining),
    )


REMEMBERED_CASES = 16
"""Tables of no more cases are looked up among those priced before."""
REMEMBERED_TIMES = 1024


def collective_time(work: Collective, fabric: FabricRates) -> CollectiveTime:
    """Time of a collective of equal groups that all run at once; zero for groups of one rank or no bytes."""
    if work.num_bytes.size > REMEMBERED_CASES or work.group.size.size > REMEMBERED_CASES:
        return _collective_time(work, fabric)
    arrays = (work.num_bytes, work.group.size, work.group.stride)
    key = (work.kind, work.copies, *((array.shape, array.tobytes()) for array in arrays))
    known = fabric.known_times
    if key not in known:
        if len(known) >= REMEMBERED_TIMES:
            known.clear()
        known[key] = _collective_time(work, fabric)
    return known[key]


def _collective_time(work: Collective, fabric: FabricRates) -> CollectiveTime:
    extents = group_extents(work.group, fabric.sizes)
    shape = np.broadcast_shapes(extents.shape[1:], work.num_bytes.shape)
    num_bytes = work.num_bytes
    if extents.shape[1:] != num_bytes.shape:
        extents = np.broadcast_to(extents, (extents.shape[0], *shape))
        num_bytes = np.broadcast_to(num_bytes, shape)
    contention = fabric.contention(work.kind, work.group) if fabric.contention is not None else 1.0
    traffic = GroupTraffic(num_bytes, extents, work.copies, contention)
    happens = (num_bytes > 0) & (work.group.size > 1)
    times = library_times(work.kind, traffic, fabric)
    return CollectiveTime(times.modelled_s * happens, times.ideal_s * happens)
