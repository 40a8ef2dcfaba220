"""Collectives and messages of all kinds that share ports, NICs and uplinks while they run.

A transfer is fluid: it has a latency, a wire time on idle links, and uses of each resource a part of the capacity while
it runs at that speed. Where the transfers on a resource want more than it has, they slow down, each on all of its
resources alike, since a collective is as fast as its tightest part. Rates are max-min fair (``flow_network``) and
change where a transfer starts or ends and where a capacity changes. Alone, a transfer takes its latency and wire time.

What is shared fairly is the share of the resource that a transfer uses most, per flow: one whose traffic is
``num_flows`` flows on a port gets as much as that many flows, as in a network that is fair to flows. Among equal
resources that is fairness of bytes per second.

References
----------
Ghodsi et al., Dominant Resource Fairness, NSDI 2011. Bertsekas, Gallager, Data Networks (2nd ed.), section 6.5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moesim.engine.event_kernel import EventKernel
from moesim.engine.flow_network import Incidence, max_min_rates
from moesim.errors import SimulationError
from moesim.structure.columns import FloatArray

FULL = 1.0 + 1e-12
"""Resources that are asked for no more than this part of what they have slow nobody."""


@dataclass(frozen=True)
class LinkTransfer:
    """What a collective or message asks of the links.

    Attributes
    ----------
    latency_s, wire_s : float
        On idle links it takes their sum. The links are occupied for ``wire_s``; it ends its latency later.
    usage : mapping of int to float
        By resource: what it takes of the capacity, in the capacity's unit, while it runs at idle speed.
    num_flows : float
        Flows it has on its tightest resource.
    """

    latency_s: float
    wire_s: float
    usage: Mapping[int, float] = field(default_factory=dict)
    num_flows: float = 1.0


@dataclass(frozen=True)
class FlappingLink:
    """A capacity that falls again and again: ``low_fraction`` of it for ``low_s`` from ``first_s`` in every period.

    It may have fallen before the start, by up to a period.

    Raises
    ------
    ValueError
        If a duration is not positive, the link is low for a period or longer, or the fraction is not in [0, 1].
    """

    period_s: float
    low_s: float
    low_fraction: float = 0.0
    first_s: float = 0.0

    def __post_init__(self) -> None:
        is_possible = 0.0 < self.low_s < self.period_s and 0.0 <= self.low_fraction <= 1.0
        if not (is_possible and self.first_s >= -self.period_s):
            limits = "0 < low_s < period_s, first_s >= -period_s and 0 <= low_fraction <= 1"
            raise ValueError(f"a link flaps with {limits}, not {self}")

    def change_s(self, index: int) -> float:
        """Time of a change: falls have even indices, rises odd ones."""
        return self.first_s + index // 2 * self.period_s + index % 2 * self.low_s

    def next_change(self, now_s: float) -> int:
        """Index of the first change after a time."""
        index = max(2 * int((now_s - self.first_s) // self.period_s) - 2, 0)
        while self.change_s(index) <= now_s:
            index += 1
        return index

    def fraction_before(self, index: int) -> float:
        """Part of the capacity that is there until a change."""
        return self.low_fraction if index % 2 else 1.0


class _Running:
    """A transfer on the links; ``remaining_s`` of wire time at idle speed as of ``since_s``."""

    __slots__ = ("event", "number", "on_end", "rate", "remaining_s", "since_s", "transfer", "unit")

    def __init__(self, number: int, transfer: LinkTransfer, unit: float, now_s: float, on_end: Callable[[], None]):
        self.number, self.transfer, self.unit, self.on_end = number, transfer, unit, on_end
        self.remaining_s, self.since_s = transfer.wire_s, now_s
        self.rate = 0.0
        self.event: int | None = None


class SharedLinks:
    """Resources and the transfers that run on them.

    Attributes
    ----------
    capacity : ndarray of shape (n_resources,)
        What each resource has at full health, in whatever unit ``LinkTransfer.usage`` counts.
    carried : ndarray of shape (n_resources,)
        What ended transfers took of each, in that unit times seconds.

    Examples
    --------
    Two messages of 2 s each on one port, the second from 1 s on: 1 s alone, 2 s shared, 1 s alone.

    >>> kernel, ends = EventKernel(), []
    >>> links, message = SharedLinks(kernel, [1.0]), LinkTransfer(0.0, 2.0, {0: 1.0})
    >>> for start_s in (0.0, 1.0):
    ...     event = kernel.schedule(start_s, lambda: links.start(message, lambda: ends.append(kernel.now)))
    >>> happened = kernel.run()
    >>> ends
    [3.0, 4.0]
    """

    def __init__(
        self,
        kernel: EventKernel,
        capacity: Sequence[float] | FloatArray,
        flapping: Mapping[int, FlappingLink] | None = None,
    ) -> None:
        """Lay the links.

        Parameters
        ----------
        kernel : EventKernel
            Whose clock counts.
        capacity : array_like of shape (n_resources,)
            Capacities at full health; less for a degraded link.
        flapping : mapping of int to FlappingLink, optional
            Resources whose capacity falls and rises.

        Raises
        ------
        ValueError
            If a capacity is not positive.
        """
        self.kernel = kernel
        self.capacity = np.asarray(capacity, dtype=np.float64)
        if not (self.capacity > 0.0).all():
            raise ValueError("every resource needs a capacity above 0; a link that fails for a while is a flapping one")
        self.carried = np.zeros(len(self.capacity))
        self._flapping = dict(flapping or {})
        self._followed: set[int] = set()
        self._available: list[float] = self.capacity.tolist()
        self._on: list[dict[int, _Running]] = [{} for _ in self._available]
        self._running: dict[int, _Running] = {}
        self._started = 0
        self._touched: set[int] = set()
        self._is_due = False

    @property
    def rates(self) -> dict[int, float]:
        """Speed of each running transfer, 1 where it is that on idle links; numbered in order of their start."""
        return {number: running.rate for number, running in self._running.items()}

    def load(self, resource: int) -> float:
        """What the running transfers take of a resource."""
        return sum(running.rate * running.transfer.usage[resource] for running in self._on[resource].values())

    def available(self, resource: int) -> float:
        """What a resource has now."""
        return self._available[resource]

    def start(self, transfer: LinkTransfer, on_end: Callable[[], None]) -> None:
        """Start a transfer now; ``on_end`` is called when it ends."""
        if transfer.wire_s <= 0.0 or not transfer.usage:
            self.kernel.schedule_after(transfer.latency_s + transfer.wire_s, on_end)
            return
        share = max(taken / self.capacity[resource] for resource, taken in transfer.usage.items())
        running = _Running(self._started, transfer, float(share) / transfer.num_flows, self.kernel.now, on_end)
        self._started += 1
        self._running[running.number] = running
        for resource in transfer.usage:
            self._on[resource][running.number] = running
        self._watch_flaps()
        self._touch(transfer.usage)

    def check_idle(self) -> None:
        """Make sure that nothing is left on the links.

        Raises
        ------
        SimulationError
            If a transfer still runs: its links stay without capacity for ever.
        """
        if self._running:
            dead = sorted({r for one in self._running.values() for r in one.transfer.usage if not self._available[r]})
            raise SimulationError(f"{len(self._running)} transfers never end: resources {dead} have no capacity")

    def _touch(self, resources: Iterable[int]) -> None:
        """Note where rates may change; they are worked out once the events of this time have happened."""
        self._touched.update(resources)
        if not self._is_due:
            self._is_due = True
            self.kernel.schedule(self.kernel.now, self._reallocate)

    def _reallocate(self) -> None:
        """New rates for the transfers that the touched resources may concern, and times of their ends."""
        affected, congested = self._concerned()
        self._is_due = False
        self._touched.clear()
        for running, rate in zip(affected, self._fair_rates(affected, congested), strict=True):
            if rate != running.rate:
                self._change_rate(running, rate)

    def _concerned(self) -> tuple[list[_Running], list[int]]:
        """Transfers on touched resources and all that meet them on congested ones; and these resources."""
        found: dict[int, _Running] = {}
        congested: dict[int, bool] = {}
        pending = sorted(self._touched)
        while pending:
            resource = pending.pop()
            if resource in congested:
                continue
            here = self._on[resource]
            wanted = sum(running.transfer.usage[resource] for running in here.values())
            congested[resource] = wanted > self._available[resource] * FULL
            if congested[resource] or resource in self._touched:
                for number, running in here.items():
                    if number not in found:
                        found[number] = running
                        pending += running.transfer.usage
        return [found[number] for number in sorted(found)], sorted(r for r, is_full in congested.items() if is_full)

    def _fair_rates(self, affected: list[_Running], congested: list[int]) -> list[float]:
        """Max-min fair speeds; a transfer never runs faster than on idle links, which is a link of its own."""
        if not congested:
            return [1.0] * len(affected)
        if len(affected) == 1:
            usage = affected[0].transfer.usage
            return [min(self._available[r] / usage[r] for r in congested)]
        place = {resource: index for index, resource in enumerate(congested)}
        flow, link, weight = [], [], []
        for index, running in enumerate(affected):
            for resource, taken in running.transfer.usage.items():
                if resource in place:
                    flow.append(index)
                    link.append(place[resource])
                    weight.append(taken / running.unit)
            flow.append(index)
            link.append(len(congested) + index)
            weight.append(1.0)
        units = np.array([running.unit for running in affected])
        capacity = np.concatenate([[self._available[resource] for resource in congested], units])
        incidence = Incidence(len(affected), len(capacity), np.array(flow), np.array(link), np.array(weight))
        speeds: list[float] = (max_min_rates(incidence, capacity) / units).tolist()
        return speeds

    def _change_rate(self, running: _Running, rate: float) -> None:
        now = self.kernel.now
        running.remaining_s -= running.rate * (now - running.since_s)
        running.since_s, running.rate = now, rate
        if running.event is not None:
            self.kernel.cancel(running.event)
            running.event = None
        if rate > 0.0:
            left_s = max(running.remaining_s, 0.0) / rate
            running.event = self.kernel.schedule_after(left_s, lambda: self._end(running))

    def _end(self, running: _Running) -> None:
        transfer = running.transfer
        del self._running[running.number]
        for resource, taken in transfer.usage.items():
            del self._on[resource][running.number]
            self.carried[resource] += taken * transfer.wire_s
        self._touch(transfer.usage)
        self.kernel.schedule_after(transfer.latency_s, running.on_end)

    def _watch_flaps(self) -> None:
        """Follow the capacities of flapping links, as long as anything runs, so that a run can end."""
        for resource, flaps in self._flapping.items():
            if resource not in self._followed:
                self._followed.add(resource)
                self._await_change(resource, flaps.next_change(self.kernel.now))

    def _await_change(self, resource: int, index: int) -> None:
        """Set the capacity that a resource has until one of its changes, and wait for that."""
        flaps = self._flapping[resource]
        self._available[resource] = float(self.capacity[resource]) * flaps.fraction_before(index)
        self._touch([resource])

        def change() -> None:
            if self._running:
                self._await_change(resource, index + 1)
            else:
                self._followed.remove(resource)

        self.kernel.schedule(flaps.change_s(index), change)
