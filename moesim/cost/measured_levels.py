"""One latency and one bandwidth measured on a level of links fix what the library makes of that level.

All latencies of the level are multiplied by one factor, all its fractions of bandwidth by another, such that the
library's all-reduce takes what was measured. Worth more than any refinement of the formula where a network differs from
those that constants were fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.collective_demands import GroupTraffic
from moesim.cost.communication_libraries import FabricRates, LevelRates, Protocol, library_times
from moesim.errors import Problem, ScenarioError

SMALL_BYTES = 1024.0
LARGE_BYTES = 16 * 2.0**30
"""Sizes that a latency and a bandwidth are taken to be measured at."""
STEPS = 60
WIDEST = 1e3
"""The factors are sought between 1/1000 and 1000."""


@dataclass(frozen=True)
class LevelMeasurement:
    """All-reduce over ``domains`` of a level, everything inside them: seconds of a small one, bytes/s of a large."""

    domains: int
    latency_s: float | None
    bus_bandwidth: float | None


def with_measurements(fabric: FabricRates, measurements: Sequence[LevelMeasurement]) -> FabricRates:
    """The fabric with each measured level's latencies and fractions scaled to the measurement, innermost first.

    Raises
    ------
    ScenarioError
        If a measurement cannot be: shorter than the levels inside take alone, or above the nominal bandwidth.
    """
    for index, measured in enumerate(measurements):
        if measured.bus_bandwidth is not None:
            fabric = _with_bandwidth(fabric, index, measured)
        if measured.latency_s is not None:
            fabric = _with_latency(fabric, index, measured)
    return fabric


def _traffic(fabric: FabricRates, index: int, domains: int, num_bytes: float) -> GroupTraffic:
    extents = [float(level.size) if place < index else 1.0 for place, level in enumerate(fabric.levels)]
    extents[index] = float(domains)
    return GroupTraffic(np.array([num_bytes]), np.array(extents)[:, None])


def _with_latency(fabric: FabricRates, index: int, measured: LevelMeasurement) -> FabricRates:
    traffic = _traffic(fabric, index, measured.domains, SMALL_BYTES)
    assert measured.latency_s is not None

    def scaled(factor: float) -> FabricRates:
        return _replaced(fabric, index, latency=factor, fraction=1.0)

    factor = _factor(lambda value: _seconds(scaled(value), traffic), measured.latency_s, grows=True)
    if factor is None:
        text = f"measured_latency {measured.latency_s * 1e6:.4g} us is out of reach of the levels inside and the hops"
        raise _impossible(fabric, index, "measured_latency", text, "give the time of an all-reduce of 1 KiB or less")
    return scaled(factor)


def _with_bandwidth(fabric: FabricRates, index: int, measured: LevelMeasurement) -> FabricRates:
    traffic = _traffic(fabric, index, measured.domains, LARGE_BYTES)
    ranks = float(traffic.ranks[0])
    assert measured.bus_bandwidth is not None
    target_s = 2.0 * (ranks - 1.0) / ranks * LARGE_BYTES / measured.bus_bandwidth

    def scaled(factor: float) -> FabricRates:
        return _replaced(fabric, index, latency=1.0, fraction=factor)

    factor = _factor(lambda value: _seconds(scaled(value), traffic), target_s, grows=False)
    level = fabric.levels[index]
    if factor is None or factor * float(np.max(level.reduction.fraction)) > 1.0 + 1e-9:
        text = (
            f"measured_bus_bandwidth {measured.bus_bandwidth / 1e9:.4g} GB/s over {ranks:g} devices is more than the "
            f"links' {level.bandwidth / 1e9:.4g} GB/s per device or the levels inside allow"
        )
        raise _impossible(fabric, index, "measured_bus_bandwidth", text, "give bus bandwidth as nccl-tests prints it")
    return scaled(factor)


def _impossible(fabric: FabricRates, index: int, key: str, message: str, remedy: str) -> ScenarioError:
    field = f"cluster.fabric.levels.{index}.{key}"
    where = f"level {fabric.levels[index].name}: {message}"
    return ScenarioError([Problem(code="E-SCN-011", message=where, remedy=remedy, field=field)])


def _seconds(fabric: FabricRates, traffic: GroupTraffic) -> float:
    return float(library_times("all_reduce", traffic, fabric).modelled_s[0])


def _factor(seconds: Callable[[float], float], target_s: float, *, grows: bool) -> float | None:
    """Factor at which a monotone time meets the target, by bisection of its logarithm; None if it never does."""
    low, high = 1.0 / WIDEST, WIDEST
    least, most = (seconds(low), seconds(high)) if grows else (seconds(high), seconds(low))
    if not least <= target_s <= most:
        return None
    for _ in range(STEPS):
        middle = float(np.sqrt(low * high))
        if (seconds(middle) < target_s) == grows:
            low = middle
        else:
            high = middle
    return float(np.sqrt(low * high))


def _replaced(fabric: FabricRates, index: int, *, latency: float, fraction: float) -> FabricRates:
    levels = list(fabric.levels)
    levels[index] = _scaled_level(levels[index], latency, fraction)
    return replace(fabric, levels=tuple(levels))


def _scaled_level(level: LevelRates, latency: float, fraction: float) -> LevelRates:
    def scaled(protocol: Protocol) -> Protocol:
        return Protocol(
            protocol.base_s * latency,
            protocol.round_s * latency,
            protocol.peer_s * latency,
            protocol.doubling_s * latency,
            np.minimum(protocol.fraction * fraction, 1.0),
            protocol.pipelining,
        )

    return replace(
        level,
        reduction=scaled(level.reduction),
        exchange=scaled(level.exchange),
        message=scaled(level.message),
        quick_reduction=scaled(level.quick_reduction) if level.quick_reduction else None,
        quick_exchange=scaled(level.quick_exchange) if level.quick_exchange else None,
        in_switch=scaled(level.in_switch) if level.in_switch else None,
    )
