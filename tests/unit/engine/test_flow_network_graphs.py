"""Random graphs and flows: fair between events, every byte once, symmetry changes nothing."""

from __future__ import annotations

import networkx as nx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.flow_network import Incidence, bottleneck_slack
from moesim.engine.flow_network_traffic import Flows, simulate_flows
from moesim.structure.topology import Topology
from moesim.structure.topology_graphs import topology_from_graph


def random_topology(generator: np.random.Generator) -> Topology:
    """A ring, so that all is joined, with chords; few different bandwidths, so that there are ties."""
    number = int(generator.integers(3, 12))
    graph = nx.DiGraph(nx.cycle_graph(number))
    chords = generator.integers(0, number, (int(generator.integers(0, 15)), 2))
    graph.add_edges_from((a, b) for a, b in chords.tolist() if a != b)
    for _, _, data in graph.edges(data=True):
        data |= {"bandwidth": float(generator.choice([1e9, 1e9, 4e9])), "latency_s": 1e-6}
    return topology_from_graph(graph, int(generator.integers(2, number + 1)))


def random_flows(generator: np.random.Generator, num_devices: int) -> Flows:
    number = int(generator.integers(1, 40))
    source, target = generator.integers(0, num_devices, (2, number))
    start = generator.choice([0.0, 0.0, 1e-3, 2e-3], number)
    return Flows.of(source, target, generator.choice([0.0, 1e6, 1e6, 3e6], number), start)


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_random_flows_on_random_graphs(seed):
    generator = np.random.default_rng(seed)
    topology = random_topology(generator)
    flows = random_flows(generator, topology.num_devices)
    carries = (flows.num_bytes > 0) & (flows.source != flows.target)
    routes = topology.routing.routes(flows.source[carries], flows.target[carries])
    entries = Incidence(int(carries.sum()), len(topology.channels), routes.flow, routes.channel, routes.share)
    sent = np.zeros(entries.num_flows)

    def observe(begin, end, active, rate):
        is_active = np.zeros(entries.num_flows, bool)
        is_active[active] = True
        assert bottleneck_slack(entries.only(is_active), topology.channels.bandwidth, rate) < 1e-9
        sent[active] += rate * (end - begin)

    full = simulate_flows(topology, flows, by_symmetry=False, observer=observe)
    np.testing.assert_allclose(sent, flows.num_bytes[carries], rtol=1e-9)
    merged = simulate_flows(topology, flows)
    np.testing.assert_allclose(merged.finish_s, full.finish_s, rtol=1e-9)
    assert merged.num_flow_classes <= full.num_flow_classes
    assert (full.links.utilisation <= 1.0 + 1e-9).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_more_bandwidth_everywhere_scales_the_time_of_the_wires(seed):
    generator = np.random.default_rng(seed)
    topology = random_topology(generator)
    flows = random_flows(generator, topology.num_devices)
    flows = Flows.of(flows.source, flows.target, flows.num_bytes)
    latency = topology.routing.routes(flows.source, flows.target).latency_s(topology.channels)
    carries = (flows.num_bytes > 0) & (flows.source != flows.target)
    whole = simulate_flows(topology, flows).finish_s - latency * carries
    half = simulate_flows(topology, flows, link_fractions={"scale_out": 0.5}).finish_s - latency * carries
    np.testing.assert_allclose(half, 2 * whole, rtol=1e-9, atol=1e-15)
