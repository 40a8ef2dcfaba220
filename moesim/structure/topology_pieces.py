"""Parts of clusters and topologies: the first devices of a cluster, and a piece of a large network to look at."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from moesim.describe.hardware import Cluster, Device, HierarchicalFabric, LinkLevel, LinkMatrix, TorusFabric
from moesim.errors import Problem, ScenarioError
from moesim.structure.columns import IntArray
from moesim.structure.topology import Topology
from moesim.structure.topology_symmetry import DigitSymmetry

MOST_VERTICES = 200
SWITCHES_SHOWN = 4
"""Of the switches above a vertex, how many a piece shows where there are more."""


def first_devices(cluster: Cluster, device: Device, count: int) -> Cluster:
    """Cluster of the first devices of another, wired as if it were a machine of its own.

    Parameters
    ----------
    cluster : Cluster
        The whole.
    device : Device
        Its device.
    count : int
        Devices to keep: whole members of every level but the last one used; whole rows of a torus.

    Raises
    ------
    ScenarioError
        E-NET-003 if there are not so many, or they are no such part.
    """
    if count == cluster.device_count:
        return cluster
    if not 1 <= count < cluster.device_count:
        raise _no_part(cluster, count, f"it has {cluster.device_count}")
    fabric = cluster.fabric
    part: HierarchicalFabric | TorusFabric
    if isinstance(fabric, HierarchicalFabric):
        sizes = _filled([level.size for level in fabric.levels], count)
        if sizes is None:
            raise _no_part(cluster, count, "take whole nodes, or less than one")
        kept = [_smaller(level, size) for level, size in zip(fabric.levels, sizes, strict=False)]
        part = fabric.model_copy(update={"levels": kept})
    else:
        per_pod = prod(fabric.dimensions) * device.devices_per_chip
        if fabric.pods and count >= per_pod and count % per_pod == 0:
            pods = fabric.pods.model_copy(update={"count": count // per_pod})
            return cluster.model_copy(
                update={"fabric": fabric.model_copy(update={"pods": pods}), "device_count": count}
            )
        chips = _filled(fabric.dimensions, count // device.devices_per_chip)
        if chips is None or count % device.devices_per_chip:
            raise _no_part(cluster, count, f"take whole chips and whole rows of {fabric.dimensions} chips")
        closes = [wraps and chips[axis : axis + 1] == [size] for axis, (wraps, size) in _axes(fabric)]
        sides = [*chips, *[1] * (len(fabric.dimensions) - len(chips))]
        part = fabric.model_copy(update={"dimensions": sides, "wraparound": closes, "pods": None})
    # Copies skip validation; what is changed are counts that are already known to be legal.
    return cluster.model_copy(update={"fabric": part, "device_count": count})


def _axes(fabric: TorusFabric) -> list[tuple[int, tuple[bool, int]]]:
    return list(enumerate(zip(fabric.wraparound, fabric.dimensions, strict=True)))


def _filled(sizes: list[int], count: int) -> list[int] | None:
    """Sizes that hold so many, innermost filled first; None where they do not come out even.

    Examples
    --------
    >>> _filled([8, 32, 4], 64), _filled([8, 32], 12)
    ([8, 8], None)
    """
    filled = []
    for size in sizes:
        filled.append(min(size, count))
        if count % filled[-1]:
            return None
        count //= filled[-1]
        if count == 1:
            break
    return filled


def _smaller(level: LinkLevel, size: int) -> LinkLevel:
    changes: dict[str, object] = {"size": size}
    if isinstance(level.wiring, LinkMatrix):
        rows = [row[:size] for row in level.wiring.links[:size]]
        changes["wiring"] = level.wiring.model_copy(update={"links": rows})
    return level.model_copy(update=changes)


def _no_part(cluster: Cluster, count: int, remedy: str) -> ScenarioError:
    message = f"{count} devices are no part of cluster {cluster.id} that can be cut out"
    return ScenarioError([Problem(code="E-NET-003", message=message, remedy=remedy, field="devices")])


@dataclass(frozen=True)
class Piece:
    """Vertices (n_chosen,) of a topology to draw, and whether they are all."""

    vertices: IntArray
    is_whole: bool


def representative_piece(topology: Topology, most: int = MOST_VERTICES) -> Piece:
    """Piece of at most about ``most`` vertices: a corner of a torus, some nodes and what stands above them."""
    everything = np.arange(len(topology.vertex_names))
    if len(everything) <= most:
        return Piece(everything, is_whole=True)
    symmetry = topology.symmetry
    digits_of_device = symmetry.digits if isinstance(symmetry, DigitSymmetry) else ()
    radices = [digit.radix for digit in digits_of_device]
    is_torus = any(digit.kind in ("shift", "reflection") for digit in digits_of_device)
    devices = np.arange(topology.num_devices)
    for share in (2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096):
        if is_torus:
            side = max(2, round((topology.num_devices / radices[0] / share) ** (1.0 / (len(radices) - 1))))
            digits = [devices // prod(radices[:axis]) % radix for axis, radix in enumerate(radices)]
            chosen = np.all([digit < side for digit in digits[1:]], axis=0)
        else:
            chosen = devices < max(1, topology.num_devices // share)
        vertices = _with_switches(topology, np.flatnonzero(chosen), stages=1 if is_torus else 9)
        if len(vertices) <= most:
            return Piece(vertices, is_whole=False)
    return Piece(everything[:most], is_whole=False)


def _with_switches(topology: Topology, devices: IntArray, *, stages: int) -> IntArray:
    """Devices, and stage by stage the switches they lead to, the first of each vertex where there are many."""
    links, is_device = topology.links, np.arange(len(topology.vertex_names)) < topology.num_devices
    chosen = np.zeros(len(topology.vertex_names), np.bool_)
    chosen[devices] = True
    frontier = devices
    for _ in range(stages):
        reached: list[int] = []
        for vertex in frontier.tolist():
            ends = links.target[links.source == vertex]
            above = np.unique(ends[~is_device[ends] & (ends > vertex)])
            reached += above[:SWITCHES_SHOWN].tolist()
        fresh = np.unique(np.array(reached, dtype=np.int64))
        frontier = fresh[~chosen[fresh]]
        chosen[frontier] = True
    return np.flatnonzero(chosen)
