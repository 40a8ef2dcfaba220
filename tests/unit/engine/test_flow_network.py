"""Max-min rates: their certificate on random networks, and small cases by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.engine.flow_network import Incidence, bottleneck_slack, max_min_rates
from moesim.engine.flow_network_classes import summed_incidence


@st.composite
def networks(draw):
    """Random flows on random links: shares, capacities over three decades, ties on purpose."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_flows, num_links = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    entries = draw(st.integers(0, 120))
    flow = np.concatenate([np.arange(num_flows), generator.integers(0, num_flows, entries)])
    link = generator.integers(0, num_links, len(flow))
    weight = generator.choice([0.25, 1 / 3, 0.5, 1.0, 1.0, 1.0, 3.0], len(flow))
    capacity = generator.choice([1.0, 1.0, 2.0, 10.0, 1000.0], num_links) * generator.choice([1.0, 1.1])
    return summed_incidence(num_flows, num_links, flow, link, weight), capacity


def global_water_filling(incidence: Incidence, capacity: np.ndarray) -> np.ndarray:
    """The textbook: raise all rates together, one saturated link at a time."""
    rate, is_free = np.zeros(incidence.num_flows), np.ones(incidence.num_flows, bool)
    weight = np.zeros((incidence.num_links, incidence.num_flows))
    weight[incidence.link, incidence.flow] = incidence.weight
    while is_free.any():
        demand = weight[:, is_free].sum(axis=1)
        room = capacity - weight[:, ~is_free] @ rate[~is_free]
        level = np.where(demand > 0, room / np.where(demand > 0, demand, 1.0), np.inf)
        rate[is_free] = level.min()
        full = level <= level.min() * (1 + 1e-12)
        is_free &= ~(weight[full] > 0).any(axis=0)
    return rate


@given(networks())
def test_every_flow_crosses_a_full_link_on_which_none_is_faster(network):
    incidence, capacity = network
    assert bottleneck_slack(incidence, capacity, max_min_rates(incidence, capacity)) < 1e-10


@given(networks())
def test_rates_are_those_of_filling_one_link_at_a_time(network):
    incidence, capacity = network
    rates = max_min_rates(incidence, capacity)
    np.testing.assert_allclose(rates, global_water_filling(incidence, capacity), rtol=1e-9)


@given(networks(), st.floats(0.5, 0.99))
def test_the_certificate_refuses_rates_that_waste_or_overload(network, factor):
    incidence, capacity = network
    rates = max_min_rates(incidence, capacity)
    assert bottleneck_slack(incidence, capacity, rates * factor) > 0.009
    assert bottleneck_slack(incidence, capacity, rates / factor) > 0.009


def test_the_certificate_refuses_an_unfair_split_of_a_full_link():
    incidence = Incidence(2, 1, np.array([0, 1]), np.array([0, 0]), np.ones(2))
    assert bottleneck_slack(incidence, np.array([10.0]), np.array([4.0, 6.0])) == pytest.approx(1 / 3)


def test_three_flows_on_a_line_of_two_links():
    """Bertsekas and Gallager: the long flow shares the narrow link, and the wide link's own flow takes the rest."""
    incidence = Incidence(3, 2, np.array([0, 0, 1, 2]), np.array([0, 1, 0, 1]), np.ones(4))
    assert max_min_rates(incidence, np.array([1.0, 3.0])).tolist() == [0.5, 0.5, 2.5]
