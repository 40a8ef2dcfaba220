"""What a collective asks of each level of links, whatever library runs it: rounds, peers, bytes on the busiest device.

The ideal time follows from a fabric's nominal figures alone (``ideal_time_s``); what a library makes of a demand is
priced elsewhere, once for all algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import RoutedCopies

LevelsCombine = Literal["overlapped", "serial", "slowest"]
"""How the levels' wire times make one: chunks pipelined over the levels (maximum), phases one after another (sum), or
one message over one of the levels (the slowest of latency + wire)."""


@dataclass(frozen=True)
class FabricLevel:
    """One level of links, SI.

    ``bandwidth`` nominal bytes/s per device and direction; for a torus dimension that of one link, one direction.
    ``all_to_all_wraps`` is false where rings close and the library does not use that for an all-to-all.
    """

    name: str
    size: int
    bandwidth: float
    is_ring: bool
    wraps: bool
    all_to_all_wraps: bool
    hop_latency_s: float


@dataclass(frozen=True)
class Fabric:
    """Levels of a fabric, innermost first; ``devices_per_chip`` of a torus share their chip's links."""

    levels: tuple[FabricLevel, ...]
    devices_per_chip: int

    @property
    def sizes(self) -> Sequence[int]:
        """Members of each level."""
        return [level.size for level in self.levels]


@dataclass(frozen=True)
class GroupTraffic:
    """Collectives of equal groups that all run at once, one per case.

    ``num_bytes`` (n_cases,) as in ``structure.step_graph.Collective`` (broadcast: the message); ``extents``
    (n_levels, n_cases) as ``structure.placement.group_extents`` gives them. ``contention`` is how much longer the bytes
    take on the real wires than on links of each device's own, where that is known.
    """

    num_bytes: FloatArray
    extents: FloatArray
    copies: RoutedCopies | None = None
    contention: FloatArray | float = 1.0

    @cached_property
    def ranks(self) -> FloatArray:
        """Members of each group, (n_cases,)."""
        return np.asarray(np.prod(self.extents, axis=0))

    @cached_property
    def inside(self) -> FloatArray:
        """Members of a group within one domain of the level below, (n_levels, n_cases): 1 at the innermost."""
        reached = np.cumprod(self.extents, axis=0)
        return np.concatenate([np.ones_like(reached[:1]), reached[:-1]])


@dataclass(frozen=True)
class LevelDemand:
    """What a collective asks of one level of links; arrays (n_cases,).

    Attributes
    ----------
    rounds : ndarray
        Steps that follow one another and cross this level: each costs one latency.
    peers : ndarray
        Partners of a rank on this level in a direct exchange, each of which costs the sender something; else 0.
    wire_bytes : ndarray
        Bytes the busiest device sends over its share of the level, one direction; on a torus axis, its busiest link.
    """

    rounds: FloatArray
    peers: FloatArray
    wire_bytes: FloatArray


@dataclass(frozen=True)
class CollectiveDemand:
    """Demands on all levels, innermost first.

    Attributes
    ----------
    levels : tuple of LevelDemand
        In the order of the fabric's levels.
    own_bytes : ndarray of shape (n_cases,)
        Bytes a rank moves from its own send buffer to its own receive buffer.
    algorithm : str
        Name of the algorithm.
    levels_combine : str
        How the levels' wire times make one.
    """

    levels: tuple[LevelDemand, ...]
    own_bytes: FloatArray
    algorithm: str
    levels_combine: LevelsCombine = "overlapped"


def wire_time_s(demand: CollectiveDemand, bandwidths: Sequence[float]) -> FloatArray:
    """Time of the bytes alone at a bandwidth per level (bytes/s), (n_cases,).

    Examples
    --------
    900 MB at 450 GB/s beside 50 MB at 50 GB/s take 2 ms when pipelined:

    >>> one = np.ones(1)
    >>> levels = (LevelDemand(one, 0 * one, 900e6 * one), LevelDemand(one, 0 * one, 50e6 * one))
    >>> float(wire_time_s(CollectiveDemand(levels, 0 * one, "ring"), [450e9, 50e9])[0])
    0.002
    """
    times = np.stack([level.wire_bytes / rate for level, rate in zip(demand.levels, bandwidths, strict=True)])
    return np.asarray(times.sum(axis=0) if demand.levels_combine == "serial" else times.max(axis=0))


def ideal_time_s(demand: CollectiveDemand, fabric: Fabric) -> FloatArray:
    """Time on an idle network at nominal bandwidth: one hop latency per round, and the wire, (n_cases,)."""
    latencies = np.stack(
        [level.rounds * links.hop_latency_s for level, links in zip(demand.levels, fabric.levels, strict=True)]
    )
    if demand.levels_combine == "slowest":
        wires = [level.wire_bytes / links.bandwidth for level, links in zip(demand.levels, fabric.levels, strict=True)]
        return np.asarray((latencies + np.stack(wires)).max(axis=0))
    return np.asarray(latencies.sum(axis=0) + wire_time_s(demand, [links.bandwidth for links in fabric.levels]))
