"""Topology of a cluster from its hardware profile.

What a profile does not say is taken from its medium and listed in ``Topology.assumptions``: a medium whose name ends in
``mesh`` joins all pairs of a node evenly, one that begins with ``pcie`` is a PCIe tree with two devices per switch,
any other scale-up medium a crossbar; a scale-out medium whose name ends in ``rail`` is rail-optimised, and leaves are
non-blocking with at most 32 NIC ports.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from moesim.describe.hardware import (
    Cluster,
    Crossbar,
    Device,
    HierarchicalFabric,
    LinkLevel,
    LinkMatrix,
    PcieTree,
    TorusFabric,
)
from moesim.errors import Problem, ScenarioError
from moesim.structure.columns import IntArray
from moesim.structure.topology import AbstractRouting, Routes, Topology, joined_routes
from moesim.structure.topology_assembly import Assembly
from moesim.structure.topology_graphs import GraphRouting, ShortestPaths
from moesim.structure.topology_networks import OuterNetwork, add_outer_network
from moesim.structure.topology_symmetry import Digit, DigitSymmetry
from moesim.structure.topology_tori import TorusRouting, TorusShape, add_torus, torus_digits, torus_family
from moesim.structure.topology_trees import (
    StageFigures,
    TreeRouting,
    add_stage,
    boundaries_form_a_chain,
    devices_as_groups,
)

DEVICES_PER_PCIE_SWITCH = 2


def build_topology(cluster: Cluster, device: Device) -> Topology:
    """Build the wires of a cluster.

    Parameters
    ----------
    cluster : Cluster
        Profile with the fabric.
    device : Device
        Its device: devices per chip on a torus, the host link where NICs are shared.

    Raises
    ------
    ScenarioError
        If the fabric's wiring contradicts its sizes, devices are cut off, or a link carries nothing.
    """
    if isinstance(cluster.fabric, TorusFabric):
        return _torus(cluster, cluster.fabric, device)
    return _hierarchy(cluster, cluster.fabric, device)


def _torus(cluster: Cluster, fabric: TorusFabric, device: Device) -> Topology:
    per_chip = device.devices_per_chip
    shape = TorusShape(tuple(fabric.dimensions), tuple(fabric.wraparound), per_chip)
    per_pod, pods = shape.num_chips * per_chip, fabric.pods.count if fabric.pods else 1
    _check_device_count(cluster, per_pod * pods)
    assembly = _with_devices(cluster)
    bandwidth = fabric.link_bandwidth.value
    on_chip = fabric.on_chip_bandwidth.value if fabric.on_chip_bandwidth else 4 * bandwidth
    if per_chip > 1 and not fabric.on_chip_bandwidth:
        assembly.assumptions.append("cores reach their chip's links at four times the rate of a link")
    link = (bandwidth, fabric.hop_latency.value)
    tori = [
        add_torus(
            assembly,
            shape,
            link=link,
            on_chip=(on_chip, 0.0),
            first_device=pod * per_pod,
            prefix=f"pod {pod} " if pods > 1 else "",
        )
        for pod in range(pods)
    ]
    routing: AbstractRouting = tori[0]
    if fabric.pods:
        rate, half = fabric.pods.bandwidth_per_device.value, fabric.pods.latency.value / 2
        ports = StageFigures("data-centre port", rate, half, "scale_out", above="data-centre switch")
        everyone = np.arange(cluster.device_count)
        stage, _ = add_stage(assembly, devices_as_groups(everyone), 0 * everyone, ports)
        routing = PodRouting(per_pod, tuple(tori), TreeRouting((stage,)))
    families = assembly.families
    opposite = {
        assembly.family(torus_family(axis, 1)): (axis + 1, assembly.family(torus_family(axis, 0)))
        for axis in range(len(shape.dimensions))
        if torus_family(axis, 1) in families
    }
    digits = [*torus_digits(shape), *([Digit(pods, "permutable")] if pods > 1 else [])]
    return _topology(cluster, assembly, routing, DigitSymmetry(tuple(digits), opposite))


@dataclass(frozen=True)
class PodRouting:
    """Within a pod of ``pod`` devices by its torus, between pods from each device straight to the data centre."""

    pod: int
    tori: tuple[TorusRouting, ...]
    outer: TreeRouting

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of flows; see ``AbstractRouting``."""
        home = source // self.pod
        stays = home == target // self.pod
        parts = [self.outer.routes(source, np.where(stays, source, target))]
        for number, torus in enumerate(self.tori):
            is_here = stays & (home == number)
            first = number * self.pod
            start, end = np.where(is_here, source - first, 0), np.where(is_here, target - first, 0)
            parts.append(torus.routes(start, end))
        return joined_routes(parts)


@dataclass(frozen=True)
class NodeRouting:
    """Within a scale-up domain by its own links, between domains by the outer network.

    ``domain`` devices each. Where ``forward_nics`` (NICs per node, devices per node) is given, a flow to another domain
    first goes to the device of its source's node that is on its target's rail.
    """

    domain: int
    inner: AbstractRouting
    outer: AbstractRouting | None
    rails: tuple[int, int] | None = None

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of flows; see ``AbstractRouting``."""
        if self.outer is None:
            return self.inner.routes(source, target)
        is_inside = source // self.domain == target // self.domain
        door = np.where(is_inside, target, self._door(source, target))
        return joined_routes([self.inner.routes(source, door), self.outer.routes(door, target)])

    def switch_ports(self) -> tuple[IntArray, IntArray] | None:
        """Channels from each device to the switch of its domain and back, (n_devices,); None where there is none."""
        if not isinstance(self.inner, TreeRouting) or not self.inner.stages:
            return None
        first = self.inner.stages[0]
        return first.up[first.group], first.down[first.group]

    def _door(self, source: IntArray, target: IntArray) -> IntArray:
        """Device through which a flow leaves its domain."""
        if self.rails is None:
            return source
        nics, node = self.rails
        sharing = node // nics
        rail = target % node // sharing
        return source // node * node + rail * sharing + source % sharing


def _hierarchy(cluster: Cluster, fabric: HierarchicalFabric, device: Device) -> Topology:
    first, *outer_levels = fabric.levels
    _check_device_count(cluster, prod(level.size for level in fabric.levels))
    assembly = _with_devices(cluster)
    inner, inner_boundaries = _scale_up(cluster, first, device, assembly)
    network = OuterNetwork(None, (), None)
    if outer_levels and cluster.device_count > first.size:
        network = add_outer_network(assembly, cluster, device, outer_levels)
    routing = NodeRouting(first.size, inner, network.routing, network.rails)
    is_mesh = inner_boundaries is None
    boundaries = sorted({1, *(inner_boundaries or ()), *network.boundaries, first.size, cluster.device_count})
    if is_mesh or not boundaries_form_a_chain(boundaries):
        is_mesh = True
        boundaries = [1, *(number for number in boundaries if number >= first.size)]
    digits = [Digit(after // before, "permutable") for before, after in itertools.pairwise(boundaries)]
    if is_mesh and digits:
        digits[0] = replace(digits[0], kind="fixed")
    return _topology(cluster, assembly, routing, DigitSymmetry(tuple(digits or [Digit(1, "permutable")])))


def _scale_up(
    cluster: Cluster, level: LinkLevel, device: Device, assembly: Assembly
) -> tuple[AbstractRouting, tuple[int, ...] | None]:
    """Links within every domain, with the digits they allow; None where places in a domain differ (a mesh)."""
    wiring = level.wiring
    if level.size == 1:
        return TreeRouting(()), ()
    if wiring is None:
        if level.medium.endswith("mesh"):
            assembly.assumptions.append(f"{level.name}: every pair is joined by an equal part of a device's bandwidth")
            pair = level.bandwidth_per_device.value / (level.size - 1)
            return _mesh(cluster, level, assembly, pair * (1.0 - np.eye(level.size))), None
        if level.medium.startswith("pcie"):
            wiring = PcieTree(shape="pcie_tree", devices_per_switch=DEVICES_PER_PCIE_SWITCH, source="assumed")
            assembly.assumptions.append(f"{level.name}: two devices per PCIe switch, all switches below one root")
        else:
            wiring = Crossbar(shape="crossbar", source="assumed")
            assembly.assumptions.append(f"{level.name}: {level.medium} joins all devices at full rate")
    match wiring:
        case LinkMatrix():
            return _mesh(cluster, level, assembly, _link_matrix(cluster, level, wiring)), None
        case Crossbar():
            return _crossbar(cluster, level, assembly, wiring.boards)
        case PcieTree():
            return _pcie_tree(cluster, level, device, assembly, wiring.devices_per_switch)
        case _:
            raise _wrong(
                cluster, f"{level.name}: a fat tree joins nodes, not the devices of one", "wire them otherwise"
            )


def _mesh(cluster: Cluster, level: LinkLevel, assembly: Assembly, rates: np.ndarray) -> GraphRouting:
    """Direct links with ``rates`` (size, size) in bytes/s in every domain."""
    source, target = np.nonzero(rates)
    domains = cluster.device_count // level.size
    first = level.size * np.arange(domains)[:, None]
    channel = np.zeros((domains, len(source)), np.int64)
    for end in np.unique(target):  # a family per end, so that family and anchor name a link
        edges = np.flatnonzero(target == end)
        channel[:, edges] = assembly.add_links(
            (first + source[edges]).ravel(),
            np.repeat(first + end, len(edges)),
            link=(np.tile(rates[source[edges], end], domains), level.latency.value),
            tier=level.tier,
            family=f"{level.name} link to place {end}",
            anchor=(first + source[edges]).ravel(),
        ).reshape(domains, -1)
    return GraphRouting(ShortestPaths(level.size, source, target), channel)


def _link_matrix(cluster: Cluster, level: LinkLevel, wiring: LinkMatrix) -> np.ndarray:
    """Bytes/s between the members of a domain."""
    if {len(row) for row in wiring.links} != {level.size} or len(wiring.links) != level.size:
        raise _wrong(cluster, f"{level.name}: links is not {level.size} by {level.size}", "give a row per device")
    matrix = np.array(wiring.links, dtype=np.float64)
    if (matrix != matrix.T).any() or np.diag(matrix).any():
        message = f"{level.name}: links must be the same both ways, and none from a device to itself"
        raise _wrong(cluster, message, "make the matrix symmetric with a zero diagonal")
    return matrix * wiring.link_bandwidth.value


def _crossbar(
    cluster: Cluster, level: LinkLevel, assembly: Assembly, boards: int
) -> tuple[TreeRouting, tuple[int, ...]]:
    per_board = level.size // boards
    if per_board * boards != level.size:
        raise _wrong(cluster, f"{level.name}: {level.size} devices on {boards} boards", "choose a divisor")
    devices = np.arange(cluster.device_count)
    rate, half = level.bandwidth_per_device.value, level.latency.value / 2
    device_links = StageFigures(f"{level.name} port", rate, half, level.tier, above=f"{level.name} switch")
    first, below = add_stage(assembly, devices_as_groups(devices), devices // per_board, device_links)
    if boards == 1:
        return TreeRouting((first,)), (level.size,)
    trunk = StageFigures("board", rate * per_board, 0.0, level.tier, above="backplane", is_redundant=True)
    second, _ = add_stage(assembly, below, np.arange(cluster.device_count // per_board) // boards, trunk)
    return TreeRouting((first, second)), (per_board, level.size)


def _pcie_tree(
    cluster: Cluster, level: LinkLevel, device: Device, assembly: Assembly, per_switch: int
) -> tuple[TreeRouting, tuple[int, ...]]:
    """Devices at the rate of their host link; a switch's uplink has the profile's rate for each device below it."""
    per_switch = min(per_switch, level.size)
    if level.size % per_switch:
        raise _wrong(cluster, f"{level.name}: {level.size} devices, {per_switch} per PCIe switch", "choose a divisor")
    devices = np.arange(cluster.device_count)
    rate, quarter = level.bandwidth_per_device.value, level.latency.value / 4
    port = max(rate, device.host_link_bandwidth.value)
    device_links = StageFigures("PCIe port", port, quarter, level.tier, above="PCIe switch")
    first, below = add_stage(assembly, devices_as_groups(devices), devices // per_switch, device_links)
    if per_switch == level.size:
        return TreeRouting((first,)), (level.size,)
    uplinks = StageFigures("PCIe switch", rate * per_switch, quarter, level.tier, above="PCIe root")
    parent = np.arange(cluster.device_count // per_switch) // (level.size // per_switch)
    second, _ = add_stage(assembly, below, parent, uplinks)
    return TreeRouting((first, second)), (per_switch, level.size)


def _with_devices(cluster: Cluster) -> Assembly:
    assembly = Assembly()
    assembly.add_vertices("device", [f"device {device}" for device in range(cluster.device_count)])
    return assembly


def _topology(cluster: Cluster, assembly: Assembly, routing: AbstractRouting, symmetry: DigitSymmetry) -> Topology:
    links, channels = assembly.links_and_channels()
    return Topology(
        cluster.id,
        cluster.device_count,
        tuple(assembly.names),
        tuple(assembly.kinds),
        links,
        channels,
        routing,
        symmetry,
        tuple(assembly.assumptions),
    ).checked()


def _check_device_count(cluster: Cluster, product: int) -> None:
    if product != cluster.device_count:
        message = f"the fabric joins {product} devices, but device_count is {cluster.device_count}"
        raise _wrong(cluster, message, "make the sizes of the fabric multiply to device_count", code="E-NET-001")


def _wrong(cluster: Cluster, message: str, remedy: str, code: str = "E-SCN-011") -> ScenarioError:
    return ScenarioError(
        [Problem(code=code, message=f"cluster {cluster.id}: {message}", remedy=remedy, field="fabric")]
    )
