"""The event kernel: order, cancellation, and what may depend on neither."""

from __future__ import annotations

import random
from itertools import count

import pytest

from moesim.engine.event_kernel import CANCELLED_KEPT, EventKernel


def test_events_happen_in_order_of_time_and_then_of_scheduling():
    kernel, seen = EventKernel(), []
    for time_s, name in [(2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")]:
        kernel.schedule(time_s, lambda name=name: seen.append((kernel.now, name)))
    assert kernel.run() == 4
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (2.0, "d")]


def test_numbers_decide_between_equal_times():
    kernel, seen = EventKernel(count(0, -1)), []
    for name in "abc":
        kernel.schedule(1.0, lambda name=name: seen.append(name))
    kernel.run()
    assert seen == ["c", "b", "a"]


def test_an_event_may_schedule_another_for_the_same_time():
    kernel, seen = EventKernel(), []
    kernel.schedule(1.0, lambda: kernel.schedule_after(0.0, lambda: seen.append(kernel.now)))
    assert kernel.run() == 2
    assert seen == [1.0]


def test_a_cancelled_event_does_not_happen_and_is_cancelled_once():
    kernel, seen = EventKernel(), []
    first = kernel.schedule(1.0, lambda: seen.append("first"))
    second = kernel.schedule(2.0, lambda: seen.append("second"))
    assert kernel.cancel(first)
    assert not kernel.cancel(first)
    assert len(kernel) == 1
    kernel.run()
    assert seen == ["second"]
    assert not kernel.cancel(second)


def test_cancelled_events_do_not_fill_the_heap():
    kernel = EventKernel()
    for _ in range(50 * CANCELLED_KEPT):
        kernel.cancel(kernel.schedule_after(1.0, lambda: None))
    assert len(kernel._heap) <= CANCELLED_KEPT + 1


def test_cancelling_while_running_keeps_the_others():
    kernel, seen = EventKernel(), []
    victims = [kernel.schedule(2.0, lambda: seen.append("victim")) for _ in range(3 * CANCELLED_KEPT)]
    kernel.schedule(3.0, lambda: seen.append("kept"))
    kernel.schedule(1.0, lambda: [kernel.cancel(victim) for victim in victims])
    kernel.run()
    assert seen == ["kept"]


def test_a_run_up_to_a_time_leaves_later_events():
    kernel, seen = EventKernel(), []
    for time_s in (1.0, 2.0, 3.0):
        kernel.schedule(time_s, lambda: seen.append(kernel.now))
    assert kernel.run(until_s=2.0) == 2
    assert (kernel.now, len(kernel)) == (2.0, 1)
    assert kernel.run() == 1
    assert kernel.num_events == 3


@pytest.mark.parametrize("time_s", [0.5, float("nan"), -1.0])
def test_the_past_cannot_be_scheduled(time_s):
    kernel = EventKernel()
    kernel.schedule(1.0, lambda: None)
    kernel.run()
    with pytest.raises(ValueError, match="cannot be scheduled"):
        kernel.schedule(time_s, lambda: None)


def test_random_events_come_out_sorted_whatever_was_cancelled():
    kernel, dice, seen = EventKernel(), random.Random(5), []
    expected = []
    for _ in range(2000):
        time_s = dice.randrange(50) / 7.0
        number = kernel.schedule(time_s, lambda time_s=time_s: seen.append(time_s))
        if dice.random() < 0.3:
            assert kernel.cancel(number)
        else:
            expected.append(time_s)
    kernel.run()
    assert seen == sorted(expected)
