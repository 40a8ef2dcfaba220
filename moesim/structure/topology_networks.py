"""Networks between nodes: NICs (one per device, several, or shared), leaves, spines, pods, data-centre networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.describe.hardware import Cluster, Device, FatTree, LinkLevel
from moesim.errors import Problem, ScenarioError
from moesim.structure.topology_assembly import Assembly
from moesim.structure.topology_trees import (
    GroupsBelow,
    Stage,
    StageFigures,
    TreeRouting,
    add_stage,
    devices_as_groups,
    parents_of,
)

LEAF_PORTS = 32


@dataclass(frozen=True)
class OuterNetwork:
    """Routing between domains, the digits it allows, and (NICs, devices) per node where flows change rails inside."""

    routing: TreeRouting | None
    boundaries: tuple[int, ...]
    rails: tuple[int, int] | None


@dataclass(frozen=True)
class _Plan:
    """Numbers of one network of domains, before it is wired.

    ``domain``, ``node`` devices; ``sharing`` devices per NIC; ``leaf`` devices below a group of leaves; ``pod`` devices
    of a pod, 0 in a two-level tree; ``rails`` leaves of a group.
    """

    domain: int
    node: int
    sharing: int
    leaf: int
    pod: int
    rails: int
    size: int
    nic_bandwidth: float
    leaf_oversubscription: float
    pod_oversubscription: float


def add_outer_network(
    assembly: Assembly, cluster: Cluster, device: Device, levels: Sequence[LinkLevel]
) -> OuterNetwork:
    """Join the scale-up domains of a cluster by its outer levels, innermost first."""
    first, *others = levels
    wiring = _wiring(first, assembly)
    plan = _plan(cluster, first, wiring, assembly)
    stages, below, boundaries = _network(assembly, cluster, device, first, plan)
    inside = plan.size
    for level in others:
        rate = level.bandwidth_per_device.value * inside
        figures = StageFigures(f"{first.name} uplink", rate, level.latency.value / 2, level.tier, above=level.name)
        group_above = np.arange(cluster.device_count) // (inside * level.size)
        stage, below = add_stage(assembly, below, parents_of(below, group_above), figures)
        stages.append(stage)
        boundaries.append(inside)
        inside *= level.size
        first = level
    changes_rails = wiring.is_rail_optimised and wiring.between_rails == "forward" and plan.rails > 1
    return OuterNetwork(
        TreeRouting(tuple(stages)),
        tuple(boundaries),
        (plan.node // plan.sharing, plan.node) if changes_rails else None,
    )


def _wiring(level: LinkLevel, assembly: Assembly) -> FatTree:
    if level.wiring is None:
        is_rail_optimised = level.medium.endswith("rail")
        text = "a leaf per NIC of a node" if is_rail_optimised else "all NICs of a node on one leaf"
        assembly.assumptions.append(
            f"{level.name}: {text}, leaves of at most {LEAF_PORTS} NICs, nothing oversubscribed"
        )
        return FatTree(shape="fat_tree", is_rail_optimised=is_rail_optimised, source="assumed")
    if not isinstance(level.wiring, FatTree):
        message = f"fabric level {level.name}: nodes are joined by a fat tree, not by a {level.wiring.shape}"
        raise ScenarioError([Problem(code="E-SCN-011", message=message, remedy="use shape: fat_tree", field="fabric")])
    return level.wiring


def _plan(cluster: Cluster, level: LinkLevel, wiring: FatTree, assembly: Assembly) -> _Plan:
    node, domain = cluster.devices_per_node, cluster.fabric.levels[0].size  # type: ignore[union-attr]
    nics = min(level.nics_per_node or node, node)
    domains = level.size
    if level.nics_per_node is None:
        assembly.assumptions.append(f"{level.name}: one NIC per device")
    _must_divide(cluster, node, nics, "devices per node", "nics_per_node")
    _must_divide(cluster, domain, node, "devices of the innermost level", "devices_per_node")
    rails = nics if wiring.is_rail_optimised else 1
    ports_per_domain = domain // (node // nics) // rails
    fits = max(1, LEAF_PORTS // ports_per_domain)
    per_leaf = wiring.domains_per_leaf or max(count for count in range(1, fits + 1) if domains % count == 0)
    _must_divide(cluster, domains, per_leaf, f"members of level {level.name}", "wiring.domains_per_leaf")
    per_pod = wiring.leaves_per_pod or domains // per_leaf
    _must_divide(cluster, domains // per_leaf, per_pod, f"groups of leaves of {level.name}", "wiring.leaves_per_pod")
    figures = (wiring.leaf_oversubscription, wiring.pod_oversubscription)
    oversubscription = [figure.value if figure else 1.0 for figure in figures]
    leaf = per_leaf * domain
    return _Plan(
        domain=domain,
        node=node,
        sharing=node // nics,
        leaf=leaf,
        pod=leaf * per_pod if per_pod * per_leaf < domains else 0,
        rails=rails,
        size=domain * domains,
        nic_bandwidth=level.bandwidth_per_device.value * (node // nics),
        leaf_oversubscription=oversubscription[0],
        pod_oversubscription=oversubscription[1],
    )


def _network(
    assembly: Assembly, cluster: Cluster, device: Device, level: LinkLevel, plan: _Plan
) -> tuple[list[Stage], GroupsBelow, list[int]]:
    """Wire the first outer level; also what is on top, and the block sizes at which parts repeat."""
    devices = np.arange(cluster.device_count)
    half = level.latency.value / 2
    below, stages, tier = devices_as_groups(devices), [], level.tier
    nic = devices // plan.sharing
    if plan.sharing > 1:
        host = device.host_link_bandwidth.value
        figures = StageFigures(
            "host link", host, 0.0, tier, above="NIC", kind="nic", is_redundant=host >= plan.nic_bandwidth
        )
        stage, below = add_stage(assembly, below, nic, figures)
        stages.append(stage)
    rail = devices % plan.node // plan.sharing if plan.rails > 1 else 0 * devices
    leaf = devices // plan.leaf * plan.rails + rail
    figures = StageFigures("NIC", plan.nic_bandwidth, half, tier, above="leaf")
    stage, below = add_stage(assembly, below, parents_of(below, leaf), figures)
    stages.append(stage)
    boundaries = [plan.sharing, plan.node, plan.domain, plan.leaf, plan.size]
    nics_per_leaf = plan.leaf // plan.sharing // plan.rails
    rate = nics_per_leaf * plan.nic_bandwidth / plan.leaf_oversubscription
    width = max(1, round(nics_per_leaf / plan.leaf_oversubscription))
    top = plan.pod or plan.size
    if plan.leaf < plan.size or plan.rails > 1:
        free = plan.leaf_oversubscription <= 1
        above = "aggregation" if plan.pod else "spine"
        figures = StageFigures("leaf", rate, 0.0, tier, above=above, width=width, is_redundant=free)
        stage, below = add_stage(assembly, below, parents_of(below, devices // top), figures)
        stages.append(stage)
    if plan.pod:
        leaves = plan.pod // plan.leaf * plan.rails
        figures = StageFigures(
            "pod",
            rate * leaves / plan.pod_oversubscription,
            0.0,
            tier,
            above="core",
            width=width * max(1, round(leaves / plan.pod_oversubscription)),
            is_redundant=plan.pod_oversubscription <= 1,
        )
        stage, below = add_stage(assembly, below, parents_of(below, devices // plan.size), figures)
        stages.append(stage)
        boundaries.append(plan.pod)
    return stages, below, boundaries


def _must_divide(cluster: Cluster, whole: int, part: int, what: str, field: str) -> None:
    if whole % part:
        message = f"cluster {cluster.id}: {what} is {whole}, which {part} does not divide"
        raise ScenarioError(
            [Problem(code="E-SCN-004", message=message, remedy="choose a divisor", field=f"fabric.{field}")]
        )
