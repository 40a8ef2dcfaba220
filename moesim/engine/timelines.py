"""What ran when on each rank's streams, as arrays: one entry per operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from moesim.structure.columns import FloatArray, IntArray

STREAMS: tuple[str, ...] = (
    "compute",
    "all_to_all",
    "tensor_parallel",
    "expert_tensor_parallel",
    "context_parallel",
    "data_parallel",
    "pipeline_p2p",
    "host",
    "pcie",
)
COMPUTE_STREAM = STREAMS.index("compute")
TIMELINE_PHASES: tuple[str, ...] = ("forward", "backward", "weight_gradient", "step_end")
"""Names of ``Timeline.phase``; ``backward``: both gradients or, where a schedule splits them, that of activations."""

Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Messages:
    """Transfers between stages, arrays (n_messages,): who sent when, who had received when, bytes of one rank."""

    source_rank: IntArray
    source_s: FloatArray
    target_rank: IntArray
    target_s: FloatArray
    num_bytes: FloatArray

    def __len__(self) -> int:
        return len(self.source_rank)


@dataclass(frozen=True)
class Timeline:
    """Operations of some ranks, arrays (n_events,), sorted by (rank, stream, start).

    Attributes
    ----------
    rank : ndarray of int64
        Global rank.
    stream : ndarray of int8
        Index into ``STREAMS``.
    name : ndarray of int32
        Index into ``names``.
    category : ndarray of int8
        Index into ``structure.step_graph.CATEGORIES``.
    start_s, end_s : ndarray
        Seconds since the step began.
    layer, micro_batch, chunk : ndarray of int32
        Where it belongs; -1 where it belongs to none. Chunks are numbered in model order.
    phase : ndarray of int8
        Index into ``TIMELINE_PHASES``.
    num_bytes : ndarray
        Bytes that a communication moves, per rank; 0 for the others.
    names : tuple of str
        Names of operations.
    messages : Messages
        Transfers between stages, both ends among the recorded ranks.
    """

    rank: IntArray
    stream: Int8Array
    name: Int32Array
    category: Int8Array
    start_s: FloatArray
    end_s: FloatArray
    layer: Int32Array
    micro_batch: Int32Array
    chunk: Int32Array
    phase: Int8Array
    num_bytes: FloatArray
    names: tuple[str, ...]
    messages: Messages

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def ranks(self) -> IntArray:
        """Recorded ranks, rising."""
        return np.unique(self.rank)

    @property
    def end(self) -> float:
        """When the last recorded operation ends; 0 without any."""
        return float(self.end_s.max(initial=0.0))

    def take(self, events: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Timeline:
        """Some of the events, in the order given; messages stay."""
        arrays = {name: getattr(self, name)[events] for name in EVENT_FIELDS}
        return Timeline(**arrays, names=self.names, messages=self.messages)

    def of_ranks(self, ranks: Sequence[int]) -> Timeline:
        """Events of some ranks, and messages between them."""
        kept = np.isin(self.messages.source_rank, ranks) & np.isin(self.messages.target_rank, ranks)
        arrays = {field.name: getattr(self.messages, field.name)[kept] for field in fields(Messages)}
        return replace(self.take(np.isin(self.rank, ranks)), messages=Messages(**arrays))

    def sorted(self) -> Timeline:
        """The same events in the order of the class."""
        return self.take(np.lexsort((self.end_s, self.start_s, self.stream, self.rank)))


EVENT_FIELDS: tuple[str, ...] = tuple(
    field.name for field in fields(Timeline) if field.name not in ("names", "messages")
)
EVENT_TYPES: dict[str, type[np.generic]] = {
    "rank": np.int64,
    "stream": np.int8,
    "name": np.int32,
    "category": np.int8,
    "start_s": np.float64,
    "end_s": np.float64,
    "layer": np.int32,
    "micro_batch": np.int32,
    "chunk": np.int32,
    "phase": np.int8,
    "num_bytes": np.float64,
}


def empty_messages() -> Messages:
    """No messages."""
    whole, seconds = np.zeros(0, dtype=np.int64), np.zeros(0)
    return Messages(whole, seconds, whole, seconds, seconds)


def empty_timeline() -> Timeline:
    """No events."""
    arrays = {name: np.zeros(0, dtype=kind) for name, kind in EVENT_TYPES.items()}
    return Timeline(**arrays, names=(), messages=empty_messages())


def concatenated(timelines: Iterable[Timeline]) -> Timeline:
    """Several timelines as one, sorted; names are joined, equal names become one."""
    parts = list(timelines)
    if not parts:
        return empty_timeline()
    number: dict[str, int] = {}
    for part in parts:
        for name in part.names:
            number.setdefault(name, len(number))
    arrays: dict[str, npt.NDArray[np.generic]] = {
        field: np.concatenate([getattr(part, field) for part in parts]) for field in EVENT_FIELDS
    }
    renumbered = [np.array([number[name] for name in part.names], dtype=np.int32)[part.name] for part in parts]
    arrays["name"] = np.concatenate(renumbered)
    messages = {
        field.name: np.concatenate([getattr(part.messages, field.name) for part in parts]) for field in fields(Messages)
    }
    return Timeline(**arrays, names=tuple(number), messages=Messages(**messages)).sorted()  # type: ignore[arg-type]


@dataclass(frozen=True)
class StreamSeconds:
    """Seconds per recorded rank and stream, arrays (n_ranks, n_streams).

    ``busy_s`` sums the operations; ``exposed_s`` is that part of it during which the rank's compute stream does nothing
    (for the compute stream itself, all of it); ``idle_s`` is the rest of ``step_time_s``.
    """

    ranks: IntArray
    step_time_s: float
    busy_s: FloatArray
    exposed_s: FloatArray
    idle_s: FloatArray


def stream_seconds(timeline: Timeline, step_time_s: float | None = None) -> StreamSeconds:
    """Busy, exposed and idle seconds of each recorded rank's streams.

    Parameters
    ----------
    timeline : Timeline
        Events in its order.
    step_time_s : float or None
        Length of the step; None, the end of the last recorded operation.
    """
    ranks, row = np.unique(timeline.rank, return_inverse=True)
    shape = (len(ranks), len(STREAMS))
    step = timeline.end if step_time_s is None else step_time_s
    seconds = timeline.end_s - timeline.start_s
    covered = seconds_computing(timeline, row, timeline.end_s) - seconds_computing(timeline, row, timeline.start_s)
    is_compute = timeline.stream == COMPUTE_STREAM
    busy, exposed = np.zeros(shape), np.zeros(shape)
    np.add.at(busy, (row, timeline.stream), seconds)
    np.add.at(exposed, (row, timeline.stream), np.where(is_compute, seconds, np.maximum(seconds - covered, 0.0)))
    return StreamSeconds(ranks, step, busy, exposed, step - busy)


def seconds_computing(timeline: Timeline, rank_row: IntArray, until_s: FloatArray) -> FloatArray:
    """How long the compute stream of each event's rank has worked until some moment.

    Parameters
    ----------
    timeline : Timeline
        Events in its order.
    rank_row : ndarray of shape (n_events,)
        Position of each event's rank among the recorded ranks.
    until_s : ndarray of shape (n_events,)
        Moments.
    """
    on_compute = np.flatnonzero(timeline.stream == COMPUTE_STREAM)
    if not len(on_compute):
        return np.zeros(len(until_s))
    start, end = timeline.start_s[on_compute], timeline.end_s[on_compute]
    period = max(timeline.end, float(until_s.max(initial=0.0))) + 1.0  # ranks one after the other on one axis
    before = np.concatenate([[0.0], np.cumsum(end - start)])
    first_of_rank = np.searchsorted(rank_row[on_compute], np.arange(int(rank_row.max()) + 1))
    last = np.searchsorted(start + rank_row[on_compute] * period, until_s + rank_row * period, side="right")
    running = np.maximum(last - 1, 0)
    inside = np.where(last > first_of_rank[rank_row], np.maximum(end[running] - until_s, 0.0), 0.0)
    return np.asarray(before[last] - before[first_of_rank[rank_row]] - inside)
