"""Collectives that meet on NICs, twice: as transfers on ports of ranks, and as flows on the wires of a topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from network_cases import fabric

from moesim.cost.communication_libraries import FabricRates, LevelRates, Protocol
from moesim.cost.link_occupancy import link_occupancy
from moesim.engine.event_kernel import EventKernel
from moesim.engine.flow_network_traffic import Flows
from moesim.engine.shared_links import LinkTransfer, SharedLinks
from moesim.structure.placement import ProcessGroup
from moesim.structure.step_graph import Collective
from moesim.structure.topology import Topology

NODE, NODES = 4, 6
FULL_RATE = Protocol(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Running(NamedTuple):
    """A collective of one group: kind and bytes as in ``Collective``; ranks as size, stride and first; a start."""

    kind: str
    num_bytes: float
    size: int
    stride: int
    first: int = 0
    start_s: float = 0.0

    @property
    def ranks(self) -> np.ndarray:
        return self.first + self.stride * np.arange(self.size)

    @property
    def group(self) -> ProcessGroup:
        return ProcessGroup(np.array([float(self.size)]), np.array([float(self.stride)]))


def topology() -> Topology:
    """Six nodes of four GPUs on rails, 450 GB/s inside and 50 GB/s between them."""
    return fabric("rails")


def rates() -> FabricRates:
    """The same without latencies, under a library that loses nothing."""
    levels = [("node", NODE, 450e9), ("network", NODES, 50e9)]
    return FabricRates(
        tuple(
            LevelRates(name, size, rate, False, False, False, 0.0, FULL_RATE, FULL_RATE, FULL_RATE)
            for name, size, rate in levels
        ),
        1,
    )


def everywhere(kind: str, num_bytes: float, size: int, stride: int, start_s: float = 0.0) -> list[Running]:
    """One such group for every rank."""
    firsts = [rank for rank in range(NODE * NODES) if rank // stride % size == 0]
    return [Running(kind, num_bytes, size, stride, first, start_s) for first in firsts]


CASES: dict[str, list[Running]] = {
    "two all-to-alls at once": everywhere("all_to_all", 2.4e9, 24, 1) + everywhere("all_to_all", 2.4e9, 24, 1),
    "a small all-to-all joins a large one": everywhere("all_to_all", 4.8e9, 24, 1)
    + everywhere("all_to_all", 1.2e9, 8, 1, start_s=0.01),
    "all-to-all beside a gradient all-reduce": everywhere("all_to_all", 2.4e9, 24, 1)
    + everywhere("all_reduce", 3e9, 6, 4, start_s=0.005),
    "all-to-all in half of the nodes, all-reduce over all": [
        Running("all_to_all", 2.4e9, 12, 1),
        *everywhere("all_reduce", 3e9, 6, 4),
    ],
    "all-to-all beside messages to the next node": everywhere("all_to_all", 2.4e9, 8, 1)
    + [Running("point_to_point", 1e9, 2, 4, rank) for rank in range(20)],
}


def shared_ends_s(collectives: Sequence[Running]) -> np.ndarray:
    """End of each collective, (n,), on one port per rank and level."""
    kernel, fabric_rates = EventKernel(), rates()
    links = SharedLinks(kernel, np.ones(2 * NODE * NODES))
    ends = np.full(len(collectives), np.nan)
    for index, one in enumerate(collectives):
        work = Collective(one.kind, np.array([one.num_bytes]), one.group)  # type: ignore[arg-type]
        occupancy = link_occupancy(work, fabric_rates)
        busy = occupancy.level_s[:, 0] / occupancy.wire_s[0]
        members = one.ranks[:1] if one.kind == "point_to_point" else one.ranks  # ports count what is sent
        usage = {2 * int(rank) + level: float(part) for rank in members for level, part in enumerate(busy) if part > 0}
        transfer = LinkTransfer(0.0, float(occupancy.wire_s[0]), usage, float(occupancy.flows[0]))

        def begin(index: int = index, transfer: LinkTransfer = transfer) -> None:
            links.start(transfer, lambda: ends.__setitem__(index, kernel.now))

        kernel.schedule(one.start_s, begin)
    kernel.run()
    links.check_idle()
    return ends


def flows_of(collectives: Sequence[Running]) -> tuple[Flows, np.ndarray]:
    """The same as flows, and the collective of each, (n_flows,).

    An all-reduce is its ring, whose neighbours exchange 2 (p - 1)/p of the buffer.
    """
    parts, owner = [], []
    for index, one in enumerate(collectives):
        ranks, size = one.ranks, one.size
        if one.kind == "all_to_all":
            source, target = np.nonzero(1 - np.eye(size, dtype=np.int64))
            flows = Flows.of(ranks[source], ranks[target], one.num_bytes / size, one.start_s)
        elif one.kind == "all_reduce":
            each = 2.0 * (size - 1) / size * one.num_bytes
            flows = Flows.of(ranks, np.roll(ranks, -1), each, one.start_s)
        else:
            flows = Flows.of(ranks[:1], ranks[1:], one.num_bytes, one.start_s)
        parts.append(flows)
        owner += [index] * len(flows.source)
    return Flows.together(parts), np.array(owner)


def last_end_s(finish_s: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """End of each collective from those of its flows."""
    ends = np.zeros(owner.max() + 1)
    np.maximum.at(ends, owner, finish_s)
    return ends
