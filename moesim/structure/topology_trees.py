"""Trees of switches: crossbars, PCIe trees, leaf-spine and three-level fat-trees, as stages of channels.

A stage joins groups of devices to what stands above them. A flow climbs from its source to the first stage above
which the two devices are together, and descends to its target. Under fluid ECMP all uplinks of a group are one
channel, whatever the number of spines.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import IntArray
from moesim.structure.topology import Routes, Tier, VertexKind, routes_from_padded
from moesim.structure.topology_assembly import Assembly


@dataclass(frozen=True)
class Stage:
    """Channels between groups and what is above them: ``group`` (n_devices,); up and down (n_groups,)."""

    group: IntArray
    up: IntArray
    down: IntArray


@dataclass(frozen=True)
class TreeRouting:
    """Up to the lowest common switches and down again; stages innermost first."""

    stages: tuple[Stage, ...]

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of flows; see ``AbstractRouting``. Devices without a common switch must not be asked for."""
        hops = []
        for stage in self.stages:
            start, end = stage.group[source], stage.group[target]
            hops += [np.where(start != end, stage.up[start], -1), np.where(start != end, stage.down[end], -1)]
        if not hops:
            return routes_from_padded(np.full((len(source), 1), -1))
        return routes_from_padded(np.stack(hops, axis=1))


@dataclass(frozen=True)
class StageFigures:
    """One stage of links.

    ``bandwidth`` of a whole group in one direction (bytes/s), ``latency_s`` of a hop, ``is_redundant`` if other stages
    always keep it from being full; ``name`` of the groups below and ``width`` switches that stand above each parent.
    """

    name: str
    bandwidth: float
    latency_s: float
    tier: Tier
    above: str
    width: int = 1
    kind: VertexKind = "switch"
    is_redundant: bool = False


@dataclass(frozen=True)
class GroupsBelow:
    """Switches of the groups below a stage, (n_groups, n_switches), the group of each device, and anchors."""

    vertices: IntArray
    group: IntArray

    @property
    def anchor(self) -> IntArray:
        """First device of each group."""
        return np.unique(self.group, return_index=True)[1]


def add_stage(
    assembly: Assembly, below: GroupsBelow, parent: IntArray, figures: StageFigures
) -> tuple[Stage, GroupsBelow]:
    """Join groups to new switches above them.

    Of the n switches of a group and the m above it, link k joins k mod n to k mod m, up to the larger of the two: a
    leaf to every spine, an aggregation switch to its own plane of core switches. The smaller divides the larger.

    Parameters
    ----------
    assembly : Assembly
        Topology being built.
    below : GroupsBelow
        Groups and their switches.
    parent : ndarray of shape (n_groups,)
        Parent of each group, counted from 0.
    figures : StageFigures
        What the links are.
    """
    num_parents = int(parent.max()) + 1
    width = figures.width
    names = [
        f"{figures.above} {index}" if width == 1 else f"{figures.above} {index}.{switch}"
        for index in range(num_parents)
        for switch in range(width)
    ]
    above = assembly.add_vertices(figures.kind, names).reshape(num_parents, width)
    num_groups, switches = below.vertices.shape
    number = max(width, switches)
    lower = below.vertices[:, np.arange(number) % switches].ravel()
    upper = above[parent][:, np.arange(number) % width].ravel()
    group_of_link = np.repeat(np.arange(num_groups), number)
    link = (figures.bandwidth / number, figures.latency_s)
    shared = {
        "link": link,
        "tier": figures.tier,
        "anchor": below.anchor,
        "is_redundant": figures.is_redundant,
        "channel": group_of_link,
    }
    up = assembly.add_links(lower, upper, family=f"{figures.name} up", **shared)  # type: ignore[arg-type]
    down = assembly.add_links(upper, lower, family=f"{figures.name} down", **shared)  # type: ignore[arg-type]
    return Stage(below.group, up, down), GroupsBelow(above, parent[below.group])


def devices_as_groups(devices: IntArray) -> GroupsBelow:
    """Each device a group of its own."""
    return GroupsBelow(devices[:, None], np.arange(len(devices)))


def parents_of(below: GroupsBelow, group_above: IntArray) -> IntArray:
    """Parent of each group, when ``group_above`` (n_devices,) says which group above each device is in."""
    return group_above[below.anchor]


def boundaries_form_a_chain(boundaries: Sequence[int]) -> bool:
    """Whether each number divides the next: only then are they digits of the device number."""
    return all(outer % inner == 0 for inner, outer in itertools.pairwise(boundaries))
