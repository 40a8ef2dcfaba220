"""Plain TCP between the emulated hosts, to see that links have the rates they were given; no library in between."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from moesim.errors import Problem, ScenarioError
from validation.netlab.namespaces import lab_problem
from validation.netlab.topologies import LabTopology
from validation.netlab.workers import PATIENCE_S, Session, Workers

PROBE_PORT = 29400
PAYLOAD_FRACTION = 1448 / 1514
"""Of a full Ethernet frame of 1514 bytes, 1448 are the sender's: IP 20, TCP 20 and its time stamps 12, Ethernet 14."""
PROBE_S = 0.4
TOLERANCE = 0.05
TRIES = 3
CHUNK = 1 << 16


@dataclass(frozen=True)
class Probe:
    """Payload rate of a link that was measured, bit/s, and what it should be."""

    link: str
    expected: float
    measured: float

    @property
    def error(self) -> float:
        """Relative deviation."""
        return self.measured / self.expected - 1.0


def time_streams(session: Session, pairs: Sequence[tuple[int, int]], num_bytes: int) -> float:
    """Send bytes over plain TCP from the first to the second rank of each pair, all at once.

    Returns
    -------
    float
        Seconds until the rank's own streams have arrived; 0 for a rank that receives nothing.
    """
    incoming = sum(target == session.rank for _, target in pairs)
    listener = socket.create_server((session.hosts[session.rank].address, PROBE_PORT), backlog=len(pairs))
    session.group_barrier.wait(PATIENCE_S)
    outgoing = []
    for source, target in pairs:
        if source == session.rank:
            outgoing.append(socket.create_connection((session.hosts[target].address, PROBE_PORT)))
    arriving = [listener.accept()[0] for _ in range(incoming)]
    start = session.start_together()
    end = _pump(outgoing, arriving, num_bytes)
    session.group_barrier.wait(PATIENCE_S)
    for one in [*outgoing, *arriving, listener]:
        one.close()
    return end - start if arriving else 0.0


def _pump(outgoing: Sequence[socket.socket], arriving: Sequence[socket.socket], num_bytes: int) -> float:
    """Send and receive everything; when the last byte came."""
    selector, chunk = selectors.DefaultSelector(), bytes(CHUNK)
    left = dict.fromkeys([*outgoing, *arriving], num_bytes)
    for stream in outgoing:
        stream.setblocking(False)
        selector.register(stream, selectors.EVENT_WRITE)
    for stream in arriving:
        stream.setblocking(False)
        selector.register(stream, selectors.EVENT_READ)
    end = time.monotonic()
    while left:
        for key, event in selector.select(PATIENCE_S):
            ready = cast(socket.socket, key.fileobj)
            if event & selectors.EVENT_WRITE:
                left[ready] -= ready.send(chunk[: left[ready]])
            else:
                left[ready] -= len(ready.recv(CHUNK))
            if left[ready] <= 0:
                selector.unregister(ready)
                del left[ready]
                end = time.monotonic()
    return end


def assert_rates(topology: LabTopology, group: Workers) -> list[Probe]:
    """Measure links of every kind and refuse a network that is not what it says.

    Raises
    ------
    ScenarioError
        E-NET-004 with every link whose payload rate is more than 5 % away from its bucket's.
    """
    probes = [_probe(group, link, pairs, rate) for link, pairs, rate in _streams(topology)]
    wrong = [probe for probe in probes if abs(probe.error) > TOLERANCE]
    if wrong:
        raise ScenarioError([_too_slow(topology, probe) for probe in wrong])
    return probes


def _streams(topology: LabTopology) -> list[tuple[str, list[tuple[int, int]], float]]:
    """Pairs that fill links of a kind, node by node where all at once are too much for the cores; bit/s of each."""
    ranks, group = topology.ranks, topology.group
    around = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    if topology.kind in ("flat", "ring"):
        return [("host", around, topology.rate)]
    across = [(rank, (rank + group) % ranks) for rank in range(ranks)]
    shared = min(topology.uplink_rate / group, topology.host_rate)
    inside = [[(first + k, first + (k + 1) % group) for k in range(group)] for first in range(0, ranks, group)]
    return [*(("host", pairs, topology.host_rate) for pairs in inside), ("uplink", across, shared)]


def _probe(group: Workers, link: str, pairs: Sequence[tuple[int, int]], rate: float) -> Probe:
    """Rate of the slowest stream; the best of a few tries, since other work on the machine only takes away."""
    num_bytes, probes = int(rate / 8 * PROBE_S), []
    for _ in range(TRIES):
        seconds = float(np.max(group.run(time_streams, pairs=pairs, num_bytes=num_bytes)))
        probes.append(Probe(link, rate * PAYLOAD_FRACTION, num_bytes * 8 / seconds))
        if abs(probes[-1].error) < TOLERANCE:
            break
    return min(probes, key=lambda probe: abs(probe.error))


def _too_slow(topology: LabTopology, probe: Probe) -> Problem:
    message = (
        f"{topology.name}: plain TCP moves {probe.measured / 1e6:.1f} Mb/s over a {probe.link} link that should carry "
        f"{probe.expected / 1e6:.1f} Mb/s of payload"
    )
    remedy = "choose a lower --rate: the cores of this machine must carry all links together; or wait until it is idle"
    return lab_problem(message, remedy, "rate")
