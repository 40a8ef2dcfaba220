"""Events per second of the kernel: the hold model, a queue, and a step on shared links.

``python -m pytest benchmarks/test_event_kernel_speed.py --benchmark-enable`` prints them beside
what was asked for. Nothing here fails for being slow.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from random_scenarios import shipped_library

from moesim.engine.contended_steps import contended_step
from moesim.engine.event_kernel import EventKernel
from moesim.estimation.loading import load

ASKED = 300_000
"""Events per second that were asked for."""


def hold_model(num_pending: int, num_events: int) -> Callable[[], EventKernel]:
    """Each event schedules one after an exponential time, so that ``num_pending`` wait (Jones 1986)."""
    dice = random.Random(1)
    delays = [dice.expovariate(1.0) for _ in range(4096)]

    def run() -> EventKernel:
        kernel = EventKernel()
        left, place = num_events, 0

        def hold() -> None:
            nonlocal left, place
            left -= 1
            if left >= num_pending:
                place = (place + 1) & 4095
                kernel.schedule(kernel.now + delays[place], hold)

        for index in range(num_pending):
            kernel.schedule(delays[index & 4095], hold)
        kernel.run()
        return kernel

    return run


class Queue:
    """M/M/1: arrivals at rate 0.8, service at rate 1, and the mean number in the system over time."""

    def __init__(self, num_customers: int) -> None:
        self.kernel, self.dice = EventKernel(), random.Random(2)
        self.left, self.waiting = num_customers, 0
        self.area, self.since = 0.0, 0.0
        self.kernel.schedule(0.0, self.arrive)

    def count(self, change: int) -> None:
        self.area += self.waiting * (self.kernel.now - self.since)
        self.since = self.kernel.now
        self.waiting += change

    def arrive(self) -> None:
        self.count(1)
        self.left -= 1
        if self.left:
            self.kernel.schedule_after(self.dice.expovariate(0.8), self.arrive)
        if self.waiting == 1:
            self.kernel.schedule_after(self.dice.expovariate(1.0), self.leave)

    def leave(self) -> None:
        self.count(-1)
        if self.waiting:
            self.kernel.schedule_after(self.dice.expovariate(1.0), self.leave)


def report(benchmark: Any, capsys: pytest.CaptureFixture[str], text: str, num_events: int) -> None:
    if benchmark.enabled:
        rate = num_events / benchmark.stats.stats.median
        benchmark.extra_info |= {"events_per_s": rate, "asked_events_per_s": ASKED}
        with capsys.disabled():
            sys.stdout.write(f"\n{text}: {rate:,.0f} events/s (asked for: {ASKED:,})\n")


@pytest.mark.benchmark(group="event kernel")
@pytest.mark.parametrize("num_pending", [10, 1000, 100_000])
def test_hold_model(benchmark, capsys, num_pending):
    num_events = max(300_000, 2 * num_pending) if benchmark.enabled else 2 * num_pending
    kernel = benchmark.pedantic(hold_model(num_pending, num_events), rounds=3 if benchmark.enabled else 1)
    assert kernel.num_events == num_events
    report(benchmark, capsys, f"hold model, {num_pending:,} pending", num_events)


@pytest.mark.benchmark(group="event kernel")
def test_a_queue(benchmark, capsys):
    num_customers = 300_000 if benchmark.enabled else 20_000

    def run() -> Queue:
        queue = Queue(num_customers)
        queue.kernel.run()
        return queue

    queue = benchmark.pedantic(run, rounds=3 if benchmark.enabled else 1)
    assert queue.kernel.num_events == 2 * num_customers
    # rho / (1 - rho) = 4; correlated over some 1 / (1 - rho)^2 services, seen 0.35 from it at 20,000 customers.
    assert queue.area / queue.kernel.now == pytest.approx(4.0, abs=1.0)
    report(benchmark, capsys, "M/M/1 at 80 % load", queue.kernel.num_events)


@pytest.mark.benchmark(group="event kernel")
def test_a_step_on_shared_links(benchmark, capsys):
    """DeepSeek-V3's 16 stages, twice: collectives that meet, and each on links of its own."""
    name = "deepseek_v3" if benchmark.enabled else "m6t_1t_v100x480"
    scenario = load(name, library=shipped_library())
    step = benchmark.pedantic(contended_step, args=(scenario.system, scenario.columns), rounds=1)
    assert step.contention_s > 0
    if benchmark.enabled:
        wall_s = benchmark.stats.stats.median
        with capsys.disabled():
            sys.stdout.write(f"\n{name}: {wall_s:.1f} s for both runs, {step.num_events:,} events of the shared one\n")
