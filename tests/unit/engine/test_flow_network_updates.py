"""Rates from a guess are those from scratch, whatever the guess."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.engine.flow_network import Allocation, Incidence, max_min_allocation, max_min_certificate
from moesim.engine.flow_network_classes import Entries, refined
from moesim.engine.flow_network_updates import updated_allocation


def random_network(seed: int, *, num_flows: int = 40, num_links: int = 15) -> tuple[Incidence, np.ndarray]:
    """Each flow on one to four links."""
    generator = np.random.default_rng(seed)
    crosses = generator.random((num_flows, num_links)) < 0.15
    crosses[np.arange(num_flows), generator.integers(0, num_links, num_flows)] = True
    flow, link = np.nonzero(crosses)
    capacity = generator.choice([1.0, 2.0, 7.0], num_links) * generator.uniform(0.9, 1.1, num_links)
    return Incidence(num_flows, num_links, flow, link, generator.choice([0.5, 1.0, 2.0], len(flow))), capacity


@given(st.integers(0, 2**32), st.sampled_from(["before", "any", "none"]))
def test_rates_do_not_depend_on_the_guess(seed, kind):
    incidence, capacity = random_network(seed)
    generator = np.random.default_rng(seed + 1)
    before = max_min_allocation(incidence, capacity)
    is_left = generator.random(incidence.num_flows) < 0.8
    left = incidence.only(is_left)
    guess = Allocation(before.rate[is_left], before.bottleneck[is_left])
    if kind == "any":  # any link that the flow crosses, and any rate
        picks = np.minimum(
            generator.integers(0, 4, left.num_flows), np.diff(np.append(left.starts, len(left.flow))) - 1
        )
        guess = Allocation(generator.uniform(0, 9, left.num_flows), left.link[left.starts + picks])
    if kind == "none":
        guess = Allocation(guess.rate, np.full(left.num_flows, -1))
    found = updated_allocation(left, capacity, guess)
    np.testing.assert_allclose(found.rate, max_min_allocation(left, capacity).rate, rtol=1e-9)
    assert max_min_certificate(left, capacity, found.rate).slack < 1e-10


@given(st.integers(0, 2**32))
def test_the_link_that_holds_a_flow_is_full_and_none_is_faster_on_it(seed):
    incidence, capacity = random_network(seed)
    allocation = max_min_allocation(incidence, capacity)
    certificate = max_min_certificate(incidence, capacity, allocation.rate)
    for bottleneck in (allocation.bottleneck, certificate.bottleneck):
        assert incidence.load(allocation.rate)[bottleneck] == pytest.approx(capacity[bottleneck])
        fastest = np.zeros(incidence.num_links)
        np.maximum.at(fastest, incidence.link, allocation.rate[incidence.flow])
        assert allocation.rate == pytest.approx(fastest[bottleneck])


def test_links_of_some_flows_are_found_without_looking_at_the_others():
    incidence, _ = random_network(3)
    chosen = np.array([4, 7, 30])
    expected = [link for flow, link in zip(incidence.flow, incidence.link, strict=True) if flow in chosen]
    assert incidence.links_of(chosen).tolist() == expected


def test_flows_are_told_apart_only_by_what_they_meet():
    """Two flows share a wide link; one of them also crosses a narrow one, the third a link of its own."""
    entries = Entries(3, 3, np.array([0, 0, 1, 2]), np.array([0, 1, 0, 2]), np.ones(4))
    same, equal_links = np.zeros(3, np.int64), np.zeros(3, np.int64)
    assert len(set(refined(entries, same, equal_links).flow_class.tolist())) == 3
    pair = Entries(4, 2, np.arange(4), np.array([0, 0, 1, 1]), np.ones(4))
    assert refined(pair, np.zeros(4, np.int64), np.zeros(2, np.int64)).flow_class.tolist() == [0, 0, 0, 0]
    assert len(set(refined(pair, np.array([0, 1, 0, 1]), np.zeros(2, np.int64)).flow_class.tolist())) == 2
    uneven = Entries(3, 2, np.arange(3), np.array([0, 0, 1]), np.ones(3))
    assert len(set(refined(uneven, np.zeros(3, np.int64), np.zeros(2, np.int64)).flow_class.tolist())) == 2
