"""How long a collective keeps a device's share of each level of links busy, within the time that the library takes.

``collective_time`` gives one number; where collectives meet on the wires, it matters which part of it is wire. The
algorithm and protocol whose time is the library's say that: their wire time per level at the fraction of bandwidth they
reach. All that is left is latency, which occupies nothing: a step's start-up, and gaps between chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import CollectiveDemand, GroupTraffic
from moesim.cost.collectives import collective_time
from moesim.cost.communication_libraries import FabricRates, Protocol, level_wires_s, transfer
from moesim.structure.columns import FloatArray
from moesim.structure.placement import group_extents
from moesim.structure.step_graph import Collective, CollectiveKind


@dataclass(frozen=True)
class LinkOccupancy:
    """What a collective does to its members' links.

    Attributes
    ----------
    time_s : ndarray of shape (n_cases,)
        Time the library takes on idle links.
    wire_s : ndarray of shape (n_cases,)
        Part of it in which the links are occupied.
    level_s : ndarray of shape (n_levels, n_cases)
        Time a device's share of each level is busy, innermost first; at most ``wire_s``.
    flows : ndarray of shape (n_cases,)
        Peers that a rank sends to at once on its busiest level.
    """

    time_s: FloatArray
    wire_s: FloatArray
    level_s: FloatArray
    flows: FloatArray

    @property
    def latency_s(self) -> FloatArray:
        """The rest of the time, (n_cases,)."""
        return np.asarray(self.time_s - self.wire_s)


def link_occupancy(work: Collective, fabric: FabricRates) -> LinkOccupancy:
    """Occupation of the links by collectives of equal groups.

    Parameters
    ----------
    work : Collective
        Cases with (n_cases,) bytes.
    fabric : FabricRates
        Levels of links under the library.

    Returns
    -------
    LinkOccupancy
        Its ``time_s`` is that of ``collective_time``.

    Examples
    --------
    A node alone with 400 GB/s of 500, 10 us to start, a message of 4 MB: 20 us, half of them wire.

    >>> from moesim.cost.communication_libraries import LevelRates
    >>> from moesim.structure.placement import ProcessGroup
    >>> sends = Protocol(10e-6, 0.0, 0.0, 0.0, 0.8, 0.0)
    >>> node = LevelRates("node", 8, 500e9, False, False, False, 0.0, sends, sends, sends)
    >>> pair = ProcessGroup(np.array([2.0]), np.array([1.0]))
    >>> message = Collective("point_to_point", np.array([4e6]), pair)
    >>> occupancy = link_occupancy(message, FabricRates((node,), 1))
    >>> [round(float(part[0]) * 1e6, 6) for part in (occupancy.time_s, occupancy.wire_s, occupancy.level_s[0])]
    [20.0, 10.0, 10.0]
    """
    time_s = collective_time(work, fabric).modelled_s
    extents = group_extents(work.group, fabric.sizes)
    extents = np.broadcast_to(extents, (len(extents), *time_s.shape))
    num_bytes = np.broadcast_to(work.num_bytes, time_s.shape)
    contention = fabric.contention(work.kind, work.group) if fabric.contention is not None else 1.0
    traffic = GroupTraffic(num_bytes, extents, work.copies, contention)
    nearest = np.full(time_s.shape, np.inf)
    wire_s, level_s = np.zeros(time_s.shape), np.zeros(extents.shape)
    flows = np.ones(time_s.shape)
    for demand, protocols in _candidates(work.kind, traffic, fabric):
        taken = transfer(demand, protocols, traffic, fabric)
        levels = np.stack(np.broadcast_arrays(*level_wires_s(demand, protocols, traffic, fabric)))
        distance = np.abs(taken.time_s - time_s)
        is_nearer = distance < nearest
        nearest = np.where(is_nearer, distance, nearest)
        wire_s, level_s = np.where(is_nearer, taken.wire_s, wire_s), np.where(is_nearer, levels, level_s)
        peers = np.stack([np.broadcast_to(level.peers, time_s.shape) for level in demand.levels])
        busiest = np.take_along_axis(peers, levels.argmax(axis=0)[None], axis=0)[0]
        flows = np.where(is_nearer, np.maximum(busiest, 1.0), flows)
    wire_s = np.minimum(wire_s, time_s)
    return LinkOccupancy(time_s, wire_s, np.minimum(level_s, wire_s), flows)


def _candidates(
    kind: CollectiveKind, traffic: GroupTraffic, fabric: FabricRates
) -> Iterator[tuple[CollectiveDemand, Sequence[Protocol]]]:
    """Algorithms with protocols that the library may have taken, the long messages' first."""
    algorithms, levels = algorithms_of(kind), fabric.levels
    names: tuple[str, ...] = ("ring",)
    match kind:
        case "all_to_all":
            bulk, quick = [level.exchange for level in levels], [level.quick_exchange for level in levels]
            names = (fabric.exchange_algorithm,)
        case "point_to_point":
            bulk, quick, names = [level.message for level in levels], [None], ("send",)
        case "broadcast":
            bulk, quick, names = [level.reduction for level in levels], [None], ("binomial_tree",)
        case _:
            bulk, quick = [level.reduction for level in levels], [level.quick_reduction for level in levels]
            if any(level.is_ring for level in levels):
                names = ("hierarchical_ring",)
            elif kind == "all_reduce":
                names = ("ring", "tree")
    demands = [algorithms[name].demand(kind, traffic, fabric) for name in names]
    yield from ((demand, bulk) for demand in demands)
    if kind == "all_reduce" and levels[0].in_switch is not None:
        yield algorithms["nvls"].demand(kind, traffic, fabric), [levels[0].in_switch, *bulk[1:]]
    if any(protocol is not None for protocol in quick):
        protocols = [protocol or slow for protocol, slow in zip(quick, bulk, strict=True)]
        yield from ((demand, protocols) for demand in demands)
