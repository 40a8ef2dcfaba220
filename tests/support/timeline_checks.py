"""Checks that any timeline must pass: what a machine cannot do, whatever the scenario."""

from __future__ import annotations

import numpy as np

from moesim.engine.timelines import STREAMS, Timeline

TOLERANCE = 1e-9
HOST, COMPUTE = STREAMS.index("host"), STREAMS.index("compute")


def overlapping_events(timeline: Timeline) -> int:
    """Events that begin on a stream before the one before them has ended."""
    same = (np.diff(timeline.rank) == 0) & (np.diff(timeline.stream) == 0)
    slack = TOLERANCE * max(timeline.end, 1e-12)
    return int(np.count_nonzero(same & (timeline.start_s[1:] < timeline.end_s[:-1] - slack)))


def out_of_order(timeline: Timeline) -> int:
    """Events that are not in the order of the class, or take no time."""
    keys = (timeline.rank, timeline.stream, timeline.start_s)
    before = np.zeros(max(len(timeline) - 1, 0), dtype=bool)
    for values in reversed(keys):
        before = (values[1:] < values[:-1]) | ((values[1:] == values[:-1]) & before)
    return int(np.count_nonzero(before) + np.count_nonzero(timeline.end_s < timeline.start_s))


def late_messages(timeline: Timeline) -> int:
    """Messages that arrive before they leave, or after the receiver has begun what reads them."""
    return int(np.count_nonzero(timeline.messages.target_s < timeline.messages.source_s))
