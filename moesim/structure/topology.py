"""Wires of a cluster: devices, switches and directed links, and the channels that flows share.

A *channel* is a set of parallel links over which every flow that takes one of them is split evenly (the uplinks of a
leaf under fluid ECMP): one link of the summed bandwidth. Most channels are one link. Routes and the flow engine speak
of channels; networkx sees the links once, to check and to draw them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moesim.errors import Problem, ScenarioError
from moesim.structure.columns import FloatArray, IntArray

if TYPE_CHECKING:
    import networkx as nx

    from moesim.structure.topology_symmetry import AbstractSymmetry

BoolArray = npt.NDArray[np.bool_]
Tier = Literal["scale_up", "scale_out", "torus"]
TIERS: tuple[Tier, ...] = ("scale_up", "scale_out", "torus")
VertexKind = Literal["device", "switch", "nic", "chip"]


def sums(index: IntArray, value: FloatArray, number: int) -> FloatArray:
    """Sum of the values of each index, shape (number,).

    Examples
    --------
    >>> sums(np.array([0, 2, 2]), np.array([1.0, 2.0, 3.0]), 3).tolist()
    [1.0, 0.0, 5.0]
    """
    return np.asarray(np.bincount(index, value, minlength=number), dtype=np.float64)


@dataclass(frozen=True)
class Links:
    """Directed links, arrays (n_links,): ``source`` and ``target`` are vertices, ``tier`` indexes ``TIERS``."""

    source: IntArray
    target: IntArray
    bandwidth: FloatArray
    latency_s: FloatArray
    tier: IntArray
    channel: IntArray

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Channels:
    """Channels, arrays (n_channels,).

    ``bandwidth`` of the channel's links together; ``latency_s`` of one hop. ``family`` tells apart channels of
    different role (uplinks of leaves, downlinks of leaves, +x links of a torus); ``anchor`` is the device that stands
    for a channel's place: symmetries move channels as they move anchors. ``is_redundant`` where the channels before or
    after it can never fill it, so that it never decides a rate. ``name`` reads like ``leaf 3 up``.
    """

    bandwidth: FloatArray
    latency_s: FloatArray
    tier: IntArray
    family: IntArray
    anchor: IntArray
    is_redundant: BoolArray
    family_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.bandwidth)

    def name(self, channel: int) -> str:
        """Name of a channel for people: its role and the device it belongs to."""
        return f"{self.family_names[int(self.family[channel])]} at device {int(self.anchor[channel])}"


@dataclass(frozen=True)
class Routes:
    """Channels that flows cross, as entries sorted by flow.

    Attributes
    ----------
    num_flows : int
        Flows, also those that cross nothing.
    flow, channel : ndarray of shape (n_entries,)
        Flow and channel of each entry.
    share : ndarray of shape (n_entries,)
        Part of the flow's bytes that crosses the channel: 1, or less where it is split over several shortest paths.
    """

    num_flows: int
    flow: IntArray
    channel: IntArray
    share: FloatArray

    def latency_s(self, channels: Channels) -> FloatArray:
        """Latency of each flow: the sum of its hops (the mean of its paths), shape (n_flows,)."""
        return sums(self.flow, self.share * channels.latency_s[self.channel], self.num_flows)


def routes_from_padded(channel: IntArray, share: FloatArray | float = 1.0) -> Routes:
    """Routes from a table (n_flows, n_hops) of channels, -1 where there is no hop.

    Examples
    --------
    >>> routes_from_padded(np.array([[4, -1, 5], [-1, -1, 6]])).channel.tolist()
    [4, 5, 6]
    """
    used = channel >= 0
    flow = np.nonzero(used)[0]
    return Routes(len(channel), flow, channel[used], np.broadcast_to(share, channel.shape)[used].astype(np.float64))


def joined_routes(parts: Sequence[Routes]) -> Routes:
    """Routes of flows that cross one part of a network after another."""
    flow = np.concatenate([part.flow for part in parts])
    order = np.argsort(flow, kind="stable")
    channel = np.concatenate([part.channel for part in parts])[order]
    share = np.concatenate([part.share for part in parts])[order]
    return Routes(parts[0].num_flows, flow[order], channel, share)


class AbstractRouting(Protocol):
    """How flows between devices cross channels."""

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of flows; nothing is crossed from a device to itself."""
        ...


SWITCH = -1
"""End of a flow that is the scale-up switch of its other end."""


@dataclass(frozen=True)
class Topology:
    """Devices ``0 .. num_devices - 1`` first, then switches, NICs and chips; links, channels, routes, symmetries.

    ``assumptions`` are sentences about what the profile does not say and the builder took.
    """

    name: str
    num_devices: int
    vertex_names: tuple[str, ...]
    vertex_kinds: tuple[VertexKind, ...]
    links: Links
    channels: Channels
    routing: AbstractRouting
    symmetry: AbstractSymmetry
    assumptions: tuple[str, ...] = ()

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Networkx graph of the links; parallel links of a pair are one edge with a count."""
        import networkx as nx

        graph = nx.DiGraph(name=self.name)
        graph.add_nodes_from(
            (vertex, {"name": name, "kind": kind})
            for vertex, (name, kind) in enumerate(zip(self.vertex_names, self.vertex_kinds, strict=True))
        )
        links = self.links
        pairs, index, count = np.unique(
            links.source * len(self.vertex_names) + links.target, return_inverse=True, return_counts=True
        )
        bandwidth = np.bincount(index, links.bandwidth).tolist()
        first = np.full(len(pairs), len(links))
        np.minimum.at(first, index, np.arange(len(links)))
        latency, tier = links.latency_s[first].tolist(), links.tier[first].tolist()
        source, target = (pairs // len(self.vertex_names)).tolist(), (pairs % len(self.vertex_names)).tolist()
        graph.add_edges_from(
            (a, b, {"bandwidth": rate, "latency_s": delay, "tier": TIERS[level], "links": number})
            for a, b, rate, delay, level, number in zip(
                source, target, bandwidth, latency, tier, count.tolist(), strict=True
            )
        )
        return graph

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of flows; an end ``SWITCH`` is the scale-up switch that the other end is attached to.

        Raises
        ------
        ScenarioError
            E-NET-003 if such a flow has no switch, or a switch at both ends.
        """
        to_switch, from_switch = target == SWITCH, source == SWITCH
        if not (to_switch.any() or from_switch.any()):
            return self.routing.routes(source, target)
        find_ports = getattr(self.routing, "switch_ports", None)
        ports = find_ports() if find_ports else None
        if ports is None or (to_switch & from_switch).any():
            message = f"{self.name}: devices have no switch that flows could end in"
            remedy = "choose an algorithm that runs on devices"
            raise ScenarioError([Problem(code="E-NET-003", message=message, remedy=remedy)])
        is_whole = ~(to_switch | from_switch)
        start, end = np.where(is_whole, source, 0), np.where(is_whole, target, 0)
        up = np.where(to_switch, ports[0][np.maximum(source, 0)], -1)
        down = np.where(from_switch, ports[1][np.maximum(target, 0)], -1)
        return joined_routes([self.routing.routes(start, end), routes_from_padded(np.stack((up, down), axis=1))])

    def checked(self) -> Topology:
        """Return the topology itself if every link carries bytes and every device reaches every other.

        Raises
        ------
        ScenarioError
            With E-NET-001 for devices that are cut off, E-NET-002 for links without bandwidth.
        """
        problems = [*self._idle_links(), *self._cut_off_devices()]
        if problems:
            raise ScenarioError(problems)
        return self

    def _idle_links(self) -> list[Problem]:
        links = self.links
        wrong = np.flatnonzero(~(np.isfinite(links.bandwidth) & (links.bandwidth > 0)))
        if not len(wrong):
            return []
        first = int(wrong[0])
        ends = f"{self.vertex_names[links.source[first]]} -> {self.vertex_names[links.target[first]]}"
        message = (
            f"{self.name}: {len(wrong)} links carry nothing, such as {ends} with {links.bandwidth[first]:g} bytes/s"
        )
        return [Problem(code="E-NET-002", message=message, remedy="give every link a positive bandwidth, or remove it")]

    def _cut_off_devices(self) -> list[Problem]:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        size = len(self.vertex_names)
        adjacency = coo_array((np.ones(len(self.links)), (self.links.source, self.links.target)), shape=(size, size))
        _, component = connected_components(adjacency.tocsr(), directed=True, connection="strong")
        apart = np.flatnonzero(component[: self.num_devices] != component[0])
        if not len(apart):
            return []
        message = (
            f"{self.name}: {len(apart)} of {self.num_devices} devices cannot exchange data with device 0 both ways, "
            f"such as device {int(apart[0])}"
        )
        return [Problem(code="E-NET-001", message=message, remedy="add the links that join them, in both directions")]
