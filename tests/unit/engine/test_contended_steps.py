"""Steps whose collectives meet: max-plus where links are private, slower where they are shared or fail."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from random_scenarios import shipped_library

from moesim.engine.analytical import System
from moesim.engine.contended_steps import ContendedStep, LinkFault, contended_step
from moesim.engine.event_driven import simulate_step
from moesim.engine.shared_links import FlappingLink
from moesim.engine.step_passes import prepare_step
from moesim.engine.step_transfers import Profile, step_transfers
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.resources import shipped_scenarios
from moesim.structure.pipeline_orders import FORWARD

NAMES = [path.stem for path in shipped_scenarios()]
LARGE = ("deepseek_v3", "mixtral_8x22b", "qwen3_235b_a22b")
"""Schedules of some thousand passes: a tenth of their micro-batches says as much."""
SHARED_NIC = "m6t_1t_v100x480"


def shipped(name: str, *assignments: str) -> LoadedScenario:
    scenario = load(name, library=shipped_library(), assignments=assignments)
    if name not in LARGE:
        return scenario
    columns = scenario.columns
    sequences = columns["step_sequences"][0] * 2 * columns["stages"][0] / columns["num_micro_batches"][0]
    return load(
        name, library=shipped_library(), assignments=[*assignments, f"workload.sequences_per_step={sequences:.0f}"]
    )


@lru_cache
def contended(name: str, *assignments: str) -> ContendedStep:
    scenario = shipped(name, *assignments)
    return contended_step(scenario.system, scenario.columns)


@pytest.mark.parametrize("name", NAMES)
def test_private_links_give_the_time_of_max_plus(name):
    scenario = shipped(name)
    expected_s = estimate_loaded(scenario).step_time_s
    run = simulate_step(scenario.system, scenario.columns)
    assert contended(name).closed_step_time_s == pytest.approx(expected_s, rel=1e-9)
    assert contended(name).closed_step_time_s == pytest.approx(float(run.step_time_s[0]), rel=1e-9)
    closed = contended_step(scenario.system, scenario.columns, network="closed")
    np.testing.assert_allclose(closed.finish_s, run.finish_s[0].max(axis=1), rtol=1e-9)


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral_8x7b", SHARED_NIC])
def test_passes_wait_for_their_stage_and_their_inputs(name):
    scenario, found = shipped(name), contended(name)
    nodes = prepare_step(scenario.system, scenario.columns).nodes
    start_s, end_s = np.append(found.start_s, 0.0), np.append(found.end_s, 0.0)
    assert (end_s > start_s)[:-1].all()
    assert (start_s[:-1] >= end_s[nodes.needs] * (1 - 1e-12)).all()
    assert (start_s[:-1] >= end_s[nodes.before] * (1 - 1e-12)).all()


def test_gradients_beside_all_to_alls_on_the_same_nic_cost_time():
    """M6-T: half of the reduction hides under a backward pass that is half all-to-all on the node's one NIC."""
    found = contended(SHARED_NIC)
    assert 0.01 < found.contention_s / found.closed_step_time_s < 0.05


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral_8x7b", "qwen3_30b_a3b", SHARED_NIC])
def test_links_carry_every_collective_of_the_step(name):
    """Counted from passes, schedule and prices, whatever was exposed, hidden or slowed."""
    scenario = shipped(name)
    step = prepare_step(scenario.system, scenario.columns)
    transfers, nodes = step_transfers(step), step.nodes
    busy_s = np.zeros_like(contended(name).link_busy_s)

    def count(stage, profile, seconds):
        if profile.levels:
            busy_s[stage] += seconds * profile.wire * np.array(profile.levels)

    for (stage, chunk, phase), part in step.passes([{}], lambda _: np.ones((1, 1))).items():
        times = step.counts[stage, chunk, phase]
        for stretch in part.stretches:
            for timed in stretch.operations():
                seconds = float((timed.exposed_s + timed.extra_s + timed.hidden_s)[0, 0])
                count(stage, transfers.operations.get(timed.operation, Profile()), times * seconds)
        state = transfers.forward_state if phase == FORWARD else transfers.backward_state
        count(stage, state[stage], times * part.zero_s)
    for node in np.flatnonzero(nodes.hops):
        count(nodes.stage[nodes.needs[node]], transfers.message, step.hop_s)
    for stage, end in enumerate(step.step_ends()):
        count(stage, transfers.reductions[stage], end.reduction_s)
        count(stage, transfers.gathers[stage], end.gather_s - end.hidden_gather_s)
    np.testing.assert_allclose(contended(name).link_busy_s, busy_s, rtol=1e-9)


def with_reduction_hidden(scenario: LoadedScenario, part: float) -> System:
    stack = scenario.system.stack
    overlap = stack.overlap.model_copy(update={"data_parallel": part})
    return replace(scenario.system, stack=stack.model_copy(update={"overlap": overlap}))


def test_a_stack_that_hides_nothing_has_nothing_that_meets():
    scenario = shipped(SHARED_NIC)
    found = contended_step(with_reduction_hidden(scenario, 0.0), scenario.columns)
    assert found.step_time_s == pytest.approx(found.closed_step_time_s, rel=1e-12)


def test_sharing_costs_at_most_what_hides():
    scenario = shipped(SHARED_NIC)
    exposed = contended_step(with_reduction_hidden(scenario, 0.0), scenario.columns)
    assert contended(SHARED_NIC).step_time_s <= exposed.step_time_s


@pytest.mark.parametrize("name", ["deepseek_v3", SHARED_NIC])
def test_the_order_of_ties_does_not_matter(name):
    scenario = shipped(name)
    again = contended_step(scenario.system, scenario.columns, tie_order="last_in")
    assert again.step_time_s == pytest.approx(contended(name).step_time_s, rel=1e-10)
    np.testing.assert_allclose(again.start_s, contended(name).start_s, rtol=1e-9, atol=1e-12)


def test_the_same_run_gives_the_same_bits():
    scenario = shipped(SHARED_NIC)
    again = contended_step(scenario.system, scenario.columns)
    assert again.start_s.tobytes() == contended(SHARED_NIC).start_s.tobytes()
    assert again.step_time_s == contended(SHARED_NIC).step_time_s


def network_wire_s(scenario: LoadedScenario) -> float:
    """Wire time of a step whose collectives are bound by the network, when they are all in line."""
    step = prepare_step(scenario.system, scenario.columns)
    run = contended_step(scenario.system, scenario.columns, network="shared")
    transfers = step_transfers(step)
    wires = [*transfers.operations.values(), *transfers.reductions]
    assert all(wire.levels[1] == max(wire.levels) == 1.0 for wire in wires if wire.levels)
    return float(run.link_busy_s[0, 1])


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_a_slower_network_takes_the_longer_for_every_byte(fraction):
    plain = shipped(SHARED_NIC)
    scenario = replace(plain, system=with_reduction_hidden(plain, 0.0))
    found = contended_step(scenario.system, scenario.columns, faults=[LinkFault(0, 1, fraction)])
    assert found.contention_s == pytest.approx(network_wire_s(scenario) * (1 / fraction - 1), rel=1e-9)


@pytest.mark.parametrize("fraction", [1.0, 0.1, 0.02])
def test_the_update_waits_for_the_gradients(fraction):
    """T5: nothing but the reduction communicates; it begins with the backward pass and outlasts it on a slow axis."""
    plain = shipped("t5_large")
    scenario = replace(plain, system=with_reduction_hidden(plain, 1.0))
    found = contended_step(scenario.system, scenario.columns, faults=[LinkFault(0, 1, fraction)])
    step = prepare_step(scenario.system, scenario.columns)
    (end,), (profile,) = step.step_ends(), step_transfers(step).reductions
    assert profile.levels[1] == 1.0
    reduction_s = end.reduction_s * (profile.wire / fraction + 1.0 - profile.wire)
    assert (reduction_s > found.end_s[-1] - found.start_s[-1]) == (fraction < 1.0)
    expected_s = max(found.end_s[-1], found.start_s[-1] + reduction_s) + end.optimizer_s + end.host_s
    assert found.step_time_s == pytest.approx(expected_s, rel=1e-9)


def test_a_link_that_flaps_quickly_is_one_of_its_mean_capacity():
    plain = shipped(SHARED_NIC)
    scenario = replace(plain, system=with_reduction_hidden(plain, 0.0))
    slow, flaps = (
        contended_step(scenario.system, scenario.columns, faults=[fault])
        for fault in (LinkFault(0, 1, 0.75), LinkFault(0, 1, flapping=FlappingLink(1e-4, 5e-5, low_fraction=0.5)))
    )
    assert flaps.contention_s == pytest.approx(slow.contention_s, rel=0.02)
    assert flaps.num_events > slow.num_events


def test_a_slow_stage_delays_the_pipeline():
    """All but the last stage's work waits for it: at least its own delay, at most that of every stage."""
    scenario = shipped("deepseek_v3")
    one = contended_step(scenario.system, scenario.columns, faults=[LinkFault(3, 1, 0.5)])
    everywhere = [LinkFault(stage, 1, 0.5) for stage in range(16)]
    all_of_them = contended_step(scenario.system, scenario.columns, faults=everywhere)
    assert contended("deepseek_v3").step_time_s < one.step_time_s < all_of_them.step_time_s


def test_a_fault_of_a_link_that_is_not_there_is_refused():
    scenario = shipped(SHARED_NIC)
    with pytest.raises(ValueError, match="no level 2 of stage 0"):
        contended_step(scenario.system, scenario.columns, faults=[LinkFault(0, 2, 0.5)])


def test_stages_of_one_node_share_its_nic():
    """Eight stages of one device each behind one NIC are one resource of eight shares; behind NVLink they are eight."""
    assignments = ["parallelism.pipeline.stages=8", "parallelism.data=60", "parallelism.expert=60"]
    order = "parallelism.rank_order=[pipeline, tensor, context, expert, data]"
    scenario = load(SHARED_NIC, library=shipped_library(), assignments=[*assignments, order])
    ports = step_transfers(prepare_step(scenario.system, scenario.columns)).ports
    assert len(np.unique(ports.number[:, 0])) == 16
    assert len(np.unique(ports.number[:, 1])) == 2
    assert ports.capacity[ports.number[:, 1]].tolist() == [[8.0, 8.0]] * 8
