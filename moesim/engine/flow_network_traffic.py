"""Traffic on a topology: explicit flows, uniform all-to-all by symmetry, all-to-all-v, plans of collectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moesim.engine.flow_network import Incidence
from moesim.engine.flow_network_classes import Entries, Partition, refined, same_link_classes, summed_incidence
from moesim.engine.flow_network_events import FlowClasses, Observer, Transmission, transmit
from moesim.errors import Problem, ScenarioError
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.communication_plans import CommunicationPlan, Transfers
from moesim.structure.topology import SWITCH, TIERS, Routes, Topology, sums
from moesim.structure.topology_symmetry import Quotient, RankPattern

LinkFractions = Mapping[str, float]
"""Part of the nominal bandwidth that flows reach, per tier of links; 1 where nothing is given."""


MOST_FLOWS = 4_000_000
"""More are not listed one by one: 4 million take about 2 GiB."""


@dataclass(frozen=True)
class Flows:
    """Explicit flows, arrays (n_flows,).

    An end may be ``SWITCH``.
    A flow of no bytes, or from a device to itself, ends when it starts. ``start_s`` counts from the release of the
    flow's batch, and batch b is released when batch ``batch_after[b]`` has ended (-1: at time 0).
    """

    source: IntArray
    target: IntArray
    num_bytes: FloatArray
    start_s: FloatArray
    batch: IntArray
    batch_after: IntArray

    @staticmethod
    def of(
        source: IntArray, target: IntArray, num_bytes: FloatArray | float, start_s: FloatArray | float = 0.0
    ) -> Flows:
        """Flows of one batch."""
        shape = np.broadcast_shapes(np.shape(source), np.shape(target))
        return Flows(
            np.broadcast_to(np.asarray(source, dtype=np.int64), shape),
            np.broadcast_to(np.asarray(target, dtype=np.int64), shape),
            np.broadcast_to(np.asarray(num_bytes, dtype=np.float64), shape),
            np.broadcast_to(np.asarray(start_s, dtype=np.float64), shape),
            np.zeros(shape, np.int64),
            np.array([-1]),
        )

    @staticmethod
    def together(parts: list[Flows]) -> Flows:
        """Flows of several collectives that share the network; batches are renumbered."""
        offsets = np.cumsum([0, *(len(part.batch_after) for part in parts[:-1])])
        after = [
            np.where(part.batch_after < 0, -1, part.batch_after + offset)
            for part, offset in zip(parts, offsets, strict=True)
        ]
        return Flows(
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.target for part in parts]),
            np.concatenate([part.num_bytes for part in parts]),
            np.concatenate([part.start_s for part in parts]),
            np.concatenate([part.batch + offset for part, offset in zip(parts, offsets, strict=True)]),
            np.concatenate(after),
        )


@dataclass(frozen=True)
class LinkUse:
    """Use of links, one entry per class of equal ones.

    ``channel`` stands for ``count`` channels; each carries ``num_bytes``, which fill ``utilisation`` of its bandwidth
    over the whole time.
    """

    channel: IntArray
    count: IntArray
    num_bytes: FloatArray
    utilisation: FloatArray


@dataclass(frozen=True)
class FlowResult:
    """What became of the flows.

    Attributes
    ----------
    finish_s : ndarray of shape (n_flows,)
        When the last byte arrives; of a uniform all-to-all one entry per flow of the sources that stand for all.
    makespan_s : float
        When the last flow ends.
    links : LinkUse
        Bytes and utilisation of the links.
    error_bound : float
        With merged windows: the largest part of the time by which a link's bytes were misallotted; 0 when exact.
    num_flow_classes, num_link_classes, num_events, num_solutions : int
        Size of what was simulated: classes, events, and how often rates were solved for.
    """

    finish_s: FloatArray
    makespan_s: float
    links: LinkUse
    error_bound: float
    num_flow_classes: int
    num_link_classes: int
    num_events: int
    num_solutions: int

    def busiest(self, topology: Topology) -> tuple[str, float]:
        """Name and utilisation of the busiest link; nothing is busy where nothing flows."""
        if not len(self.links.channel):
            return "none", 0.0
        first = int(self.links.utilisation.argmax())
        return topology.channels.name(int(self.links.channel[first])), float(self.links.utilisation[first])


def simulate_flows(
    topology: Topology,
    flows: Flows,
    *,
    merge_within: float = 0.0,
    by_symmetry: bool = True,
    link_fractions: LinkFractions | None = None,
    observer: Observer | None = None,
) -> FlowResult:
    """Finish times of explicit flows that share links max-min fairly.

    Parameters
    ----------
    topology : Topology
        Wires and routes.
    flows : Flows
        Who sends how much to whom, and when.
    merge_within : float
        0 for exact events, else ends within this part of the ideal time are merged: see ``transmit``.
    by_symmetry : bool
        Whether flows that nothing tells apart are simulated once; the answer is the same.
    link_fractions : mapping, optional
        Part of the nominal bandwidth per tier.
    observer : callable, optional
        Sees every interval, with numbers of classes (of flows that carry bytes, with ``by_symmetry=False``).

    Raises
    ------
    ScenarioError
        E-NET-003 for devices that do not exist and negative or infinite bytes.

    Notes
    -----
    With merged windows the links carry a little more or less than they can while they are full: ``error_bound`` is the
    sum of these differences over all windows, without regard to their sign, on the link where it is largest, as a
    part of the makespan. To first order it bounds the error of the makespan (it is no theorem: max-min sharing is not
    monotone in its traffic); a test compares with exact runs.
    """
    _check_flows(topology, flows)
    carries = (flows.num_bytes > 0) & (flows.source != flows.target)
    kept = np.flatnonzero(carries)
    routes = topology.routes(flows.source[kept], flows.target[kept])
    capacity = _capacity(topology, link_fractions)
    latency = routes.latency_s(topology.channels)
    classes, flow_class = _explicit_classes(topology, flows, kept, routes, capacity, by_symmetry=by_symmetry)
    run = transmit(classes, merge_within=merge_within, observer=observer)
    release = _release_s(flows, run)
    finish = release[flows.batch] + flows.start_s
    finish[kept] = run.end_s[flow_class] + latency
    makespan = float(max(finish.max(initial=0.0), run.batch_end_s.max(initial=0.0)))
    carried = sums(routes.channel, routes.share * flows.num_bytes[kept][routes.flow], len(topology.channels))
    used = np.flatnonzero(carried)
    use = _link_use(used, np.ones(len(used), np.int64), carried[used], capacity[used], makespan)
    return _result(finish, makespan, use, classes, run)


def uniform_all_to_all(
    topology: Topology,
    pattern: RankPattern,
    bytes_per_pair: float,
    *,
    link_fractions: LinkFractions | None = None,
) -> FlowResult:
    """All-to-all with the same bytes between all pairs of every group, all groups at once, exact.

    Sources that a symmetry of the fabric maps onto each other are simulated once, and only their flows are ever listed.
    Groups that fit no symmetry of the fabric are simulated flow by flow.

    Parameters
    ----------
    topology : Topology
        Wires and routes; rank = device.
    pattern : RankPattern
        The groups: ``RankPattern(n, n)`` is one group of all n devices.
    bytes_per_pair : float
        Bytes of each pair of different ranks.
    link_fractions : mapping, optional
        Part of the nominal bandwidth per tier.

    Raises
    ------
    ScenarioError
        E-NET-003 for more ranks than devices, negative bytes, and groups that follow no symmetry and are too large.
    """
    if pattern.num_ranks > topology.num_devices:
        message = f"{pattern.num_ranks} ranks on the {topology.num_devices} devices of {topology.name}"
        raise _bad_traffic(message, f"use at most {topology.num_devices}")
    quotient = topology.symmetry.quotient(topology.channels, pattern)
    if quotient is None:
        if pattern.num_ranks * pattern.size > MOST_FLOWS:
            message = f"{pattern.num_ranks} ranks in groups of {pattern.size} follow no level of {topology.name}"
            message += f", and {pattern.num_ranks * pattern.size:,} flows are too many to list"
            raise _bad_traffic(message, "choose groups that fill nodes, leaves or rows, or divide them")
        everyone = np.arange(pattern.num_ranks)
        peers = pattern.peers(everyone)
        flows = Flows.of(np.repeat(everyone, pattern.size), peers.ravel(), bytes_per_pair)
        return simulate_flows(topology, flows, link_fractions=link_fractions)
    source = np.repeat(quotient.source, pattern.size)
    target = pattern.peers(quotient.source).ravel()
    multiplicity = np.repeat(quotient.multiplicity, pattern.size)[source != target]
    flows = Flows.of(source[source != target], target[source != target], bytes_per_pair)
    _check_flows(topology, flows)
    if bytes_per_pair == 0 or not len(flows.source):
        return _idle(len(flows.source))
    return _simulate_quotient(topology, flows, multiplicity, quotient, link_fractions)


def all_to_all_v(
    topology: Topology,
    devices_of_ranks: IntArray,
    bytes_of_pairs: FloatArray,
    *,
    merge_within: float = 0.0,
    link_fractions: LinkFractions | None = None,
) -> FlowResult:
    """All-to-all of one group with any bytes; ``finish_s`` has one entry per pair, row by row.

    Parameters
    ----------
    topology : Topology
        Wires and routes.
    devices_of_ranks : ndarray of shape (n_ranks,)
        Device of each rank.
    bytes_of_pairs : ndarray of shape (n_ranks, n_ranks)
        Bytes from each rank (row) to each rank (column); the diagonal stays at home.
    merge_within : float
        As of ``simulate_flows``.
    link_fractions : mapping, optional
        As of ``simulate_flows``.
    """
    ranks = len(devices_of_ranks)
    if bytes_of_pairs.shape != (ranks, ranks):
        message = f"bytes of {bytes_of_pairs.shape[0]} x {bytes_of_pairs.shape[-1]} pairs for {ranks} ranks"
        raise _bad_traffic(message, "give a square matrix with a row per rank")
    flows = Flows.of(np.repeat(devices_of_ranks, ranks), np.tile(devices_of_ranks, ranks), bytes_of_pairs.ravel())
    return simulate_flows(topology, flows, merge_within=merge_within, link_fractions=link_fractions)


def plan_flows(devices_of_ranks: IntArray, plan: CommunicationPlan) -> Flows:
    """Flows of a plan: a batch per round, released by the round before it in its chain.

    A switch that takes part is the scale-up switch of the device at the transfer's other end.
    """
    rounds: list[Transfers] = []
    after: list[int] = []
    for chain in plan.chains:
        for position, transfers in enumerate(chain):
            after.append(len(rounds) - 1 if position else -1)
            rounds.append(transfers)
    if not rounds:
        return Flows.of(np.zeros(0, np.int64), np.zeros(0, np.int64), 0.0)
    source, target = (np.concatenate(ends) for ends in zip(*((t.source, t.target) for t in rounds), strict=True))
    num_bytes = np.concatenate([transfers.num_bytes for transfers in rounds])
    batch = np.repeat(np.arange(len(rounds)), [len(transfers) for transfers in rounds])
    devices = np.append(np.asarray(devices_of_ranks, dtype=np.int64), np.full(plan.num_switches, SWITCH))
    return Flows(devices[source], devices[target], num_bytes, np.zeros(len(source)), batch, np.array(after))


def execute_plan(
    topology: Topology,
    devices_of_ranks: IntArray,
    plan: CommunicationPlan,
    *,
    link_fractions: LinkFractions | None = None,
) -> float:
    """Seconds of a plan on a network that is otherwise idle.

    Rounds of a chain follow one another when their last byte has arrived everywhere; chains run at the same time. Equal
    rounds of a single chain are simulated once.
    """
    if len(plan.chains) != 1:
        flows = plan_flows(devices_of_ranks, plan)
        return simulate_flows(topology, flows, link_fractions=link_fractions).makespan_s
    times: dict[tuple[bytes, ...], float] = {}
    total = 0.0
    for transfers in plan.chains[0]:
        key = tuple(array.tobytes() for array in (transfers.source, transfers.target, transfers.num_bytes))
        if key not in times:
            alone = CommunicationPlan(plan.num_ranks, ((transfers,),), plan.block_bytes, plan.num_switches)
            flows = plan_flows(devices_of_ranks, alone)
            times[key] = simulate_flows(topology, flows, link_fractions=link_fractions).makespan_s
        total += times[key]
    return total


def _capacity(topology: Topology, fractions: LinkFractions | None) -> FloatArray:
    """Bytes/s of each channel under a stack's fractions."""
    unknown = sorted(set(fractions or {}) - set(TIERS))
    if unknown or any(not 0 < value <= 1 for value in (fractions or {}).values()):
        text = f"link fractions {dict(fractions or {})}"
        raise _bad_traffic(text, f"give numbers above 0 and up to 1 for {', '.join(TIERS)}")
    scale = np.array([(fractions or {}).get(tier, 1.0) for tier in TIERS])
    scaled: FloatArray = topology.channels.bandwidth * scale[topology.channels.tier]
    return scaled


def _explicit_classes(
    topology: Topology, flows: Flows, kept: IntArray, routes: Routes, capacity: FloatArray, *, by_symmetry: bool
) -> tuple[FlowClasses, IntArray]:
    """Classes of the flows that carry bytes; also the class of each of them."""
    latency = routes.latency_s(topology.channels)
    if by_symmetry:
        routes = _deciding(topology, routes)
    channel, link = np.unique(routes.channel, return_inverse=True)
    entries = Entries(routes.num_flows, len(channel), routes.flow, link, routes.share)
    kinds = np.stack([flows.num_bytes[kept], flows.start_s[kept], flows.batch[kept].astype(np.float64)])
    colour: IntArray = np.unique(kinds, axis=1, return_inverse=True)[1]
    partition = Partition(np.arange(entries.num_flows), np.arange(entries.num_links))
    if by_symmetry:
        partition = refined(entries, colour, np.unique(capacity[channel], return_inverse=True)[1])
    first_link = np.unique(partition.link_class, return_index=True)[1]
    stands = np.zeros(entries.num_links, np.bool_)
    stands[first_link] = True
    chosen = stands[link]
    flow_class, num_classes = partition.flow_class, int(partition.flow_class.max(initial=-1)) + 1
    incidence = summed_incidence(
        num_classes,
        len(first_link),
        flow_class[routes.flow[chosen]],
        partition.link_class[link[chosen]],
        routes.share[chosen],
    )
    if by_symmetry:
        first_flow = np.unique(flow_class, return_index=True)[1]
        merged = same_link_classes(incidence, colour[first_flow])
        flow_class, incidence = merged[flow_class], _merged_flows(incidence, merged)
    return _flow_classes(flows, kept, latency, capacity[channel[first_link]], incidence, flow_class), flow_class


def _simulate_quotient(
    topology: Topology, flows: Flows, multiplicity: IntArray, quotient: Quotient, fractions: LinkFractions | None
) -> FlowResult:
    """Flows of the sources that stand for all, on classes of links."""
    routes = topology.routing.routes(flows.source, flows.target)
    capacity = _capacity(topology, fractions)
    load = routes.share * (multiplicity[routes.flow] / quotient.class_size[quotient.channel_class[routes.channel]])
    carried = sums(
        quotient.channel_class[routes.channel], load * flows.num_bytes[routes.flow], len(quotient.class_size)
    )
    deciding = _deciding(topology, routes)
    weight = load[~topology.channels.is_redundant[routes.channel]]
    link_class, link = np.unique(quotient.channel_class[deciding.channel], return_inverse=True)
    incidence = summed_incidence(routes.num_flows, len(link_class), deciding.flow, link, weight)
    flow_class = same_link_classes(incidence, np.zeros(routes.num_flows, np.int64))
    merged = _merged_flows(incidence, flow_class)
    latency = routes.latency_s(topology.channels)
    link_capacity = capacity[quotient.class_channel[link_class]]
    classes = _flow_classes(flows, np.arange(routes.num_flows), latency, link_capacity, merged, flow_class)
    run = transmit(classes)
    finish = run.end_s[flow_class] + latency
    makespan = float(finish.max())
    used = np.flatnonzero(carried)
    channel = quotient.class_channel[used]
    use = _link_use(channel, quotient.class_size[used], carried[used], capacity[channel], makespan)
    return _result(finish, makespan, use, classes, run)


def _deciding(topology: Topology, routes: Routes) -> Routes:
    """Entries of channels that may decide a rate."""
    decides = ~topology.channels.is_redundant[routes.channel]
    return Routes(routes.num_flows, routes.flow[decides], routes.channel[decides], routes.share[decides])


def _merged_flows(incidence: Incidence, flow_class: IntArray) -> Incidence:
    """Incidence of classes of flows: their loads add."""
    number = int(flow_class.max(initial=-1)) + 1
    return summed_incidence(number, incidence.num_links, flow_class[incidence.flow], incidence.link, incidence.weight)


def _flow_classes(
    flows: Flows, kept: IntArray, latency: FloatArray, capacity: FloatArray, incidence: Incidence, flow_class: IntArray
) -> FlowClasses:
    """Bytes, start, batch and longest latency of each class."""
    first = kept[np.unique(flow_class, return_index=True)[1]]
    longest = np.zeros(incidence.num_flows)
    np.maximum.at(longest, flow_class, latency)
    return FlowClasses(
        incidence,
        capacity,
        flows.num_bytes[first],
        flows.start_s[first],
        longest,
        flows.batch[first],
        flows.batch_after,
    )


def _release_s(flows: Flows, run: Transmission) -> FloatArray:
    """When each batch may start."""
    after = flows.batch_after
    return np.where(after < 0, 0.0, run.batch_end_s[np.maximum(after, 0)])


def _link_use(
    channel: IntArray, count: IntArray, num_bytes: FloatArray, capacity: FloatArray, makespan_s: float
) -> LinkUse:
    utilisation = num_bytes / (capacity * makespan_s) if makespan_s > 0 else np.zeros(len(channel))
    return LinkUse(channel, count, num_bytes, utilisation)


def _result(
    finish_s: FloatArray, makespan_s: float, links: LinkUse, classes: FlowClasses, run: Transmission
) -> FlowResult:
    last = float(run.end_s.max(initial=0.0))
    bound = float(run.misallotted_s.max(initial=0.0) / last) if last > 0 else 0.0
    return FlowResult(
        finish_s,
        makespan_s,
        links,
        bound,
        classes.incidence.num_flows,
        classes.incidence.num_links,
        run.num_events,
        run.num_solutions,
    )


def _idle(num_flows: int) -> FlowResult:
    """Nothing is sent."""
    none = np.zeros(0, np.int64)
    return FlowResult(np.zeros(num_flows), 0.0, LinkUse(none, none, np.zeros(0), np.zeros(0)), 0.0, 0, 0, 0, 0)


def _check_flows(topology: Topology, flows: Flows) -> None:
    """Refuse devices that do not exist and bytes that are none."""
    for name, ends in (("source", flows.source), ("target", flows.target)):
        wrong = np.flatnonzero((ends < SWITCH) | (ends >= topology.num_devices))
        if len(wrong):
            message = f"{name} {int(ends[wrong[0]])} is none of the {topology.num_devices} devices of {topology.name}"
            raise _bad_traffic(message, f"devices are 0 to {topology.num_devices - 1}")
    for name, amounts in (("bytes", flows.num_bytes), ("start", flows.start_s)):
        wrong = np.flatnonzero(~(np.isfinite(amounts) & (amounts >= 0)))
        if len(wrong):
            message = f"flow {int(wrong[0])} has {name} {amounts[wrong[0]]:g}"
            raise _bad_traffic(message, "give finite numbers that are not negative")


def _bad_traffic(message: str, remedy: str) -> ScenarioError:
    return ScenarioError([Problem(code="E-NET-003", message=message, remedy=remedy)])
