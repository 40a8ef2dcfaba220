"""What gloo sends when: plans of its collectives, and its all-to-all, in which a late rank makes pairs take turns.

The transport is a rendezvous: bytes leave when the receiver's notice that it waits for them has come, and notices to a
rank stand behind bytes to the same rank in one TCP stream (``gloo/transport/tcp/pair.cc``). An all-to-all posts, for
i = 1 .. n - 1, a send to the rank i places on and a receive from the rank i places back (``gloo/alltoall.cc``). When a
rank arrives late, its peers' notices are there: each of its sends starts at once, and a receive from the same peer that
is posted later is noticed by that peer only after these bytes. So of two ranks, the later one d places after the
earlier, bytes go both ways at once if d < n/2, and else first from the later to the earlier, then back. Equal bytes on
idle links take the time of n - 1 + floor(n/2) messages in any order of arrival; all both ways at once would take n - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.engine.flow_network_traffic import Flows, LinkFractions, plan_flows, simulate_flows
from moesim.structure.columns import FloatArray
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind
from moesim.structure.topology import Topology

PLANS: dict[str, tuple[CollectiveKind, str]] = {
    "all_reduce": ("all_reduce", "ring"),
    "all_gather": ("all_gather", "ring"),
    "reduce_scatter": ("all_reduce", "ring"),
    "point_to_point": ("point_to_point", "send"),
}
"""Kind and algorithm of moesim that each of gloo's collectives is; its reduce-scatter is an all-reduce of everything,
of which each rank keeps its part (torch 2.13: it takes the time of one)."""


PREAMBLE_BYTES = 48.0
"""What stands before each message in the stream; an empty message has it too."""


def exchange_flows(pair_bytes: FloatArray, arrival_s: FloatArray, notice_s: float = 0.0) -> Flows:
    """Flows of one all-to-all.

    Parameters
    ----------
    pair_bytes : ndarray of shape (n, n)
        Bytes from each rank (row) to each rank.
    arrival_s : ndarray of shape (n,)
        When each rank calls; of equal ones the lower rank is the earlier.
    notice_s : float
        How long a notice is on its way: who calls less than that after another finds none, and both send at once.

    Returns
    -------
    Flows
        Two per pair of ranks: all from the later to the earlier, then all back.

    Examples
    --------
    Rank 1 calls after rank 0 and is one place on: of two ranks that is half the way round, so they take turns.

    >>> flows = exchange_flows(np.array([[0.0, 8.0], [6.0, 0.0]]), np.array([0.0, 0.5]))
    >>> flows.source.tolist(), flows.num_bytes.tolist(), flows.batch_after.tolist()
    ([1, 0], [54.0, 56.0], [-1, 0])
    """
    ranks = len(arrival_s)
    first, second = np.triu_indices(ranks, 1)
    swaps = arrival_s[second] < arrival_s[first]
    early, late = np.where(swaps, second, first), np.where(swaps, first, second)
    places = (late - early) % ranks
    takes_turns = (2 * places >= ranks) & (arrival_s[late] - arrival_s[early] >= notice_s)
    start = arrival_s[late]
    pairs = np.arange(len(early))
    second_batch = np.where(takes_turns, len(pairs) + np.cumsum(takes_turns) - 1, pairs)
    return Flows(
        np.concatenate([late, early]),
        np.concatenate([early, late]),
        np.concatenate([pair_bytes[late, early], pair_bytes[early, late]]) + PREAMBLE_BYTES,
        np.concatenate([start, np.where(takes_turns, 0.0, start)]),
        np.concatenate([pairs, second_batch]),
        np.concatenate([np.full(len(pairs), -1), pairs[takes_turns]]),
    )


def exchange_times(
    topology: Topology,
    exchanges: Sequence[FloatArray],
    arrivals_s: Sequence[FloatArray],
    link_fractions: LinkFractions,
    *,
    notice_s: float = 0.0,
) -> FloatArray:
    """Run all-to-alls on the wires of a cluster, of which one may begin while another is not through everywhere.

    Parameters
    ----------
    topology : Topology
        Wires; rank = device.
    exchanges : sequence of ndarray of shape (n, n)
        Bytes of each pair, per exchange.
    arrivals_s : sequence of ndarray of shape (n,)
        When each rank calls, per exchange.
    link_fractions : mapping
        Part of the bandwidth that TCP's payload reaches, per tier.
    notice_s : float
        As of ``exchange_flows``.

    Returns
    -------
    ndarray of shape (n_exchanges, n)
        When each rank is through: its last byte has left and the last has come, not before it called.
    """
    parts = [exchange_flows(*one, notice_s) for one in zip(exchanges, arrivals_s, strict=True)]
    finish = simulate_flows(topology, Flows.together(parts), link_fractions=link_fractions).finish_s
    through = np.array(arrivals_s, dtype=np.float64)
    for rank_s, flows, ends_s in zip(through, parts, finish.reshape(len(parts), -1), strict=True):
        np.maximum.at(rank_s, flows.source, ends_s)
        np.maximum.at(rank_s, flows.target, ends_s)
    return through


def plan_wire_s(topology: Topology, kind: str, num_bytes: float, link_fractions: LinkFractions) -> float:
    """Seconds of the bytes of a collective that is a plan of rounds.

    gloo knows one group and no levels, so the plan is that of a flat group; what it meets on the wires is the engine's.
    """
    ranks = topology.num_devices
    planned, algorithm = PLANS[kind]
    if kind == "point_to_point":
        source = np.arange(0, ranks - 1, 2)
        flows = Flows.of(source, source + 1, num_bytes)
    else:
        plan = algorithms_of(planned)[algorithm].plan(planned, num_bytes, GroupLayout.switched(ranks))
        flows = plan_flows(np.arange(ranks), plan)
    return simulate_flows(topology, flows, link_fractions=link_fractions).makespan_s
