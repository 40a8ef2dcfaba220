"""Topologies: every shipped cluster builds; degree, diameter, bisection against known values; routes; errors."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
from network_cases import BUILDERS, FABRICS, fabric, hierarchy, network, node
from random_scenarios import shipped_library

from moesim.errors import ScenarioError
from moesim.structure.topology_builders import build_topology
from moesim.structure.topology_graphs import topology_from_graph
from moesim.structure.topology_metrics import bisection, diameter, summarise
from moesim.structure.topology_symmetry import RankPattern

GB = 1e9


@pytest.mark.parametrize("name", shipped_library().names("clusters"))
def test_every_shipped_cluster_has_wires_that_join_all_its_devices(name):
    cluster = shipped_library().cluster(name)
    topology = build_topology(cluster, shipped_library().device(cluster.device))
    assert topology.num_devices == cluster.device_count
    assert topology.vertex_kinds.count("device") == cluster.device_count
    far = np.array([topology.num_devices - 1])
    routes = topology.routing.routes(np.array([0]), far)
    assert len(routes.flow) or topology.num_devices == 1
    links = topology.links
    there = set(zip(links.source.tolist(), links.target.tolist(), strict=True))
    assert there == {(target, source) for source, target in there}, "every link has its way back"


# name: neighbours of a device, hops between the farthest, bytes/s across the tightest halving
KNOWN = {
    "crossbar": ((1, 1), 2, 4 * 300 * GB),
    "two boards": ((2, 2), 4, 8 * 6.25 * GB),  # the NICs of one node
    "cube mesh": ((4, 4), 2, 6 * 25 * GB),  # 2 + 2 + 1 + 1 links between the quads
    "full mesh": ((4, 4), 2, 8 * 50 * GB),
    "closed torus": ((4, 4), 5, 2 * 4 * 80 * GB),  # cut across the longer axis
    "mesh": ((2, 4), 7, 5 * 80 * GB),  # only the axis of 4 can be halved
    "ring": ((2, 2), 4, 2 * 80 * GB),
    "torus of two cores": ((1, 1), 6, 2 * 4 * 80 * GB),
    "oversubscribed pods": ((2, 2), 6, 16 * 50 * GB / 1.5 / 2),
    "rails through spines": ((2, 2), 4, 8 * 50 * GB / 2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_degree_diameter_and_bisection_are_the_known_ones(name):
    summary = summarise(fabric(name))
    degree, hops, bandwidth = KNOWN[name]
    assert summary.degree == degree
    assert summary.diameter == hops
    assert summary.bisection_bandwidth == pytest.approx(bandwidth, rel=1e-5)
    assert summary.is_halved


@pytest.mark.parametrize("name", FABRICS)
def test_diameter_from_one_device_per_orbit_is_that_of_networkx(name):
    topology = fabric(name)
    lengths = dict(nx.all_pairs_shortest_path_length(topology.graph))
    devices = range(topology.num_devices)
    assert diameter(topology) == max(lengths[a][b] for a in devices for b in devices)


@pytest.mark.parametrize("name", FABRICS)
def test_routes_are_connected_walks_that_carry_every_flow_whole(name):
    """Kirchhoff: of each flow's links as much enters as leaves every vertex but its ends."""
    topology = fabric(name)
    source, target = (ends.ravel() for ends in np.mgrid[: topology.num_devices, : topology.num_devices])
    routes = topology.routing.routes(source, target)
    links, channels = topology.links, topology.channels
    share_of_link = links.bandwidth / channels.bandwidth[links.channel]
    for flow in np.random.default_rng(1).permutation(len(source))[:60]:
        entries = routes.flow == flow
        share = np.zeros(len(channels))
        np.add.at(share, routes.channel[entries], routes.share[entries])
        on_link = share[links.channel] * share_of_link
        size = len(topology.vertex_names)
        out = np.bincount(links.source, on_link, minlength=size) - np.bincount(links.target, on_link, minlength=size)
        expected = np.zeros(size)
        expected[source[flow]] += 1
        expected[target[flow]] -= 1
        np.testing.assert_allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["crossbar", "cube mesh", "PCIe trees", "full mesh", "oversubscribed pods", "ring"])
def test_routes_are_the_shortest_paths_of_the_graph_split_evenly(name):
    """Not of fabrics whose routes are not shortest paths: rails forward inside nodes, tori go in dimension order."""
    topology = fabric(name)
    if name == "PCIe trees":  # within a node only: an idle NIC is a shorter way between two PCIe switches
        topology = hierarchy("k40", node("pcie3", 8, "5 GB/s"))
    links, node_size = topology.links, {"full mesh": 4, "oversubscribed pods": 2}
    pairs = np.random.default_rng(2).permutation(topology.num_devices**2)[:40]
    for source, target in zip(pairs // topology.num_devices, pairs % topology.num_devices, strict=True):
        if source == target or (name in node_size and source // node_size[name] == target // node_size[name]):
            continue  # two GPUs of a node are as near through its switch or link as through a leaf
        routes = topology.routing.routes(np.array([source]), np.array([target]))
        expected: dict[int, float] = {}
        paths = list(nx.all_shortest_paths(topology.graph, source, target))
        for path in paths:
            for ends in itertools.pairwise(path):
                link = np.flatnonzero((links.source == ends[0]) & (links.target == ends[1]))
                channel = int(links.channel[link[0]])
                expected[channel] = expected.get(channel, 0.0) + 1.0 / len(paths)
        assert dict(zip(routes.channel.tolist(), routes.share.tolist(), strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("name", FABRICS)
def test_orbits_of_devices_and_channels_add_up_to_all_of_them(name):
    topology = fabric(name)
    quotient = topology.symmetry.quotient(topology.channels, RankPattern(topology.num_devices, topology.num_devices))
    assert quotient is not None
    assert quotient.multiplicity.sum() == topology.num_devices
    assert quotient.class_size.sum() == len(topology.channels)
    bandwidth = topology.channels.bandwidth
    np.testing.assert_array_equal(bandwidth, bandwidth[quotient.class_channel][quotient.channel_class])


def test_orbits_are_as_few_as_the_fabric_allows():
    def size(name: str) -> tuple[int, int]:
        topology = fabric(name)
        everyone = RankPattern(topology.num_devices, topology.num_devices)
        quotient = topology.symmetry.quotient(topology.channels, everyone)
        assert quotient is not None
        return len(quotient.source), len(quotient.class_size)

    assert size("closed torus") == (1, 4)
    assert size("torus of two cores") == (1, 6)
    assert size("rails") == (1, 6)
    assert size("ring") == (1, 2)
    assert size("cube meshes, one NIC")[0] == 8


def test_groups_that_fit_no_level_have_no_quotient():
    """Groups of three on nodes of four."""
    topology = fabric("rails")
    assert topology.symmetry.quotient(topology.channels, RankPattern(24, 3)) is None


def test_one_network_card_for_eight_gpus_is_one_link_of_a_hundred_gigabits():
    topology = fabric("cube meshes, one NIC")
    routes = topology.routing.routes(np.array([3]), np.array([12]))
    assert topology.channels.bandwidth[routes.channel[-2:]].tolist() == [12.5e9, 12.5e9]
    names = [topology.channels.name(channel) for channel in routes.channel]
    assert names == [
        "host link up at device 3",
        "host link down at device 12",
        "NIC up at device 0",
        "NIC down at device 8",
    ]


def test_rails_forward_inside_the_source_node():
    """From GPU 0 of node 0 to GPU 3 of node 1: through GPU 3's port and NIC, both on leaf 3."""
    topology = fabric("rails")
    routes = topology.routing.routes(np.array([0]), np.array([7]))
    names = [topology.channels.name(channel) for channel in routes.channel]
    assert names == [
        "node port up at device 0",
        "node port down at device 3",
        "NIC up at device 3",
        "NIC down at device 7",
    ]


def ring_graph(bandwidth: float = 1e9) -> nx.DiGraph:
    graph = nx.DiGraph(nx.cycle_graph(5))
    nx.set_edge_attributes(graph, bandwidth, "bandwidth")
    return graph


def test_a_graph_with_a_device_that_cannot_send_is_refused():
    graph = ring_graph()
    graph.remove_edges_from([(2, 1), (2, 3)])
    with pytest.raises(ScenarioError, match="such as device 2") as caught:
        topology_from_graph(graph, 5)
    assert caught.value.problems[0].code == "E-NET-001"


def test_a_link_without_bandwidth_is_refused():
    graph = ring_graph()
    graph.edges[3, 4]["bandwidth"] = 0.0
    with pytest.raises(ScenarioError, match="device 3 -> device 4 with 0 bytes/s") as caught:
        topology_from_graph(graph, 5)
    assert [problem.code for problem in caught.value.problems] == ["E-NET-002"]


def test_a_link_matrix_that_leaves_gpus_apart_is_refused():
    apart = BUILDERS["cube mesh"]
    matrix = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert apart
    rate = {"value": "25 GB/s", "kind": "assumed", "source": "a test"}
    wiring = {"shape": "link_matrix", "links": matrix, "link_bandwidth": rate, "source": "a test"}
    with pytest.raises(ScenarioError, match="2 of 4 devices cannot exchange data with device 0"):
        hierarchy("v100_sxm2_32gb", node("nvlink2_mesh", 4, "150 GB/s", wiring=wiring))


@pytest.mark.parametrize(
    ("level", "text"),
    [
        (network("roce", 6, "100 Gb/s", 4, domains_per_leaf=4, is_rail_optimised=True), "which 4 does not divide"),
        (network("roce", 6, "100 Gb/s", 3), "which 3 does not divide"),
    ],
)
def test_wiring_that_contradicts_the_sizes_is_refused(level, text):
    with pytest.raises(ScenarioError, match=text):
        hierarchy("h100_sxm", node("nvswitch3", 8, "450 GB/s"), level)


def test_an_odd_number_of_devices_is_cut_as_evenly_as_it_goes():
    assert bisection(topology_from_graph(ring_graph(), 5)) == (pytest.approx(2e9), False)
