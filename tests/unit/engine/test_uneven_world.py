"""Speeds of devices and links, late hosts, and the attribution of what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_scenarios import shipped_library

from moesim.cost.collectives import collective_time
from moesim.describe.perturbations import FlappingLink, Perturbations, SlowLink, SlowRank
from moesim.engine.uneven_world import (
    degraded,
    device_factors,
    group_link_cases,
    host_jitter_s,
    link_factors,
    loss_attribution,
    quantiles_s,
    slow_share,
)
from moesim.estimation.loading import load
from moesim.structure.placement import ProcessGroup
from moesim.structure.step_graph import Collective

HARDWARE = load("mixtral_8x7b", library=shipped_library()).system.hardware
FLAPPING = FlappingLink("network", 1, factor=0.25, period_s=2.0, duty=0.3)
SIGMAS = 5.0


def test_devices_are_alike_unless_something_is_said() -> None:
    assert (device_factors(Perturbations(), 8, 1) == 1).all()
    slow = device_factors(Perturbations(slow_ranks=(SlowRank(3, 1.5),)), 8, 1)
    assert slow.tolist() == [1, 1, 1, 1.5, 1, 1, 1, 1]


def test_drawn_speeds_have_the_spread_asked_for_and_median_one() -> None:
    """10,000 devices, deviation 0.1: error 0.001 of the mean logarithm, 0.0007 of its deviation."""
    factors = np.log(device_factors(Perturbations(speed_spread=0.1), 10_000, 4))
    assert factors.mean() == pytest.approx(0, abs=SIGMAS * 0.001)
    assert factors.std() == pytest.approx(0.1, abs=SIGMAS * 0.0007)


@given(
    phase=st.floats(0, 1, exclude_max=True),
    step_s=st.floats(0.01, 50),
    period_s=st.floats(0.1, 10),
    duty=st.floats(0.05, 1),
)
def test_a_flapping_link_is_slow_as_often_as_counting_moments_says(
    phase: float, step_s: float, period_s: float, duty: float
) -> None:
    link = FlappingLink("network", 0, 0.5, period_s, duty)
    moments = (np.arange(20_000) + 0.5) / 20_000 * step_s
    counted = ((moments / period_s + phase) % 1.0 < duty).mean()
    found = slow_share(link, np.array([phase]), step_s)[0]
    edges = 2 * (step_s / period_s + 1)
    assert found == pytest.approx(counted, abs=edges / 20_000 + 1e-9)


def test_over_many_phases_a_flapping_link_is_slow_for_its_duty() -> None:
    phases = (np.arange(1000) + 0.5) / 1000
    assert slow_share(FLAPPING, phases, 0.7).mean() == pytest.approx(0.3, abs=1e-9)


def test_links_keep_the_share_of_their_bandwidth_that_slow_ones_leave() -> None:
    slow = Perturbations(slow_links=(SlowLink("network", 2, 0.5), SlowLink("network", None, 0.8)))
    factors = link_factors(slow, HARDWARE.fabric, 4, steps=range(10), seed=0, step_s=1.0)
    assert factors.shape == (1, 4, 2)
    assert factors[0, :, 0].tolist() == [1, 1, 1, 1]
    assert factors[0, :, 1].tolist() == pytest.approx([0.8, 0.8, 0.4, 0.8])


def test_a_flapping_link_has_a_phase_of_its_own_in_each_draw_whatever_else_is_drawn() -> None:
    flaps = Perturbations(flapping_links=(FLAPPING,))
    many = link_factors(flaps, HARDWARE.fabric, 4, steps=range(50), seed=9, step_s=1.0)
    some = link_factors(flaps, HARDWARE.fabric, 4, steps=range(20, 30), seed=9, step_s=1.0)
    assert np.array_equal(many[20:30], some)
    assert (many[:, [0, 2, 3]] == 1).all()
    on_slow = many[:, 1, 1]
    assert on_slow.min() >= 1 - 0.6 * 0.75 - 1e-12
    assert len(np.unique(on_slow)) > 10


@pytest.mark.parametrize("kind", ["all_to_all", "all_reduce", "all_gather", "reduce_scatter", "point_to_point"])
def test_a_slow_level_slows_what_uses_it_and_large_messages_by_as_much_as_it_is_slow(kind: str) -> None:
    """Half the bandwidth between nodes: 100 MB beside latencies of microseconds take all but twice as long."""
    half = degraded(HARDWARE, [1.0, 0.5])
    size = np.array([8.0 if kind != "point_to_point" else 2.0])
    for stride, ratio in ((8.0, 2.0), (1.0, 1.0)):
        work = Collective(kind, np.array([1e8]), ProcessGroup(size, np.array([stride])))
        before, after = (collective_time(work, one.fabric).modelled_s[0] for one in (HARDWARE, half))
        assert after / before == pytest.approx(ratio, rel=0.1)
        assert after / before <= ratio * (1 + 1e-12)
    latency = Collective(kind, np.array([8.0]), ProcessGroup(size, np.array([8.0])))
    before, after = (collective_time(latency, one.fabric).modelled_s[0] for one in (HARDWARE, half))
    assert after / before < 1.05


def test_nothing_degraded_is_priced_as_before() -> None:
    work = Collective("all_reduce", np.logspace(2, 9, 40), ProcessGroup(np.array([16.0]), np.array([1.0])))
    times = [collective_time(work, one.fabric).modelled_s for one in (HARDWARE, degraded(HARDWARE, [1.0, 1.0]))]
    assert np.array_equal(*times)


def test_a_slow_link_leaves_the_choice_of_protocol_as_it_was() -> None:
    """The library does not know that a link is slow: chunks switch protocol at the bytes they switched at."""
    before, after = HARDWARE.fabric.levels[0], degraded(HARDWARE, [0.25, 1.0]).fabric.levels[0]
    assert np.isfinite(before.switch_s)
    for one, two in ((before.switch_s, after.switch_s), (before.in_switch_s, after.in_switch_s)):
        assert two * after.bandwidth == pytest.approx(one * before.bandwidth)


def test_groups_take_the_least_bandwidth_of_their_members() -> None:
    factors = np.ones((2, 6, 2))
    factors[1, 4, 1], factors[:, 0, 0] = 0.3, 0.9
    cases = group_link_cases(factors, np.array([[0, 1, 2], [3, 4, 5]]))
    assert cases.factors[cases.case].tolist() == [[[0.9, 1], [1, 1]], [[0.9, 1], [1, 0.3]]]
    assert len(cases.factors) == 3


def test_hosts_are_late_by_the_mean_asked_for_and_alike_whatever_else_is_drawn() -> None:
    """20,000 exponential draws of mean 5 us: error 0.035 us."""
    late = Perturbations(host_jitter_s=5e-6)
    many = host_jitter_s(late, (20, 50), steps=range(20), seed=3)
    assert many.shape == (20, 20, 50)
    assert many.mean() == pytest.approx(5e-6, abs=SIGMAS * 0.035e-6)
    assert np.array_equal(many[7:9], host_jitter_s(late, (20, 50), steps=[7, 8], seed=3))


def test_quantiles_are_those_of_ranks_and_ordered() -> None:
    found = quantiles_s(np.arange(101.0)[::-1])
    assert found == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_parts_of_the_mean_step_add_up_to_it() -> None:
    parts = loss_attribution(1.0, 0.2, np.array([1.1, 1.3]), np.array([1.5, 1.9]))
    assert parts.total_s == pytest.approx(1.7, rel=1e-15)
    assert (parts.work_s, parts.bubble_s) == (0.8, 0.2)
    assert parts.imbalance_s == pytest.approx(0.2)
    assert parts.stragglers_s == pytest.approx(0.5)
