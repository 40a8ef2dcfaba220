"""What a communication library makes of an ideal demand: the only place where latency and wire time meet.

    time = L + t + c sqrt(L t)

L is the latency: once per collective, per round, per partner and per doubling of domains, level by level. t is the wire
time at the fraction of the nominal bandwidth that long messages reach, with the rank's copy to itself. The root is the
classical cost of a transfer cut into the best number of chunks: of m chunks each costs L/m' and the last one is not
overlapped, which is least at m ~ sqrt(t/L). It replaces a half-bandwidth size: that is t = 2.5 L for c = 0.95.

A library moves small messages by a quick protocol (NCCL's LL and LL128: low latency, part of the bandwidth) and long
ones by a bulk protocol (Simple). Rings and trees switch where a chunk, bytes / ranks, takes longer than a fixed time on
the innermost link, because a step of the bulk protocol costs that much more; time then rises by a jump, as measured.
Send and receive take the faster of the two.

Stops being true where a library mispredicts and takes a slow algorithm, and where host or network are congested.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import CollectiveDemand, Fabric, FabricLevel, GroupTraffic, wire_time_s
from moesim.structure.columns import FloatArray
from moesim.structure.placement import ProcessGroup
from moesim.structure.step_graph import CollectiveKind

Constant = float | FloatArray
"""A constant of a library; an array (n_cases,) where every case has its own, as in a fit."""


@dataclass(frozen=True)
class Protocol:
    """How a library moves bytes over one level of links.

    Attributes
    ----------
    base_s : float
        Once per collective that enters the level; that of the innermost level always.
    round_s : float
        Per round that crosses the level.
    peer_s : float
        Per partner of a direct exchange.
    doubling_s : float
        Per doubling of the domains that the level joins.
    fraction : float
        Of the nominal bandwidth, for long messages.
    pipelining : float
        c; that of the outermost level a group spans counts.
    """

    base_s: Constant
    round_s: Constant
    peer_s: Constant
    doubling_s: Constant
    fraction: Constant
    pipelining: Constant


@dataclass(frozen=True)
class LevelRates(FabricLevel):
    """One level of the fabric under one library.

    Protocols of reductions and gathers, of the reduction in the level's switch, and of direct exchanges; None where the
    library has no second one. ``switch_s``, ``in_switch_s``: chunk and buffer time on the link beyond which bulk
    protocols serve.
    """

    reduction: Protocol
    exchange: Protocol
    message: Protocol
    quick_reduction: Protocol | None = None
    quick_exchange: Protocol | None = None
    in_switch: Protocol | None = None
    switch_s: Constant = np.inf
    in_switch_s: Constant = np.inf


@dataclass(frozen=True)
class FabricRates(Fabric):
    """Levels of a fabric under one stack, innermost first.

    ``own_copy``: link time of a byte that a rank moves to itself, in bytes, in reductions and gathers, and
    ``exchange_own_copy`` in exchanges; ``exchange_algorithm`` of all-to-alls; ``levels_exponent`` p combines the wire
    times of an exchange's levels, (sum t^p)^(1/p): infinite where they run beside each other. ``contention`` of the
    real wires by kind and group, where flows are to be simulated.
    """

    levels: tuple[LevelRates, ...]
    devices_per_chip: int
    own_copy: Constant = 0.0
    exchange_own_copy: Constant = 0.0
    exchange_algorithm: str = "direct"
    levels_exponent: float = np.inf
    contention: Callable[[CollectiveKind, ProcessGroup], FloatArray] | None = None

    @cached_property
    def known_times(self) -> dict[Hashable, CollectiveTime]:
        """Times of small tables of cases that were priced before, by kind, bytes, groups and copies.

        A step repeats its collectives: 13 of 34 of M6-T's are different, 14 of 55 of DeepSeek-V3's; without this one
        estimate takes a third longer.
        """
        return {}


@dataclass(frozen=True)
class Transfer:
    """Latency and wire time of one algorithm under one protocol, and its c; arrays (n_cases,)."""

    latency_s: FloatArray
    wire_s: FloatArray
    pipelining: FloatArray

    @property
    def time_s(self) -> FloatArray:
        """Seconds, (n_cases,)."""
        return transfer_time_s(self.latency_s, self.wire_s, self.pipelining)

    def shortened(self, share: FloatArray) -> Transfer:
        """The same with a share of the bytes."""
        return Transfer(self.latency_s, self.wire_s * share, self.pipelining)


def transfer_time_s(latency_s: FloatArray, wire_s: FloatArray, pipelining: FloatArray) -> FloatArray:
    """Time of a transfer cut into the best number of chunks: L + t + c sqrt(L t).

    Parameters
    ----------
    latency_s, wire_s, pipelining : ndarray of shape (n_cases,)
        L and t, whether t comes from a closed form or from flows on a network; and c.

    Returns
    -------
    ndarray of shape (n_cases,)
        Seconds.

    Examples
    --------
    >>> round(float(transfer_time_s(np.array(9e-6), np.array(16e-6), np.array(1.0))) * 1e6, 6)
    37.0
    """
    return np.asarray(latency_s + wire_s + pipelining * np.sqrt(latency_s * wire_s))


def transfer(
    demand: CollectiveDemand, protocols: Sequence[Protocol], traffic: GroupTraffic, fabric: FabricRates
) -> Transfer:
    """Latency and wire time of a demand, one protocol per level.

    Parameters
    ----------
    demand : CollectiveDemand
        What the algorithm asks of each level.
    protocols : sequence of Protocol
        One per level, innermost first.
    traffic : GroupTraffic
        The cases.
    fabric : FabricRates
        Nominal bandwidths, the rank's own copy and how levels combine.

    Returns
    -------
    Transfer
        Arrays of shape (n_cases,).
    """
    is_exchange, is_one_message = demand.algorithm == fabric.exchange_algorithm, demand.levels_combine == "slowest"
    pipelining: Constant = 0.0
    latencies, wires = [], level_wires_s(demand, protocols, traffic, fabric)
    for index, (asks, protocol) in enumerate(zip(demand.levels, protocols, strict=True)):
        level, extent = fabric.levels[index], traffic.extents[index]
        enters = extent > 1
        starts = index == 0 and not level.is_ring and not is_one_message
        latency = protocol.base_s if starts else enters * protocol.base_s
        for constant, amount in ((protocol.round_s, asks.rounds), (protocol.peer_s, asks.peers)):
            latency = latency if _is_zero(constant) else latency + constant * amount
        if not _is_zero(protocol.doubling_s):
            latency = latency + np.log2(extent) * protocol.doubling_s
        latencies.append(latency)
        if index == 0 or not _is_zero(protocol.pipelining):
            pipelining = np.where(enters, protocol.pipelining, pipelining)
        else:
            pipelining = pipelining * ~enters
    if is_one_message:
        slowest = np.argmax([one + wire for one, wire in zip(latencies, wires, strict=True)], axis=0)
        chosen = [np.choose(slowest, [np.broadcast_to(one, slowest.shape) for one in of]) for of in (latencies, wires)]
        return Transfer(chosen[0], chosen[1], np.asarray(pipelining))
    latency_s, exponent = np.asarray(sum(latencies)), fabric.levels_exponent if is_exchange else np.inf
    if demand.levels_combine == "serial":
        exponent = 1.0
    if np.isinf(exponent):
        return Transfer(latency_s, np.asarray(reduce(np.maximum, wires)), np.asarray(pipelining))
    total_s = np.asarray((np.stack(wires) ** exponent).sum(axis=0) ** (1.0 / exponent))
    return Transfer(latency_s, total_s, np.asarray(pipelining))


def level_wires_s(
    demand: CollectiveDemand, protocols: Sequence[Protocol], traffic: GroupTraffic, fabric: FabricRates
) -> list[FloatArray]:
    """How long each level's share of a device is busy with a demand, at the protocols' fractions of its bandwidth.

    Parameters
    ----------
    demand : CollectiveDemand
        What the algorithm asks of each level.
    protocols : sequence of Protocol
        One per level, innermost first.
    traffic : GroupTraffic
        The cases.
    fabric : FabricRates
        Nominal bandwidths and the rank's own copy, which the innermost level's link time counts.

    Returns
    -------
    list of ndarray of shape (n_cases,)
        Seconds, innermost level first.
    """
    is_exchange = demand.algorithm == fabric.exchange_algorithm
    own_copy = fabric.exchange_own_copy if is_exchange else fabric.own_copy
    wires = []
    for index, (asks, level, protocol) in enumerate(zip(demand.levels, fabric.levels, protocols, strict=True)):
        carried = asks.wire_bytes * traffic.contention
        if index == 0 and not _is_zero(own_copy):
            carried = carried + own_copy * demand.own_bytes
        wires.append(carried / (level.bandwidth * protocol.fraction))
    return wires


def _is_zero(constant: Constant) -> bool:
    """Whether a constant is the number zero, so that what it multiplies need not be worked out."""
    return isinstance(constant, float) and constant == 0.0


@dataclass(frozen=True)
class CollectiveTime:
    """Seconds, arrays (n_cases,): modelled time, and wire time at nominal bandwidth without latency."""

    modelled_s: FloatArray
    ideal_s: FloatArray


def library_times(kind: CollectiveKind, traffic: GroupTraffic, fabric: FabricRates) -> CollectiveTime:
    """Time the library takes for collectives of equal groups that all run at once.

    Parameters
    ----------
    kind : str
        Kind of the collectives.
    traffic : GroupTraffic
        Bytes and extents of the cases.
    fabric : FabricRates
        Levels of links under the library.

    Returns
    -------
    CollectiveTime
        Modelled seconds; ideal ones are the least wire time of the algorithms that the library chooses from.
    """
    match kind:
        case "all_to_all":
            return _exchange_times(traffic, fabric)
        case "all_reduce" | "all_gather" | "reduce_scatter":
            if not any(level.is_ring for level in fabric.levels):
                return _reduction_times(kind, traffic, fabric)
            return _times_of("hierarchical_ring", kind, traffic, fabric)
        case "broadcast":
            return _times_of("binomial_tree", kind, traffic, fabric)
        case "point_to_point":
            return _times_of("send", kind, traffic, fabric)


def _times_of(name: str, kind: CollectiveKind, traffic: GroupTraffic, fabric: FabricRates) -> CollectiveTime:
    """The one algorithm there is, by the bulk protocol."""
    demand = algorithms_of(kind)[name].demand(kind, traffic, fabric)
    protocols = [level.message if kind == "point_to_point" else level.reduction for level in fabric.levels]
    return CollectiveTime(transfer(demand, protocols, traffic, fabric).time_s, _nominal_s(demand, fabric))


def _nominal_s(demand: CollectiveDemand, fabric: FabricRates) -> FloatArray:
    return wire_time_s(demand, [level.bandwidth for level in fabric.levels])


def _exchange_times(traffic: GroupTraffic, fabric: FabricRates) -> CollectiveTime:
    """All-to-all: the faster protocol."""
    demand = algorithms_of("all_to_all")[fabric.exchange_algorithm].demand("all_to_all", traffic, fabric)
    modelled_s = transfer(demand, [level.exchange for level in fabric.levels], traffic, fabric).time_s
    if any(level.quick_exchange is not None for level in fabric.levels):
        protocols = [level.quick_exchange or level.exchange for level in fabric.levels]
        modelled_s = np.minimum(modelled_s, transfer(demand, protocols, traffic, fabric).time_s)
    return CollectiveTime(modelled_s, _nominal_s(demand, fabric))


def _reduction_times(kind: CollectiveKind, traffic: GroupTraffic, fabric: FabricRates) -> CollectiveTime:
    """All-reduce, all-gather and reduce-scatter on switched levels, by the algorithm and protocol the library takes.

    Ring, and for an all-reduce of several domains the tree where it is faster; the switch's own reduction where its
    wire time is least. Quick while chunks are short. The longer message never takes less: a bulk time below that of the
    last quick message is raised to it.
    """
    algorithms, node = algorithms_of(kind), fabric.levels[0]
    bulk_protocols = [level.reduction for level in fabric.levels]
    demands = [algorithms["ring"].demand(kind, traffic, fabric)]
    if kind == "all_reduce" and (traffic.extents[1:] > 1).any():
        demands.append(algorithms["tree"].demand(kind, traffic, fabric))
    bulk = [transfer(demand, bulk_protocols, traffic, fabric) for demand in demands]
    bulk_s = _least([one.time_s for one in bulk], traffic)
    ideal_s = _least([_nominal_s(demand, fabric) for demand in demands], traffic)
    chunk = traffic.num_bytes / (traffic.ranks * (node.bandwidth * node.switch_s))
    if kind == "all_reduce" and node.in_switch is not None:
        demand = algorithms["nvls"].demand(kind, traffic, fabric)
        switched = transfer(demand, [node.in_switch, *bulk_protocols[1:]], traffic, fabric)
        is_large = traffic.extents[0] > SMALLEST_IN_SWITCH
        reduces = is_large & (switched.wire_s < _least([one.wire_s for one in bulk], traffic))
        bulk_s = np.where(reduces, switched.time_s, bulk_s)
        ideal_s = np.where(is_large, np.minimum(ideal_s, _nominal_s(demand, fabric)), ideal_s)
        is_one_domain = traffic.extents[0] >= traffic.ranks
        chunk = np.where(reduces & is_one_domain, traffic.num_bytes / (node.bandwidth * node.in_switch_s), chunk)
    if node.quick_reduction is None:
        return CollectiveTime(bulk_s, ideal_s)
    protocols = [level.quick_reduction or level.reduction for level in fabric.levels]
    share = 1.0 / np.maximum(chunk, 1.0)
    quick = [transfer(demand, protocols, traffic, fabric).shortened(share).time_s for demand in demands]
    quick_s = _least(quick, traffic)
    return CollectiveTime(np.where(chunk > 1.0, np.maximum(bulk_s, quick_s), quick_s), ideal_s)


SMALLEST_IN_SWITCH = 4
"""With this many devices in a domain or fewer the switch gains nothing: 1.29 times at 8, 1.00 at 4 (H200, measured)."""


def _least(values: Sequence[FloatArray], traffic: GroupTraffic) -> FloatArray:
    """Least of ring and, where there are several domains, tree: inside one NCCL takes rings."""
    if len(values) == 1:
        return values[0]
    return np.where((traffic.extents[1:] > 1).any(axis=0), np.minimum(values[0], values[1]), values[0])
