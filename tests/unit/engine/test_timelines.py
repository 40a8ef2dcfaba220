from __future__ import annotations

import numpy as np
import pytest

from moesim.engine.timelines import (
    EVENT_TYPES,
    STREAMS,
    Messages,
    Timeline,
    concatenated,
    empty_timeline,
    stream_seconds,
)

COMPUTE, ALL_TO_ALL = STREAMS.index("compute"), STREAMS.index("all_to_all")


def timeline(*rows: tuple[int, int, float, float], names: tuple[str, ...] = ("work",)) -> Timeline:
    """Events (rank, stream, start, end)."""
    rank, stream, start, end = (np.array(column) for column in zip(*rows, strict=True))
    given = {"rank": rank, "stream": stream, "start_s": start, "end_s": end}
    arrays = {name: given.get(name, np.zeros(len(rows))).astype(kind) for name, kind in EVENT_TYPES.items()}
    source = np.array([0])
    messages = Messages(source, np.array([1.0]), source + 1, np.array([2.0]), np.array([8.0]))
    return Timeline(**arrays, names=names, messages=messages).sorted()


def test_an_empty_timeline_has_no_end_and_no_ranks():
    empty = empty_timeline()
    assert len(empty) == 0
    assert empty.end == 0.0
    assert empty.ranks.tolist() == []
    assert len(concatenated([])) == 0


def test_events_are_sorted_by_rank_stream_and_start():
    found = timeline((1, 0, 0.0, 1.0), (0, 1, 5.0, 6.0), (0, 0, 3.0, 4.0), (0, 0, 1.0, 2.0))
    assert found.rank.tolist() == [0, 0, 0, 1]
    assert found.start_s.tolist() == [1.0, 3.0, 5.0, 0.0]


def test_a_part_by_rank_keeps_the_messages_between_its_ranks():
    found = timeline((0, 0, 0.0, 1.0), (1, 0, 2.0, 3.0), (2, 0, 0.0, 9.0))
    assert found.of_ranks([0, 1]).end == 3.0
    assert len(found.of_ranks([0, 1]).messages) == 1
    assert len(found.of_ranks([0, 2]).messages) == 0


def test_timelines_join_under_one_list_of_names():
    one = timeline((0, 0, 0.0, 1.0), names=("attention",))
    two = timeline((1, 0, 0.0, 2.0), (1, 0, 3.0, 4.0), names=("router", "attention"))
    two.name[1] = 1
    both = concatenated([two, one])
    assert [both.names[index] for index in both.name] == ["attention", "router", "attention"]
    assert len(both.messages) == 2


def test_communication_is_exposed_while_the_rank_does_not_compute():
    found = timeline(
        (0, COMPUTE, 0.0, 2.0),
        (0, COMPUTE, 5.0, 6.0),
        (0, ALL_TO_ALL, 1.0, 5.5),
        (3, ALL_TO_ALL, 0.0, 2.0),
        (3, COMPUTE, 1.5, 1.75),
    )
    seconds = stream_seconds(found, 10.0)
    assert seconds.ranks.tolist() == [0, 3]
    assert seconds.busy_s[:, COMPUTE].tolist() == [3.0, 0.25]
    assert seconds.exposed_s[:, ALL_TO_ALL].tolist() == [3.0, 1.75]
    assert seconds.idle_s[0, [COMPUTE, ALL_TO_ALL]].tolist() == [7.0, 5.5]


def test_busy_exposed_and_idle_are_those_of_counting_instant_by_instant():
    dice = np.random.default_rng(1)
    rows, busy = [], np.zeros((2, 2, 1000), dtype=bool)
    for rank in range(2):
        for stream in (COMPUTE, ALL_TO_ALL):
            edges = np.sort(dice.choice(1000, 40, replace=False))
            for start, end in zip(edges[::2], edges[1::2], strict=True):
                rows.append((rank, stream, start / 1000, end / 1000))
                busy[rank, stream, start:end] = True
    seconds = stream_seconds(timeline(*rows), 1.0)
    np.testing.assert_allclose(seconds.busy_s[:, :2], busy.mean(axis=2))
    np.testing.assert_allclose(seconds.exposed_s[:, 1], (busy[:, 1] & ~busy[:, 0]).mean(axis=1))
    np.testing.assert_allclose(seconds.idle_s[:, :2], 1.0 - busy.mean(axis=2))


def test_without_a_step_time_the_last_event_ends_it():
    assert stream_seconds(timeline((0, ALL_TO_ALL, 0.5, 2.0))).step_time_s == pytest.approx(2.0)
