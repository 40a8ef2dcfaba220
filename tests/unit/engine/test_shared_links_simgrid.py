"""Collectives as transfers on ports end when their flows end on the wires: in our flow engine and in SimGrid."""

from __future__ import annotations

import numpy as np
import pytest
from shared_link_cases import CASES, flows_of, last_end_s, shared_ends_s, topology
from simgrid_oracle import missing_reason, simgrid_run

from moesim.engine.flow_network_traffic import simulate_flows

TOLERANCE = 1e-3
"""That of the other comparisons with SimGrid."""


@pytest.mark.parametrize("name", CASES)
def test_collectives_end_with_their_flows(name):
    wires = topology()
    flows, owner = flows_of(CASES[name])
    latency_s = wires.routing.routes(flows.source, flows.target).latency_s(wires.channels)
    ends_s = last_end_s(simulate_flows(wires, flows).finish_s - latency_s, owner)
    np.testing.assert_allclose(shared_ends_s(CASES[name]), ends_s, rtol=1e-6)


@pytest.mark.skipif(bool(missing_reason()), reason=missing_reason() or "SimGrid is there")
@pytest.mark.parametrize("name", CASES)
def test_simgrid_ends_the_collectives_at_the_same_time(name):
    flows, owner = flows_of(CASES[name])
    ends_s = last_end_s(simgrid_run(topology(), flows).finish_s, owner)
    np.testing.assert_allclose(shared_ends_s(CASES[name]), ends_s, rtol=TOLERANCE)


def test_contention_is_what_is_compared():
    """Alone, an all-to-all of 2.4 GB over 24 ranks needs 40 ms for the 2 GB that leave a node; two need twice that."""
    assert shared_ends_s(CASES["two all-to-alls at once"][:1]) == pytest.approx([0.04])
    assert shared_ends_s(CASES["two all-to-alls at once"]) == pytest.approx([0.08, 0.08])
