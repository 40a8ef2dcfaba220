"""Slow and flapping links of a command line on the ports of stages."""

from __future__ import annotations

import pytest
from random_scenarios import shipped_library

from moesim.describe.perturbations import FlappingLink, Perturbations, SlowLink
from moesim.engine.link_faults import link_faults
from moesim.engine.step_passes import PreparedStep, prepare_step
from moesim.engine.uneven_world import flapping_phases
from moesim.errors import ScenarioError
from moesim.estimation.loading import load

ONE_NIC = (
    "parallelism.pipeline.stages=8",
    "parallelism.data=60",
    "parallelism.expert=60",
    "parallelism.rank_order=[pipeline, tensor, context, expert, data]",
)
"""Eight stages of one device each in every node, behind its one NIC."""


def prepared(name: str, *assignments: str) -> PreparedStep:
    scenario = load(name, library=shipped_library(), assignments=assignments)
    return prepare_step(scenario.system, scenario.columns)


def slow(level: str, rank: int | None = None) -> Perturbations:
    return Perturbations(slow_links=(SlowLink(level, rank, 0.5),))


def test_the_link_of_a_rank_is_that_of_its_stage() -> None:
    (fault,) = link_faults(prepared("mixtral_8x7b"), slow("network", 17), seed=0)
    assert (fault.stage, fault.level, fault.fraction, fault.flapping) == (1, 1, 0.5, None)


@pytest.mark.parametrize(("level", "stages"), [("node", 8), ("network", 1)])
def test_a_level_is_slow_once_for_each_port(level: str, stages: int) -> None:
    assert len(link_faults(prepared("m6t_1t_v100x480", *ONE_NIC), slow(level), seed=0)) == stages


@pytest.mark.parametrize("duty", [0.001, 0.5, 0.999])
def test_a_flapping_link_has_the_phase_of_its_draw(duty: float) -> None:
    perturbations = Perturbations(flapping_links=(FlappingLink("network", 0, 0.25, 2.0, duty),))
    (phase,) = flapping_phases(perturbations, 5, 0)
    (fault,) = link_faults(prepared("m6t_1t_v100x480"), perturbations, seed=5)
    flaps = fault.flapping
    assert flaps is not None
    for now_s in (0.0, 0.1, 0.7, 1.9, 100.3):
        is_slow = (now_s / 2.0 + phase) % 1.0 < duty
        assert flaps.fraction_before(flaps.next_change(now_s)) == (0.25 if is_slow else 1.0), now_s


def test_a_link_that_is_slow_all_the_time_does_not_flap() -> None:
    perturbations = Perturbations(flapping_links=(FlappingLink("network", 0, 0.25, 2.0, 1.0),))
    (fault,) = link_faults(prepared("m6t_1t_v100x480"), perturbations, seed=0)
    assert (fault.fraction, fault.flapping) == (0.25, None)


def test_two_links_that_flap_on_one_port_are_refused() -> None:
    step = prepared("m6t_1t_v100x480", *ONE_NIC)
    links = tuple(FlappingLink("network", rank, 0.5, 1.0, 0.5) for rank in (0, 1))
    with pytest.raises(ScenarioError, match="two links flap"):
        link_faults(step, Perturbations(flapping_links=links), seed=0)
    apart = tuple(FlappingLink("node", rank, 0.5, 1.0, 0.5) for rank in (0, 1))
    assert len(link_faults(step, Perturbations(flapping_links=apart), seed=0)) == 2
