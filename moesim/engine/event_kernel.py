"""A discrete-event kernel: a clock and a heap of what is to happen.

Events of one time happen in the order of their numbers, by default that in which they were scheduled, so that a run
repeats exactly. A model whose results depend on that order has a race: ``numbers`` lets a test deal them differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

Action = Callable[[], None]

CANCELLED_KEPT = 1024
"""Cancelled events that may stay in the heap, unless they are fewer than the pending ones."""


class EventKernel:
    """Clock and pending events.

    Attributes
    ----------
    now : float
        Seconds since the start of the simulation.
    num_events : int
        Events that have happened.

    Examples
    --------
    >>> kernel, seen = EventKernel(), []
    >>> late = kernel.schedule_after(2.0, lambda: seen.append("late"))
    >>> soon = kernel.schedule_after(1.0, lambda: seen.append(kernel.now))
    >>> kernel.cancel(late)
    True
    >>> kernel.run()
    1
    >>> seen
    [1.0]
    """

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        """Start at time 0.

        Parameters
        ----------
        numbers : iterator of int, optional
            Distinct numbers of events, the smaller one first where times are equal; 0, 1, 2, ... if absent.
        """
        self.now = 0.0
        self.num_events = 0
        self._numbers = count() if numbers is None else numbers
        self._heap: list[tuple[float, int]] = []
        self._actions: dict[int, Action] = {}

    def __len__(self) -> int:
        return len(self._actions)

    def schedule(self, time_s: float, action: Action) -> int:
        """Let an action happen at a time.

        Parameters
        ----------
        time_s : float
            Seconds on the kernel's clock.
        action : callable
            Called without arguments once the clock stands there.

        Returns
        -------
        int
            Number of the event, for ``cancel``.

        Raises
        ------
        ValueError
            If the time lies before the clock's or is no number.
        """
        if not time_s >= self.now:
            raise ValueError(f"an event at {time_s!r} s cannot be scheduled at {self.now!r} s")
        number = next(self._numbers)
        self._actions[number] = action
        heappush(self._heap, (time_s, number))
        return number

    def schedule_after(self, delay_s: float, action: Action) -> int:
        """Let an action happen ``delay_s`` >= 0 seconds from now; see ``schedule``."""
        return self.schedule(self.now + delay_s, action)

    def cancel(self, number: int) -> bool:
        """Take back an event; False if it has happened or was taken back before."""
        if self._actions.pop(number, None) is None:
            return False
        if len(self._heap) > CANCELLED_KEPT + 2 * len(self._actions):
            self._heap[:] = [entry for entry in self._heap if entry[1] in self._actions]
            heapify(self._heap)
        return True

    def run(self, until_s: float = inf) -> int:
        """Let events happen, those they schedule included, up to and with a time.

        Parameters
        ----------
        until_s : float
            Later events stay pending; the clock then stands at the last event that happened.

        Returns
        -------
        int
            How many events happened.
        """
        heap, take = self._heap, self._actions.pop
        happened = 0
        while heap and heap[0][0] <= until_s:
            time_s, number = heappop(heap)
            action = take(number, None)
            if action is None:
                continue
            self.now = time_s
            happened += 1
            action()
        self.num_events += happened
        return happened
