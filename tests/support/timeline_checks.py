"""Checks that any timeline must pass: what no machine can do, whatever the scenario."""

from __future__ import annotations

import numpy as np

from moesim.engine.timelines import STREAMS, Timeline

TOLERANCE = 1e-9
"""Of the step: sums in another order."""


def overlapping_events(timeline: Timeline) -> int:
    """Events that begin on a stream before the one before them has ended."""
    same = (np.diff(timeline.rank) == 0) & (np.diff(timeline.stream) == 0)
    slack = TOLERANCE * timeline.end
    return int(np.count_nonzero(same & (timeline.start_s[1:] < timeline.end_s[:-1] - slack)))


def unsorted_events(timeline: Timeline) -> int:
    """Events that are not in the order of the class, begin before the step or end before they begin."""
    before = np.zeros(max(len(timeline) - 1, 0), dtype=bool)
    for values in (timeline.start_s, timeline.stream, timeline.rank):
        before = (values[1:] < values[:-1]) | ((values[1:] == values[:-1]) & before)
    wrong = (timeline.end_s < timeline.start_s) | (timeline.start_s < 0)
    return int(np.count_nonzero(before) + np.count_nonzero(wrong))


def early_passes(timeline: Timeline) -> int:
    """Passes that compute before what they need is computed; one recorded rank for each stage, or none of the rest.

    A forward follows that of the chunk before it, gradients the activation gradient of the chunk after it and their own
    forward. Messages arrive after they leave.
    """
    slack = TOLERANCE * timeline.end
    computes = (timeline.stream == STREAMS.index("compute")) & (timeline.micro_batch >= 0)
    own = timeline.take(computes)
    shape = (3, int(own.chunk.max(initial=0)) + 1, int(own.micro_batch.max(initial=0)) + 1)
    begin, end = np.full(shape, np.inf), np.full(shape, -np.inf)
    at = (own.phase.astype(np.int64), own.chunk, own.micro_batch)
    np.minimum.at(begin, at, own.start_s)
    np.maximum.at(end, at, own.end_s)
    wrong = np.count_nonzero(begin[0, 1:] < end[0, :-1] - slack)
    for gradients in begin[1:]:
        wrong += np.count_nonzero(gradients[:-1] < end[1, 1:] - slack) + np.count_nonzero(gradients < end[0] - slack)
    return int(wrong + np.count_nonzero(timeline.messages.target_s < timeline.messages.source_s))


def separate_ends(timeline: Timeline, members: np.ndarray) -> int:
    """In-line collectives of a group whose recorded members do not start and end together.

    ``members`` are recorded ranks of one group; operations are matched by their order on the stream among those of the
    same name, layer, pass and category that run in line, i.e. while the rank does not compute.
    """
    wrong = 0
    first = None
    for rank in members:
        own = timeline.take((timeline.rank == rank) & (timeline.stream == STREAMS.index("all_to_all")))
        computing = timeline.take((timeline.rank == rank) & (timeline.stream == STREAMS.index("compute")))
        after = np.searchsorted(computing.start_s, own.start_s + TOLERANCE * timeline.end, side="right") - 1
        busy_until = np.where(after >= 0, computing.end_s[np.maximum(after, 0)], 0.0)
        in_line = own.take(busy_until <= own.start_s + TOLERANCE * timeline.end)
        moments = np.stack([in_line.start_s, in_line.end_s], axis=1)
        if first is None:
            first = moments
        elif len(first) != len(moments):
            wrong += abs(len(first) - len(moments))
        else:
            wrong += int(np.count_nonzero(np.abs(first - moments) > TOLERANCE * timeline.end))
    return wrong
