"""Which algorithm serves a collective when none is named: NCCL's tuner on NVLink, the fastest plan on a torus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_algorithms.algorithm import AbstractAlgorithm, LinkStyle
from moesim.cost.collective_demands import Fabric, FabricLevel, GroupTraffic, ideal_time_s
from moesim.cost.nccl_tuner import Generation, nccl_choice
from moesim.describe.hardware import Cluster, Device, HierarchicalFabric
from moesim.structure.step_graph import CollectiveKind

NCCL_OFFERS = {
    "all_to_all": ("direct",),
    "all_reduce": ("ring", "tree"),
    "all_gather": ("ring",),
    "reduce_scatter": ("ring",),
    "broadcast": ("ring",),
    "point_to_point": ("send",),
}
"""Algorithms of NCCL and RCCL by kind, in-switch reduction apart."""


@dataclass(frozen=True)
class Choice:
    """Name of an algorithm, and the protocol where a library has several (else empty)."""

    algorithm: str
    protocol: str = ""


def ideal_fabric(cluster: Cluster, device: Device) -> Fabric:
    """Levels of a cluster's links at their nominal figures, as no library in particular sees them.

    Parameters
    ----------
    cluster : Cluster
        Profile with the fabric.
    device : Device
        Its device: devices per chip on a torus.

    Returns
    -------
    Fabric
        Innermost level first.
    """
    fabric = cluster.fabric
    if isinstance(fabric, HierarchicalFabric):
        levels = [
            FabricLevel(
                level.name, level.size, level.bandwidth_per_device.value, False, False, False, level.latency.value
            )
            for level in fabric.levels
        ]
        return Fabric(tuple(levels), 1)
    bandwidth = fabric.link_bandwidth.value
    axes = [
        FabricLevel(f"torus_{'xyz'[axis]}", size, bandwidth, True, wraps, wraps, fabric.hop_latency.value)
        for axis, (size, wraps) in enumerate(zip(fabric.dimensions, fabric.wraparound, strict=True))
    ]
    on_chip = fabric.on_chip_bandwidth.value if fabric.on_chip_bandwidth else 4 * bandwidth
    chip = FabricLevel("chip", device.devices_per_chip, on_chip, False, False, False, 0.0)
    return Fabric((chip, *axes) if device.devices_per_chip > 1 else tuple(axes), device.devices_per_chip)


def link_style(fabric: Fabric) -> LinkStyle:
    """Whether a fabric is a torus."""
    return "torus" if any(level.is_ring for level in fabric.levels) else "switched"


def runnable_algorithms(kind: CollectiveKind, fabric: Fabric) -> dict[str, AbstractAlgorithm]:
    """Algorithms of a kind that run on a fabric's links, by name.

    Examples
    --------
    >>> node = Fabric((FabricLevel("node", 8, 450e9, False, False, False, 1e-6),), 1)
    >>> list(runnable_algorithms("broadcast", node))
    ['ring', 'binomial_tree']
    """
    style = link_style(fabric)
    return {name: one for name, one in algorithms_of(kind).items() if style in one.links}


def choose_algorithms(
    kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric, *, cluster: Cluster, device: Device
) -> list[Choice]:
    """Algorithm of each case, as the library of the hardware's kind would take it.

    NVIDIA devices on NVLink: NCCL's tuner. Other switched fabrics: what NCCL and RCCL offer, by the least ideal time.
    A torus: the least ideal time of all that run there, as XLA compiles its collectives to the axes.

    Parameters
    ----------
    kind : str
        Kind of collective.
    traffic : GroupTraffic
        The cases, one or more.
    fabric : Fabric
        Nominal levels.
    cluster : Cluster
        Profile of the cluster.
    device : Device
        Its device.

    Returns
    -------
    list of Choice
        One per case; empty if nothing runs there.
    """
    candidates = runnable_algorithms(kind, fabric)
    generation = _nvlink_generation(cluster, device)
    if generation is not None and kind in ("all_reduce", "all_gather", "reduce_scatter"):
        tuned = nccl_choice(kind, traffic, fabric.levels, generation)
        return [Choice(*pair) for pair in zip(tuned.algorithm, tuned.protocol, strict=True)]
    if link_style(fabric) == "switched":
        candidates = {name: one for name, one in candidates.items() if name in NCCL_OFFERS[kind]}
    if not candidates:
        return []
    times = np.stack([ideal_time_s(one.demand(kind, traffic, fabric), fabric) for one in candidates.values()])
    names = list(candidates)
    return [Choice(names[best]) for best in times.argmin(axis=0)]


def _nvlink_generation(cluster: Cluster, device: Device) -> Generation | None:
    """Generation whose constants NCCL has, where devices of a node are joined by NVLink."""
    fabric = cluster.fabric
    if not isinstance(fabric, HierarchicalFabric) or not fabric.levels[0].medium.startswith("nv"):
        return None
    known: dict[str, Generation] = {name: name for name in get_args(Generation)}
    return known.get(device.generation)
