"""Traffic on real fabrics: with and without symmetry the same, bytes conserved, by hand where hands can."""

from __future__ import annotations

import numpy as np
import pytest
from network_cases import FABRICS, fabric

from moesim.engine.flow_network_traffic import (
    Flows,
    all_to_all_v,
    execute_plan,
    plan_flows,
    simulate_flows,
    uniform_all_to_all,
)
from moesim.errors import ScenarioError
from moesim.structure.communication_plans import CommunicationPlan, Transfers
from moesim.structure.topology_symmetry import RankPattern


def patterns(num_devices: int) -> list[RankPattern]:
    """All devices; halves, thirds, quarters; strided groups; half of the machine."""
    found = [RankPattern(num_devices, num_devices)]
    for parts in (2, 3, 4, 8):
        if num_devices % parts == 0 and num_devices > parts:
            size = num_devices // parts
            found += [
                RankPattern(num_devices, size),
                RankPattern(num_devices, size, parts),
                RankPattern(num_devices, parts, size),
            ]
    if num_devices % 4 == 0:
        found += [RankPattern(num_devices // 2, num_devices // 2), RankPattern(num_devices, 2, 2)]
    return found


def explicit(pattern: RankPattern, bytes_per_pair: float) -> Flows:
    everyone = np.arange(pattern.num_ranks)
    return Flows.of(np.repeat(everyone, pattern.size), pattern.peers(everyone).ravel(), bytes_per_pair)


@pytest.mark.parametrize("name", FABRICS)
def test_a_uniform_all_to_all_by_symmetry_is_that_of_all_flows(name):
    topology = fabric(name)
    for pattern in patterns(topology.num_devices):
        by_orbits = uniform_all_to_all(topology, pattern, 1e6)
        flow_by_flow = simulate_flows(topology, explicit(pattern, 1e6), by_symmetry=False)
        assert by_orbits.makespan_s == pytest.approx(flow_by_flow.makespan_s, rel=1e-9), pattern
        assert by_orbits.busiest(topology)[1] == pytest.approx(flow_by_flow.busiest(topology)[1], rel=1e-9), pattern
        total = (by_orbits.links.num_bytes * by_orbits.links.count).sum()
        assert total == pytest.approx(flow_by_flow.links.num_bytes.sum(), rel=1e-9), pattern


def skewed(num_ranks: int, kind: str) -> np.ndarray:
    generator = np.random.default_rng(7)
    match kind:
        case "same_for_all_sources":
            return np.tile(generator.dirichlet(np.ones(num_ranks)) * num_ranks * 1e5, (num_ranks, 1))
        case "one_hot_rank":
            matrix = np.full((num_ranks, num_ranks), 1e5)
            matrix[:, 1] *= 4
            return matrix
        case _:
            return generator.integers(0, 5, (num_ranks, num_ranks)) * 1e5


@pytest.mark.parametrize("kind", ["same_for_all_sources", "one_hot_rank", "whole_tokens"])
@pytest.mark.parametrize("name", FABRICS)
def test_a_skewed_all_to_all_by_symmetry_is_that_of_all_flows(name, kind):
    topology = fabric(name)
    ranks = min(topology.num_devices, 16)
    matrix = skewed(ranks, kind)
    by_classes = all_to_all_v(topology, np.arange(ranks), matrix)
    flows = Flows.of(np.repeat(np.arange(ranks), ranks), np.tile(np.arange(ranks), ranks), matrix.ravel())
    flow_by_flow = simulate_flows(topology, flows, by_symmetry=False)
    np.testing.assert_allclose(by_classes.finish_s, flow_by_flow.finish_s, rtol=1e-9)
    assert by_classes.makespan_s == pytest.approx(flow_by_flow.makespan_s, rel=1e-9)
    assert by_classes.num_flow_classes <= flow_by_flow.num_flow_classes


@pytest.mark.parametrize("name", FABRICS)
def test_two_collectives_at_once_by_symmetry_are_those_of_all_flows(name):
    """Groups of two all-to-all beside a ring over all devices that starts later."""
    topology = fabric(name)
    devices = np.arange(topology.num_devices)
    ring = Flows.of(devices, np.roll(devices, -1), 3e6, start_s=1e-6)
    both = Flows.together([explicit(RankPattern(len(devices), 2), 1e6), ring])
    merged, full = simulate_flows(topology, both), simulate_flows(topology, both, by_symmetry=False)
    np.testing.assert_allclose(merged.finish_s, full.finish_s, rtol=1e-9)


@pytest.mark.parametrize("name", FABRICS)
def test_rates_between_events_are_fair_and_carry_every_byte_once(name):
    from moesim.engine.flow_network import Incidence, bottleneck_slack

    topology = fabric(name)
    ranks = min(topology.num_devices, 12)
    matrix = skewed(ranks, "random")
    np.fill_diagonal(matrix, 0.0)
    source, target = np.nonzero(matrix)
    routes = topology.routing.routes(source, target)
    entries = Incidence(len(source), len(topology.channels), routes.flow, routes.channel, routes.share)
    sent = np.zeros(len(source))

    def observe(begin, end, active, rate):
        everything = np.zeros(len(source))
        everything[active] = rate
        is_active = everything > 0
        assert bottleneck_slack(entries.only(is_active), topology.channels.bandwidth, everything[is_active]) < 1e-9
        sent[:] += everything * (end - begin)

    flows = Flows.of(source, target, matrix[source, target])
    result = simulate_flows(topology, flows, by_symmetry=False, observer=observe)
    np.testing.assert_allclose(sent, flows.num_bytes, rtol=1e-9)
    carried = np.bincount(routes.channel, routes.share * sent[routes.flow], minlength=len(topology.channels))
    np.testing.assert_allclose(result.links.num_bytes, carried[result.links.channel], rtol=1e-9)


def test_flows_of_a_crossbar_share_its_ports():
    """Two flows leave device 0 at half rate each; 1 MB more follows alone at 300 GB/s, and a hop takes 0.7 us."""
    flows = Flows.of(np.array([0, 0]), np.array([1, 2]), np.array([3e6, 6e6]))
    finish = simulate_flows(fabric("crossbar"), flows).finish_s
    np.testing.assert_allclose(finish, np.array([20e-6, 30e-6]) + 0.7e-6, rtol=1e-12)


def test_a_flow_that_starts_later_slows_the_others_from_then_on():
    flows = Flows.of(np.array([0, 0]), np.array([1, 2]), np.array([6e6, 3e6]), start_s=np.array([0.0, 10e-6]))
    finish = simulate_flows(fabric("crossbar"), flows).finish_s
    np.testing.assert_allclose(finish, np.array([30e-6, 30e-6]) + 0.7e-6, rtol=1e-12)


def test_no_bytes_and_home_deliveries_take_no_time():
    flows = Flows.of(np.array([0, 1]), np.array([0, 2]), np.array([1e6, 0.0]))
    result = simulate_flows(fabric("crossbar"), flows)
    assert result.finish_s.tolist() == [0.0, 0.0]
    assert result.busiest(fabric("crossbar")) == ("none", 0.0)


def test_a_stack_that_reaches_half_of_the_bandwidth_takes_twice_the_wire_time():
    topology, flows = fabric("crossbar"), Flows.of(np.array([0]), np.array([1]), 3e6)
    whole = simulate_flows(topology, flows).makespan_s
    half = simulate_flows(topology, flows, link_fractions={"scale_up": 0.5}).makespan_s
    assert half - 0.7e-6 == pytest.approx(2 * (whole - 0.7e-6))


def ring_round(ranks: int, num_bytes: float) -> Transfers:
    return Transfers.of([(rank, (rank + 1) % ranks, [0]) for rank in range(ranks)], np.array([num_bytes]))


def test_rounds_of_a_plan_follow_one_another():
    """Seven rounds of a ring all-gather: 7 (0.7 us + 1 MB / 300 GB/s)."""
    plan = CommunicationPlan(8, ((ring_round(8, 1e6),) * 7,), np.array([1e6]))
    seconds = execute_plan(fabric("crossbar"), np.arange(8), plan)
    assert seconds == pytest.approx(7 * (0.7e-6 + 1e6 / 300e9), rel=1e-12)
    flows = plan_flows(np.arange(8), plan)
    assert simulate_flows(fabric("crossbar"), flows).makespan_s == pytest.approx(seconds, rel=1e-12)


def test_chains_of_a_plan_share_the_links():
    """Two chains of one round over the same ring: each at half rate."""
    chain = (ring_round(8, 1e6),)
    plan = CommunicationPlan(8, (chain, chain), np.array([1e6]))
    assert execute_plan(fabric("crossbar"), np.arange(8), plan) == pytest.approx(0.7e-6 + 2e6 / 300e9, rel=1e-12)


def test_a_reduction_in_the_switch_crosses_every_port_once_each_way():
    """All send 3 MB to the switch, which sends 3 MB to all: twice half of the hop and 3 MB at 300 GB/s."""
    both_ways = [[(rank, 8, [0]) for rank in range(8)], [(8, rank, [0]) for rank in range(8)]]
    rounds = tuple(Transfers.of(moves, np.array([3e6])) for moves in both_ways)
    plan = CommunicationPlan(8, (rounds,), np.array([3e6]), num_switches=1)
    assert execute_plan(fabric("crossbar"), np.arange(8), plan) == pytest.approx(2 * (0.35e-6 + 10e-6), rel=1e-12)
    with pytest.raises(ScenarioError, match="no switch that flows could end in"):
        execute_plan(fabric("ring"), np.arange(8), plan)


@pytest.mark.parametrize(
    ("traffic", "text"),
    [
        (lambda t: simulate_flows(t, Flows.of(np.array([0]), np.array([99]), 1.0)), "target 99 is none of the 8"),
        (lambda t: simulate_flows(t, Flows.of(np.array([0]), np.array([1]), -1.0)), "flow 0 has bytes -1"),
        (lambda t: uniform_all_to_all(t, RankPattern(64, 64), 1.0), "64 ranks on the 8 devices"),
        (lambda t: all_to_all_v(t, np.arange(4), np.ones((4, 3))), "4 x 3 pairs for 4 ranks"),
        (lambda t: uniform_all_to_all(t, RankPattern(8, 8), 1.0, link_fractions={"pcie": 0.5}), "fractions"),
    ],
)
def test_traffic_that_does_not_fit_is_refused_with_a_sentence(traffic, text):
    with pytest.raises(ScenarioError, match=text) as caught:
        traffic(fabric("crossbar"))
    assert caught.value.problems[0].code == "E-NET-003"


@pytest.mark.slow
def test_merged_ends_are_within_their_error_bound_of_the_exact_ones():
    """64 GPUs, a draw per source: what was seen is 1e-4 of the time, the bound 2e-3."""
    generator = np.random.default_rng(5)
    topology = fabric("eight nodes on rails")
    matrix = generator.dirichlet(np.ones(64), size=64) * 64e6
    exact = all_to_all_v(topology, np.arange(64), matrix)
    merged = all_to_all_v(topology, np.arange(64), matrix, merge_within=0.005)
    assert exact.error_bound == 0.0
    assert merged.num_events < exact.num_events / 4
    assert 0 < merged.error_bound < 0.005
    assert abs(merged.makespan_s / exact.makespan_s - 1) < merged.error_bound
    assert np.abs(merged.finish_s - exact.finish_s).max() < 0.02 * exact.makespan_s
