"""Transfers on shared links: alone, together, on links that fail, and whatever order ties come in."""

from __future__ import annotations

import random
from itertools import count

import numpy as np
import pytest

from moesim.engine.event_kernel import EventKernel
from moesim.engine.flow_network import Incidence, bottleneck_slack
from moesim.engine.shared_links import FlappingLink, LinkTransfer, SharedLinks
from moesim.errors import SimulationError


def run(capacity, transfers, *, flapping=None, numbers=None, watch=()):
    """Ends of (start_s, transfer) in their order, the links, and what ``watch`` saw at its times."""
    kernel = EventKernel(numbers)
    links = SharedLinks(kernel, capacity, flapping)
    ends = [np.nan] * len(transfers)

    def begin(index, transfer):
        links.start(transfer, lambda: ends.__setitem__(index, kernel.now))

    for index, (start_s, transfer) in enumerate(transfers):
        kernel.schedule(start_s, lambda index=index, transfer=transfer: begin(index, transfer))
    for time_s, look in watch:
        kernel.schedule(time_s, lambda look=look: look(links))
    kernel.run()
    links.check_idle()
    return np.array(ends), links


def message(wire_s, *resources, latency_s=0.0, part=1.0, num_flows=1.0):
    return LinkTransfer(latency_s, wire_s, dict.fromkeys(resources, part), num_flows)


def test_alone_a_transfer_takes_its_latency_and_wire_time():
    ends, _ = run([1.0, 1.0], [(0.25, message(3.0, 0, 1, latency_s=0.5))])
    assert ends[0] == 3.75


def test_transfers_on_different_links_do_not_notice_each_other():
    ends, _ = run([1.0, 1.0], [(0.0, message(3.0, 0)), (1.0, message(1.0, 1))])
    assert ends.tolist() == [3.0, 2.0]


def test_two_share_evenly_and_the_longer_goes_on_alone():
    ends, _ = run([1.0], [(0.0, message(3.0, 0)), (0.0, message(1.0, 0))])
    assert ends.tolist() == [4.0, 2.0]


def test_latency_does_not_occupy_the_link():
    ends, _ = run([1.0], [(0.0, message(1.0, 0, latency_s=5.0)), (1.0, message(1.0, 0))])
    assert ends.tolist() == [6.0, 2.0]


def test_transfers_that_together_ask_for_no_more_than_there_is_are_not_slowed():
    ends, _ = run([1.0], [(0.0, message(2.0, 0, part=0.4)), (0.0, message(2.0, 0, part=0.6))])
    assert ends.tolist() == [2.0, 2.0]


def test_one_of_half_the_use_gets_all_it_wants_and_the_other_the_rest():
    """Asked for 0.25 and 1: fair is 0.25 and 0.75, so that the long one has 3 s less 0.75 * 2 s after 2 s."""
    ends, _ = run([1.0], [(0.0, message(2.0, 0, part=0.25)), (0.0, message(3.0, 0))])
    assert ends.tolist() == pytest.approx([2.0, 3.5])


def test_a_collective_is_as_fast_as_its_tightest_port():
    """Max-min over three ports: the middle one holds the long transfer to a half, its neighbours use what is left."""
    long = message(2.0, 0, 1, 2)
    ends, _ = run([1.0, 1.0, 1.0], [(0.0, long), (0.0, message(2.0, 1)), (0.0, message(1.0, 2, part=0.5))])
    assert ends.tolist() == pytest.approx([4.0, 4.0, 1.0])


def test_flows_count():
    """Three flows against one: 3/4 and 1/4 until the first ends at 4 s, when 2 s are left of the other."""
    ends, _ = run([1.0], [(0.0, message(3.0, 0, num_flows=3.0)), (0.0, message(3.0, 0))])
    assert ends.tolist() == pytest.approx([4.0, 6.0])


def test_a_pool_of_eight_shares_serves_eight_devices_at_once():
    ends, _ = run([8.0], [(0.0, message(1.0, 0))] * 8)
    assert ends.tolist() == [1.0] * 8
    ends, _ = run([8.0], [(0.0, message(1.0, 0))] * 16)
    assert ends.tolist() == pytest.approx([2.0] * 16)


def test_a_degraded_link_takes_longer_alone():
    ends, _ = run([0.5], [(0.0, message(3.0, 0))])
    assert ends[0] == 6.0


@pytest.mark.parametrize(
    ("low_fraction", "start_s", "work_s", "end_s"), [(0.0, 0.0, 3.5, 6.5), (0.5, 0.0, 3.5, 4.5), (0.0, 5.5, 2.5, 10.5)]
)
def test_a_flapping_link_stops_or_slows_what_is_on_it(low_fraction, start_s, work_s, end_s):
    """Low in [1, 2), [3, 4), [5, 6), ..."""
    flapping = {0: FlappingLink(period_s=2.0, low_s=1.0, low_fraction=low_fraction, first_s=1.0)}
    ends, _ = run([1.0], [(start_s, message(work_s, 0))], flapping=flapping)
    assert ends[0] == pytest.approx(end_s)


def test_a_link_is_followed_again_after_a_rest():
    flapping = {0: FlappingLink(2.0, 1.0, first_s=1.0)}
    ends, _ = run([1.0], [(0.0, message(0.5, 0)), (101.5, message(0.5, 0))], flapping=flapping)
    assert ends.tolist() == pytest.approx([0.5, 102.5])


@pytest.mark.parametrize("now_s", [0.0, 0.3, 0.7, 1.0, 1.1, 12.3, 0.1 + 0.7 * 1000])
def test_the_next_change_is_the_first_one_later(now_s):
    flaps = FlappingLink(0.7, 0.2, first_s=0.1)
    index = flaps.next_change(now_s)
    assert flaps.change_s(index) > now_s
    assert index == 0 or flaps.change_s(index - 1) <= now_s


@pytest.mark.parametrize("wrong", [{"low_s": 2.0}, {"low_s": 0.0}, {"low_fraction": 1.5}, {"first_s": -3.0}])
def test_a_link_that_never_rises_is_refused(wrong):
    with pytest.raises(ValueError, match="a link flaps with"):
        FlappingLink(**({"period_s": 2.0, "low_s": 1.0} | wrong))


def test_a_dead_link_is_refused():
    with pytest.raises(ValueError, match="capacity above 0"):
        SharedLinks(EventKernel(), [1.0, 0.0])


def test_what_never_ends_is_noticed():
    kernel = EventKernel()
    links = SharedLinks(kernel, [1.0])
    links.start(message(1.0, 0), lambda: None)
    kernel.run(until_s=0.5)
    with pytest.raises(SimulationError, match="1 transfers never end"):
        links.check_idle()


def random_traffic(seed, num_transfers=40, num_resources=6):
    """Transfers of all kinds; starts on a coarse grid, so that there are ties."""
    dice = np.random.default_rng(seed)
    transfers = []
    for _ in range(num_transfers):
        chosen = dice.choice(num_resources, size=dice.integers(1, 4), replace=False)
        usage = {int(resource): float(dice.uniform(0.1, 1.0)) for resource in chosen}
        size, latency_s = float(dice.integers(1, 5)), float(dice.integers(0, 3)) / 4
        transfers.append((float(dice.integers(0, 8)), LinkTransfer(latency_s, size, usage, float(dice.integers(1, 4)))))
    flapping = {0: FlappingLink(3.0, 1.0, 0.25, first_s=0.5), 1: FlappingLink(5.0, 2.0, first_s=1.0)}
    return transfers, flapping


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_ties_does_not_matter(seed):
    transfers, flapping = random_traffic(seed)
    first, _ = run(np.ones(6), transfers, flapping=flapping)
    dice = random.Random(seed)
    for numbers in (count(0, -1), iter(dice.sample(range(10**6), 10**5))):
        again, _ = run(np.ones(6), transfers, flapping=flapping, numbers=numbers)
        np.testing.assert_allclose(again, first, rtol=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_run_gives_the_same_bits(seed):
    transfers, flapping = random_traffic(seed)
    runs = [run(np.ones(6), transfers, flapping=flapping)[0] for _ in range(2)]
    assert runs[0].tobytes() == runs[1].tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_links_carry_all_that_was_sent_and_nobody_is_faster_than_alone(seed):
    transfers, flapping = random_traffic(seed)
    ends, links = run(np.ones(6), transfers, flapping=flapping)
    sent = np.zeros(6)
    for _, transfer in transfers:
        for resource, part in transfer.usage.items():
            sent[resource] += part * transfer.wire_s
    np.testing.assert_allclose(links.carried, sent)
    alone = [start_s + transfer.latency_s + transfer.wire_s for start_s, transfer in transfers]
    assert (ends >= np.array(alone) * (1 - 1e-12)).all()
    assert ends.max() >= sent.max()


@pytest.mark.parametrize("seed", range(5))
def test_speeds_are_max_min_fair_at_any_time(seed):
    """Part C's certificate, on everything that runs, with a link of its own for each transfer's idle speed."""
    transfers, flapping = random_traffic(seed)
    slacks = []

    def look(links):
        running = links._running
        if not running:
            return
        rate = np.array([one.rate * one.unit for one in running.values()])
        entries = [
            (index, resource, part / one.unit)
            for index, one in enumerate(running.values())
            for resource, part in one.transfer.usage.items()
        ]
        entries += [(index, 6 + index, 1.0) for index in range(len(running))]
        flow, link, weight = (np.array(column) for column in zip(*sorted(entries), strict=True))
        capacity = np.array([links.available(r) for r in range(6)] + [one.unit for one in running.values()])
        is_down = capacity == 0.0
        stopped = np.isin(np.arange(len(rate)), flow[np.isin(link, np.flatnonzero(is_down))])
        assert (rate[stopped] == 0.0).all()
        kept = ~stopped[flow]
        number = np.cumsum(~stopped) - 1
        incidence = Incidence(int((~stopped).sum()), len(capacity), number[flow[kept]], link[kept], weight[kept])
        slacks.append(bottleneck_slack(incidence, np.where(is_down, 1.0, capacity), rate[~stopped]))

    run(np.ones(6), transfers, flapping=flapping, watch=[(0.31 + 0.47 * step, look) for step in range(60)])
    assert len(slacks) > 30
    assert max(slacks) < 1e-9
