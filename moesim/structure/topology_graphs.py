"""Any directed graph: shortest paths with equal split, for meshes of links within a node and for users' own graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import Problem, ScenarioError
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.topology import TIERS, BoolArray, Routes, Topology
from moesim.structure.topology_assembly import Assembly
from moesim.structure.topology_symmetry import NoSymmetry

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class ShortestPaths:
    """Shortest paths of a small directed graph by number of hops, split evenly over all of them.

    Parallel links count as one edge, so that a path over a double link takes as much as one over a single link. Flows
    between vertices without a direct link are forwarded by what lies between (NVLink forwarding through GPUs).

    Attributes
    ----------
    num_vertices : int
        Vertices of the graph.
    source, target : ndarray of shape (n_edges,)
        Its edges.
    """

    num_vertices: int
    source: IntArray
    target: IntArray

    @cached_property
    def distance(self) -> FloatArray:
        """Hops between vertices, infinite where there is no path: shape (n_vertices, n_vertices)."""
        return self._distance_and_count[0]

    @cached_property
    def _distance_and_count(self) -> tuple[FloatArray, FloatArray]:
        """Distances, and how many shortest paths there are: breadth-first from all vertices at once."""
        adjacency = np.zeros((self.num_vertices, self.num_vertices))
        adjacency[self.source, self.target] = 1.0
        distance = np.full_like(adjacency, np.inf)
        np.fill_diagonal(distance, 0.0)
        count, frontier = np.eye(self.num_vertices), np.eye(self.num_vertices)
        for hops in range(1, self.num_vertices):
            frontier = np.where(np.isinf(distance), frontier @ adjacency, 0.0)
            if not frontier.any():
                break
            reached = frontier > 0
            distance[reached] = hops
            count[reached] = frontier[reached]
        return distance, count

    def shares(self, source: IntArray, target: IntArray) -> FloatArray:
        """Part of each flow that crosses each edge: shape (n_flows, n_edges).

        Of the s(a, b) shortest paths between a and b, s(a, u) s(v, b) cross the edge u -> v if it lies on one.

        Examples
        --------
        A square 0 - 1 - 3 - 2 - 0: half of the flow from 0 to 3 takes either side.

        >>> square = ShortestPaths(4, np.array([0, 0, 1, 2]), np.array([1, 2, 3, 3]))
        >>> square.shares(np.array([0]), np.array([3])).tolist()
        [[0.5, 0.5, 0.5, 0.5]]
        """
        distance, count = self._distance_and_count
        length = distance[source, target]
        if np.isinf(length).any():
            first = int(np.flatnonzero(np.isinf(length))[0])
            message = f"there is no path from vertex {int(source[first])} to vertex {int(target[first])}"
            raise ScenarioError([Problem(code="E-NET-001", message=message, remedy="add the links that join them")])
        before, after = distance[source[:, None], self.source], distance[self.target, target[:, None]]
        paths = count[source[:, None], self.source] * count[self.target, target[:, None]]
        is_on_path: BoolArray = before + 1 + after == length[:, None]
        return np.where(is_on_path, paths / count[source, target][:, None], 0.0)


@dataclass(frozen=True)
class GraphRouting:
    """Shortest paths within equal copies of a small graph, device numbers consecutive in each copy.

    ``channel`` (n_copies, n_edges) are the channels of the edges in each copy.
    """

    paths: ShortestPaths
    channel: IntArray

    @cached_property
    def _pair_shares(self) -> FloatArray:
        """Shares of all pairs of vertices: shape (n_vertices^2, n_edges)."""
        vertices = np.arange(self.paths.num_vertices)
        return self.paths.shares(np.repeat(vertices, len(vertices)), np.tile(vertices, len(vertices)))

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of flows; see ``AbstractRouting``."""
        size = self.paths.num_vertices
        copies = len(self.channel)
        copy, start, end = source // size, source % size, target % size
        if copies == 1 and len(source) < size * size:
            shares = self.paths.shares(start, end)
        else:
            shares = self._pair_shares[start * size + end]
        flow, edge = np.nonzero(shares)
        return Routes(len(source), flow, self.channel[copy[flow], edge], shares[flow, edge])


def topology_from_graph(graph: nx.DiGraph, num_devices: int) -> Topology:
    """Topology of a networkx graph whose vertices ``0 .. num_devices - 1`` are the devices.

    Parameters
    ----------
    graph : DiGraph
        Vertices 0, 1, ...; edges with ``bandwidth`` (bytes/s), and optionally ``latency_s`` and ``tier``.
    num_devices : int
        How many of the vertices send and receive.

    Raises
    ------
    ScenarioError
        If devices are cut off or a link carries nothing.

    Examples
    --------
    >>> import networkx as nx
    >>> ring = nx.DiGraph(nx.cycle_graph(4))
    >>> nx.set_edge_attributes(ring, 1e9, "bandwidth")
    >>> len(topology_from_graph(ring, 4).channels)
    8
    """
    assembly = Assembly()
    assembly.add_vertices("device", [f"device {vertex}" for vertex in range(num_devices)])
    assembly.add_vertices("switch", [f"switch {vertex}" for vertex in range(num_devices, len(graph))])
    edges = list(graph.edges(data=True))
    source, target = np.array([edge[0] for edge in edges]), np.array([edge[1] for edge in edges])
    runs = [(edge[2].get("latency_s", 0.0), edge[2].get("tier", "scale_out")) for edge in edges]
    bandwidth = np.array([edge[2]["bandwidth"] for edge in edges], dtype=np.float64)
    channel = np.zeros(len(edges), np.int64)
    for run in sorted(set(runs)):
        chosen = np.array([position for position, own in enumerate(runs) if own == run])
        assert run[1] in TIERS
        channel[chosen] = assembly.add_links(
            source[chosen],
            target[chosen],
            link=(bandwidth[chosen], run[0]),
            tier=run[1],
            family="link",
            anchor=np.minimum(source[chosen], num_devices - 1),
        )
    links, channels = assembly.links_and_channels()
    routing = GraphRouting(ShortestPaths(len(graph), source, target), channel[None, :])
    name = str(graph.graph.get("name") or "graph")
    return Topology(
        name, num_devices, tuple(assembly.names), tuple(assembly.kinds), links, channels, routing, NoSymmetry()
    ).checked()
