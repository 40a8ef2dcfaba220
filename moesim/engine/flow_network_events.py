"""Flows over time: constant max-min rates between events, an event where a flow starts or ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.engine.flow_network import Allocation, BoolArray, Incidence, max_min_certificate
from moesim.engine.flow_network_updates import updated_allocation
from moesim.errors import SimulationError
from moesim.structure.columns import FloatArray, IntArray

SLACK = 1e-11
"""Rates whose certificate fails by no more than rounding are kept after an event."""
SAME_TIME = 1e-12
"""Relative difference below which two ends are one event."""
NEARLY = 1e-9
"""Links filled to all but this part count as full."""
ALWAYS_EXACT = 256
"""As few active classes as this are never merged: events are cheap, and the last of them decide the time."""

Observer = Callable[[float, float, IntArray, FloatArray], None]
"""Called with begin and end of an interval, the classes active in it (n_active,) and their rates (n_active,)."""


@dataclass(frozen=True)
class FlowClasses:
    """What is simulated: classes of flows on classes of links.

    Attributes
    ----------
    incidence : Incidence
        Load of the links by the flows.
    capacity : ndarray of shape (n_links,)
        Bytes/s of one link of each class.
    num_bytes, start_s, latency_s : ndarray of shape (n_flows,)
        Of one flow: bytes > 0, its start after its batch is released, and latency of its route.
    batch : ndarray of shape (n_flows,)
        Batch of each class.
    batch_after : ndarray of shape (n_batches,)
        Batch whose end releases each batch; -1 where it starts at time 0. A batch comes later than what releases it.
    """

    incidence: Incidence
    capacity: FloatArray
    num_bytes: FloatArray
    start_s: FloatArray
    latency_s: FloatArray
    batch: IntArray
    batch_after: IntArray


@dataclass(frozen=True)
class Transmission:
    """When the classes' last bytes leave (``end_s``, without latency) and batches end (with it).

    ``misallotted_s`` (n_links,): over all merged windows, by how much time the bytes that a link carried differ from
    what it carries when it is full.
    """

    end_s: FloatArray
    batch_end_s: FloatArray
    misallotted_s: FloatArray
    num_events: int
    num_solutions: int


def transmit(classes: FlowClasses, *, merge_within: float = 0.0, observer: Observer | None = None) -> Transmission:
    """Simulate flows from event to event.

    Parameters
    ----------
    classes : FlowClasses
        Flows and links.
    merge_within : float
        0 for exact events. Else ends within this part of the ideal time (that of the busiest link, always full) are
        one event while more than 256 classes are active: see ``_Run._merge``. Only for flows of one batch.
    observer : callable, optional
        Sees every interval.

    Notes
    -----
    A byte's latency delays its arrival, not its sender: a flow occupies its links from its start until its last byte
    has left, and ends its latency later.
    """
    run = _Run(classes, merge_within if len(classes.batch_after) == 1 else 0.0, observer)
    while run.step():
        pass
    return run.result()


class _Run:
    """State of a simulation; arrays of active flows are kept dense."""

    def __init__(self, classes: FlowClasses, merge_within: float, observer: Observer | None) -> None:
        self.classes = classes
        self.observer = observer
        num_flows, num_batches = len(classes.num_bytes), len(classes.batch_after)
        self.now = 0.0
        self.end_s = np.full(num_flows, np.nan)
        self.ahead_s, self.misallotted_s = np.zeros((2, classes.incidence.num_links))
        ideal_s = classes.incidence.load(classes.num_bytes) / classes.capacity
        self.window_s = merge_within * float(ideal_s.max(initial=0.0))
        self.batch_end_s = np.zeros(num_batches)
        self.open_in_batch = np.bincount(classes.batch, minlength=num_batches)
        self.release_s = np.full(num_batches, np.inf)
        self.waiting = np.arange(num_flows)
        self.active = np.zeros(0, np.int64)
        self.remaining, self.rate = np.zeros(0), np.zeros(0)
        self.bottleneck = np.zeros(0, np.int64)
        self._entries, self._entry_flows = classes.incidence, np.arange(num_flows)
        self.is_current = self.tries_certificate = True
        self.num_events = self.num_solutions = 0
        for batch in np.flatnonzero(classes.batch_after < 0):
            self._release(int(batch), 0.0)

    def _release(self, batch: int, time_s: float) -> None:
        """Let a batch start, and those after it if it has no flows."""
        pending = [batch]
        while pending:
            current = pending.pop()
            self.release_s[current] = self.batch_end_s[current] = time_s
            if self.open_in_batch[current] == 0:
                pending += np.flatnonzero(self.classes.batch_after == current).tolist()

    def step(self) -> bool:
        """Advance to the next event; False when nothing is left."""
        starts = self._start_flows()
        if not len(self.active):
            begin = self._begin_of_waiting()
            if not np.isfinite(begin):
                return False
            self.now = begin
            return True
        self._update_rates(has_new_flows=starts)
        rate = self.rate
        if not (rate > 0).all():
            raise SimulationError("a flow has no bandwidth")
        ends = self.now + self.remaining / rate
        self.num_events += 1
        until = min(float(ends.min()), self._begin_of_waiting())
        if self.window_s and len(self.active) > ALWAYS_EXACT and self._merge(ends, until):
            return True
        is_done = ends <= until * (1.0 + SAME_TIME)
        if self.observer:
            self.observer(self.now, until, self.active, rate)
        self.remaining -= rate * (until - self.now)
        self._end(is_done, ends)
        self.now = until
        return True

    def _merge(self, ends: FloatArray, first_end: float) -> bool:
        """Advance by a window with several ends; False if there are none to merge.

        Flows that end in it keep the rates of its begin. The others send at the mean of their rates at its begin and at
        its close, when those have gone: the trapezoidal rule, whose error falls with the square of the window. Full
        links then carry a little more or less than they can; that is added up as ``misallotted_s``.
        """
        until = min(self.now + self.window_s, self._begin_of_waiting())
        is_done = ends <= until
        is_one_event = bool((ends[is_done] <= first_end * (1.0 + SAME_TIME)).all())
        if is_one_event or is_done.all() or until <= first_end * (1.0 + SAME_TIME):
            return False
        entries, capacity, length = self._active_entries(), self.classes.capacity, until - self.now
        is_left = ~is_done
        left = entries.only(is_left)
        after = updated_allocation(left, capacity, Allocation(self.rate[is_left], self.bottleneck[is_left]))
        self.num_solutions += 1
        sent = self.remaining.copy()
        mean = 0.5 * (self.rate[is_left] + after.rate)
        sent[is_left] = np.minimum(mean * length, self.remaining[is_left])
        is_full = np.minimum(entries.load(self.rate), left.load(after.rate)) >= capacity * (1.0 - NEARLY)
        surplus_s = entries.load(sent) / capacity - length
        self.ahead_s += np.where(is_full, surplus_s, np.maximum(surplus_s, 0.0))
        self.misallotted_s = np.maximum(self.misallotted_s, np.abs(self.ahead_s))
        ends = ends.copy()
        ends[is_left] = self.now + self.remaining[is_left] / mean
        self.remaining -= sent
        self.rate[is_left], self.bottleneck[is_left] = after.rate, after.bottleneck
        is_over = ends <= until
        self._end(is_over, ends)
        self.is_current = bool((is_over == is_done).all())
        self.now = until
        return True

    def _begin_of_waiting(self) -> float:
        waiting = self.waiting
        begin = self.release_s[self.classes.batch[waiting]] + self.classes.start_s[waiting]
        return float(begin.min(initial=np.inf))

    def _start_flows(self) -> bool:
        """Move waiting flows whose time has come to the active ones."""
        if not len(self.waiting):
            return False
        begin = self.release_s[self.classes.batch[self.waiting]] + self.classes.start_s[self.waiting]
        is_due = begin <= self.now * (1.0 + SAME_TIME)
        if not is_due.any():
            return False
        due = self.waiting[is_due]
        self.waiting = self.waiting[~is_due]
        self._merge_in(due)
        return True

    def _merge_in(self, due: IntArray) -> None:
        """Add flows to the active ones, which stay sorted; nothing is known of what holds the new ones."""
        active = np.concatenate((self.active, due))
        order = np.argsort(active, kind="stable")
        self.active = active[order]
        self.remaining = np.concatenate((self.remaining, self.classes.num_bytes[due]))[order]
        self.rate = np.concatenate((self.rate, np.zeros(len(due))))[order]
        self.bottleneck = np.concatenate((self.bottleneck, np.full(len(due), -1)))[order]
        self._entries, self._entry_flows = self.classes.incidence, np.arange(len(self.end_s))

    def _active_entries(self) -> Incidence:
        """Entries of the active flows; those of flows that have ended are dropped only when somebody asks."""
        if len(self._entry_flows) != len(self.active):
            is_active = np.zeros(len(self.end_s), np.bool_)
            is_active[self.active] = True
            self._entries = self._entries.only(is_active[self._entry_flows])
            self._entry_flows = self.active
        return self._entries

    def _update_rates(self, *, has_new_flows: bool) -> None:
        """Keep the rates if they are still max-min fair, else solve again.

        The certificate is tried as long as it keeps holding, then again once a solution brought the same rates.
        """
        if self.is_current and not has_new_flows:
            return
        entries, capacity = self._active_entries(), self.classes.capacity
        if self.tries_certificate and not has_new_flows:
            certificate = max_min_certificate(entries, capacity, self.rate)
            if certificate.slack <= SLACK:
                self.is_current, self.bottleneck = True, certificate.bottleneck
                return
            self.tries_certificate = False
        allocation = updated_allocation(entries, capacity, Allocation(self.rate, self.bottleneck))
        if has_new_flows or np.allclose(allocation.rate, self.rate, rtol=SLACK, atol=0.0):
            self.tries_certificate = True
        self.rate, self.bottleneck = allocation.rate, allocation.bottleneck
        self.num_solutions += 1
        self.is_current = True

    def _end(self, is_done: BoolArray, ends: FloatArray) -> None:
        """Take flows off the active ones.

        Their links have room, so that the flows these links held may be faster; if they held none, rates stay fair.
        """
        if not is_done.any():
            return
        done, is_left = self.active[is_done], ~is_done
        self.end_s[done] = ends[is_done]
        self.active, self.remaining = self.active[is_left], self.remaining[is_left]
        self.rate, self.bottleneck = self.rate[is_left], self.bottleneck[is_left]
        has_room = np.zeros(self.classes.incidence.num_links, np.bool_)
        has_room[self.classes.incidence.links_of(done)] = True
        if has_room[self.bottleneck].any():
            self.is_current = False
        self._end_batches(done)

    def _end_batches(self, done: IntArray) -> None:
        batches = self.classes.batch[done]
        np.maximum.at(self.batch_end_s, batches, self.end_s[done] + self.classes.latency_s[done])
        np.subtract.at(self.open_in_batch, batches, 1)
        for batch in np.unique(batches):
            if self.open_in_batch[batch] == 0:
                for follower in np.flatnonzero(self.classes.batch_after == batch):
                    self._release(int(follower), float(self.batch_end_s[batch]))

    def result(self) -> Transmission:
        """What happened."""
        return Transmission(self.end_s, self.batch_end_s, self.misallotted_s, self.num_events, self.num_solutions)
