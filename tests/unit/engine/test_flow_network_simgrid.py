"""SimGrid, an independent max-min simulator, gives every flow the same end."""

from __future__ import annotations

import numpy as np
import pytest
from network_cases import fabric, figure_number, hierarchy, network, node, torus
from simgrid_oracle import missing_reason, simgrid_run

from moesim.engine.flow_network_traffic import Flows, simulate_flows
from moesim.structure.topology import Topology

TOLERANCE = 1e-3
"""What was seen is 1e-14; SimGrid stops filling links at a precision of 1e-5."""

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason() or "SimGrid is there")


def fat_tree() -> Topology:
    """64 GPUs, two per node, three stages of switches, each oversubscribed."""
    pods = {"domains_per_leaf": 4, "leaves_per_pod": 4, "is_rail_optimised": False}
    pods |= {"leaf_oversubscription": figure_number(1.5), "pod_oversubscription": figure_number(2.0)}
    return hierarchy("h100_sxm", node("nvswitch3", 2, "450 GB/s"), network("roce", 32, "400 Gb/s", 2, **pods))


NETWORKS = {
    "fat-tree of 64": fat_tree,
    "eight nodes on rails": lambda: fabric("eight nodes on rails"),
    "mesh of 8 x 8": lambda: torus("tpu_v5e", [8, 8], [False, False]),
    "torus of 5 x 7": lambda: torus("tpu_v5e", [5, 7], [True, True]),  # odd: no flow is split over two ways
}


def pairs(number: int) -> tuple[np.ndarray, np.ndarray]:
    source, target = np.nonzero(1 - np.eye(number, dtype=np.int64))
    return source, target


def uniform(number: int) -> Flows:
    return Flows.of(*pairs(number), 2e9)


def skewed(number: int) -> Flows:
    """Whole gigabytes, drawn for every pair on its own."""
    source, target = pairs(number)
    return Flows.of(source, target, np.random.default_rng(3).integers(1, 6, len(source)) * 1e9)


def two_at_once(number: int) -> Flows:
    """All-to-all in groups of neighbours beside a ring over everything that starts later."""
    size = 8 if number % 8 == 0 else 5
    source, target = pairs(number)
    is_group = source // size == target // size
    ring = np.arange(number)
    groups = Flows.of(source[is_group], target[is_group], 3e9)
    return Flows.together([groups, Flows.of(ring, (ring + size) % number, 4e9, start_s=0.03)])


@pytest.mark.parametrize("traffic", [uniform, skewed, two_at_once])
@pytest.mark.parametrize("name", NETWORKS)
def test_simgrid_ends_every_flow_at_the_same_time(name, traffic):
    topology = NETWORKS[name]()
    flows = traffic(topology.num_devices)
    ours = simulate_flows(topology, flows)
    latency = topology.routing.routes(flows.source, flows.target).latency_s(topology.channels)
    theirs = simgrid_run(topology, flows)
    np.testing.assert_allclose(ours.finish_s - latency, theirs.finish_s, rtol=TOLERANCE)


def test_simgrid_would_notice_a_link_that_is_a_tenth_too_fast():
    topology = NETWORKS["torus of 5 x 7"]()
    flows = uniform(topology.num_devices)
    slower = simulate_flows(topology, flows, link_fractions={"torus": 0.9})
    assert slower.makespan_s > 1.1 * simgrid_run(topology, flows).finish_s.max()
