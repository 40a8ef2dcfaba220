"""Flows over time: constant max-min rates between events, an event where a flow starts or ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.engine.flow_network import Incidence, bottleneck_slack, max_min_rates
from moesim.errors import SimulationError
from moesim.structure.columns import FloatArray, IntArray

SLACK = 1e-11
"""Rates whose certificate fails by no more than rounding are kept after an event."""
SAME_TIME = 1e-12
"""Relative difference below which two ends are one event."""

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

    ``over_sent_bytes`` (n_links,) is what flows sent beyond their bytes in merged windows, on one link of each class.
    """

    end_s: FloatArray
    batch_end_s: FloatArray
    over_sent_bytes: FloatArray
    num_events: int
    num_solutions: int


def transmit(classes: FlowClasses, *, merge_within: float = 0.0, observer: Observer | None = None) -> Transmission:
    """Simulate flows from event to event.

    Parameters
    ----------
    classes : FlowClasses
        Flows and links.
    merge_within : float
        0 for exact events. Else rates stay as they are from the first end in a window until the window closes, this
        part of the elapsed time later; ends are those at these rates. Only for flows of one batch.
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
        self.merge_within = merge_within
        self.observer = observer
        num_flows, num_batches = len(classes.num_bytes), len(classes.batch_after)
        self.now = 0.0
        self.end_s = np.full(num_flows, np.nan)
        self.over_sent = np.zeros(num_flows)
        self.batch_end_s = np.zeros(num_batches)
        self.open_in_batch = np.bincount(classes.batch, minlength=num_batches)
        self.release_s = np.full(num_batches, np.inf)
        self.waiting = np.arange(num_flows)
        self.active = np.zeros(0, np.int64)
        self.remaining, self.rate = np.zeros(0), np.zeros(num_flows)
        self.entries = classes.incidence.only(np.zeros(num_flows, np.bool_))
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
        self._update_rates(must_solve=starts)
        rate = self.rate[self.active]
        if not (rate > 0).all():
            raise SimulationError("a flow has no bandwidth")
        ends = self.now + self.remaining / rate
        first_end, begin = float(ends.min()), self._begin_of_waiting()
        until = min(first_end * (1.0 + self.merge_within), begin) if first_end <= begin else begin
        is_done = ends <= until * (1.0 + SAME_TIME)
        if is_done.all() and self.merge_within:
            until = float(ends.max())
        if self.observer:
            self.observer(self.now, until, self.active, rate)
        self._finish(is_done, ends, until, rate)
        self.now = until
        self.num_events += 1
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
        self.active = np.concatenate((self.active, due))
        self.remaining = np.concatenate((self.remaining, self.classes.num_bytes[due]))
        is_active = np.zeros(len(self.end_s), np.bool_)
        is_active[self.active] = True
        self.entries = self.classes.incidence.only(is_active)
        return True

    def _update_rates(self, *, must_solve: bool) -> None:
        """Keep the rates if they are still max-min fair, else solve again."""
        capacity = self.classes.capacity
        if must_solve or bottleneck_slack(self.entries, capacity, self.rate) > SLACK:
            self.rate = max_min_rates(self.entries, capacity)
            self.num_solutions += 1

    def _finish(self, is_done: np.ndarray, ends: FloatArray, until: float, rate: FloatArray) -> None:
        """Take what was sent off the remaining bytes and end flows."""
        done = self.active[is_done]
        self.end_s[done] = ends[is_done]
        self.over_sent[done] = np.maximum(until - ends[is_done], 0.0) * rate[is_done]
        self.rate[done] = 0.0
        self.remaining = (self.remaining - rate * (until - self.now))[~is_done]
        self.active = self.active[~is_done]
        is_kept = np.ones(len(self.end_s), np.bool_)
        is_kept[done] = False
        self.entries = self.entries.only(is_kept)
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
        over_sent = self.classes.incidence.load(self.over_sent)
        return Transmission(self.end_s, self.batch_end_s, over_sent, self.num_events, self.num_solutions)
