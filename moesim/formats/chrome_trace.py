"""Timelines as Trace Event JSON, for Perfetto (ui.perfetto.dev) and Chrome's tracing page.

A process is a rank, a thread one of its streams. Times are whole nanoseconds, written as microseconds as the format asks.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from moesim import __version__
from moesim.engine.memory_timeline import MemoryTimeline
from moesim.engine.timelines import STREAMS, Messages, Timeline
from moesim.errors import FormatError, Problem
from moesim.resources import replaced_file
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.step_graph import CATEGORIES

PHASE_NAMES: tuple[str, ...] = ("forward", "backward", "weight_gradient", "step_end")
COMPRESSION_LEVEL = 4
EVENTS_PER_CHUNK = 16384
MESSAGE_NAME = "pipeline message"
MEMORY_NAME = "memory"
LINK_STREAMS: tuple[str, ...] = tuple(name for name in STREAMS if name not in ("compute", "host"))
"""Streams whose bytes cross a link; each has a counter of bytes per second."""

# Kinds of events in the order in which they stand at one time: a slice before the arrow that is bound to it.
_COUNTER, _SLICE, _ARROW_END, _ARROW_START = range(4)


@dataclass(frozen=True)
class TraceProcess:
    """What a recorded rank is: its pipeline stage, and every rank of its class where it stands for several."""

    rank: int
    stage: int | None = None
    stands_for: Sequence[int] = ()

    @property
    def name(self) -> str:
        """Title of the process."""
        title = f"rank {self.rank}"
        if self.stage is not None:
            title += f", stage {self.stage}"
        others = len(set(self.stands_for) - {self.rank})
        return f"{title} (and {others} like it)" if others else title

    @property
    def labels(self) -> str:
        """Ranks it stands for, or nothing."""
        ranks = sorted({self.rank, *self.stands_for})
        return f"stands for ranks {rank_ranges(ranks)}" if len(ranks) > 1 else ""


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ascending numbers as ranges.

    Examples
    --------
    >>> rank_ranges([0, 1, 2, 8, 10, 11])
    '0-2, 8, 10-11'
    """
    numbers = np.asarray(ranks, dtype=np.int64)
    if not len(numbers):
        return ""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


@dataclass(frozen=True)
class ChromeTrace:
    """A trace that was read: the timeline to the nanosecond, its processes, counters by name, and other data.

    ``counters[rank, name]`` are the times and, by series, the values.
    """

    timeline: Timeline
    processes: tuple[TraceProcess, ...]
    counters: Mapping[tuple[int, str], tuple[FloatArray, Mapping[str, FloatArray]]] = field(default_factory=dict)
    other_data: Mapping[str, Any] = field(default_factory=dict)


def write_chrome_trace(
    timeline: Timeline,
    path: str | Path,
    *,
    processes: Sequence[TraceProcess] = (),
    memory: MemoryTimeline | None = None,
    other_data: Mapping[str, Any] | None = None,
) -> int:
    """Write a timeline as Trace Event JSON; an existing file is replaced in one go.

    Equal timelines give equal bytes.

    Parameters
    ----------
    timeline : Timeline
        What ran when.
    path : str or Path
        The file; compressed where its name ends in ``.gz``.
    processes : sequence of TraceProcess
        What the recorded ranks are; a rank without an entry is called by its number.
    memory : MemoryTimeline, optional
        Bytes on the recorded ranks over time.
    other_data : mapping, optional
        Facts about the run, put into ``otherData``.

    Returns
    -------
    int
        Number of events written.

    Raises
    ------
    OSError
        If the file cannot be written; what was there before is untouched.

    Notes
    -----
    Complete events ("X") for operations, flow events ("s", "f") for messages between stages, counters ("C") for memory
    and the bytes per second of each kind of communication, metadata ("M") for names. All events are in order of time.

    References
    ----------
    Trace Event Format, Google, 2016.
    """
    path = Path(path)
    count = 0
    with _text_stream(path) as stream:
        header = {"displayTimeUnit": "ms", "otherData": {"moesim_version": __version__, **(other_data or {})}}
        stream.write(json.dumps(header, allow_nan=False)[:-1] + ', "traceEvents": [\n')
        separator = ""
        for events in _events(timeline, processes, memory):
            stream.write(separator + ",\n".join(events))
            separator = ",\n"
            count += len(events)
        stream.write("\n]}\n")
    return count


@contextmanager
def _text_stream(path: Path) -> Iterator[TextIO]:
    """UTF-8 text into a file that is replaced at the end; the same text gives the same bytes, compressed or not."""
    with replaced_file(path) as raw:
        if path.suffix == ".gz":
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION_LEVEL, fileobj=raw, mtime=0)
            with packed, TextIOWrapper(packed, encoding="utf-8", newline="\n") as stream:
                yield stream
        else:
            stream = TextIOWrapper(raw, encoding="utf-8", newline="\n")
            yield stream
            stream.flush()
            stream.detach()


def _events(
    timeline: Timeline, processes: Sequence[TraceProcess], memory: MemoryTimeline | None
) -> Iterator[list[str]]:
    """Events as JSON texts, in lists of bounded length: names first, then all others by time."""
    yield list(_metadata(timeline, processes))
    slices = _Slices(timeline)
    arrows = _Arrows(timeline, slices)
    counters = [*_link_counters(timeline, slices), *_memory_counters(memory)]
    sources: list[tuple[int, IntArray]] = [
        (_SLICE, slices.start_ns),
        (_ARROW_START, arrows.source_ns),
        (_ARROW_END, arrows.target_ns),
        *((_COUNTER, counter.time_ns) for counter in counters),
    ]
    times = np.concatenate([time_ns for _, time_ns in sources])
    kinds = np.concatenate([np.full(len(time_ns), kind, dtype=np.int8) for kind, time_ns in sources])
    order = np.lexsort((kinds, times))
    number_of_source = np.concatenate([np.full(len(time_ns), i) for i, (_, time_ns) in enumerate(sources)])[order]
    row = np.concatenate([np.arange(len(time_ns)) for _, time_ns in sources])[order]
    writers = [slices.text, arrows.start_text, arrows.end_text, *(counter.text for counter in counters)]
    for first in range(0, len(order), EVENTS_PER_CHUNK):
        part = slice(first, first + EVENTS_PER_CHUNK)
        numbers, rows = number_of_source[part].tolist(), row[part].tolist()
        yield [writers[number](index) for number, index in zip(numbers, rows, strict=True)]


def _metadata(timeline: Timeline, processes: Sequence[TraceProcess]) -> Iterator[str]:
    """Names and order of processes and threads."""
    known = {process.rank: process for process in processes}
    for position, rank in enumerate(np.unique(timeline.rank).tolist()):
        process = known.get(rank, TraceProcess(rank))
        yield _named("process_name", rank, 0, {"name": process.name})
        if process.labels:
            yield _named("process_labels", rank, 0, {"labels": process.labels})
        yield _named("process_sort_index", rank, 0, {"sort_index": position})
        for stream in np.unique(timeline.stream[timeline.rank == rank]).tolist():
            yield _named("thread_name", rank, stream + 1, {"name": STREAMS[stream]})
            yield _named("thread_sort_index", rank, stream + 1, {"sort_index": stream})


def _named(kind: str, pid: int, tid: int, arguments: Mapping[str, Any]) -> str:
    return json.dumps({"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": dict(arguments)})


def nanoseconds(time_s: FloatArray) -> IntArray:
    """Seconds as whole nanoseconds."""
    return np.rint(np.asarray(time_s) * 1e9).astype(np.int64)


def _microseconds(time_ns: int) -> str:
    whole, rest = divmod(time_ns, 1000)
    return f"{whole}.{rest:03d}" if rest else str(whole)


class _Slices:
    """Operations as complete events; both ends are rounded, so that what follows one another never overlaps."""

    def __init__(self, timeline: Timeline) -> None:
        self.start_ns = nanoseconds(timeline.start_s)
        self.end_ns = np.maximum(nanoseconds(timeline.end_s), self.start_ns)
        self._starts = self.start_ns.tolist()
        self._durations = (self.end_ns - self.start_ns).tolist()
        self._heads = self._head_texts(timeline)
        self._arguments = self._argument_texts(timeline)

    @staticmethod
    def _head_texts(timeline: Timeline) -> tuple[list[str], list[int]]:
        """Texts of the distinct (rank, stream, name, category), and which of them each operation has."""
        columns = np.stack([timeline.rank, timeline.stream, timeline.name, timeline.category], axis=1, dtype=np.int64)
        distinct, inverse = np.unique(columns, axis=0, return_inverse=True)
        texts = [
            f'{{"ph":"X","pid":{rank},"tid":{stream + 1},"name":{json.dumps(timeline.names[name])},'
            f'"cat":"{CATEGORIES[category]}","ts":'
            for rank, stream, name, category in distinct.tolist()
        ]
        return texts, inverse.reshape(-1).tolist()

    @staticmethod
    def _argument_texts(timeline: Timeline) -> tuple[list[str], list[int]]:
        """Texts of the distinct arguments, and which of them each operation has."""
        columns = [timeline.phase, timeline.micro_batch, timeline.chunk, timeline.layer]
        table = np.stack([*columns, np.asarray(timeline.num_bytes, dtype=np.float64).view(np.int64)], axis=1)
        distinct, inverse = np.unique(table.astype(np.int64), axis=0, return_inverse=True)
        num_bytes = distinct[:, 4].copy().view(np.float64)
        texts = []
        for (phase, micro_batch, chunk, layer, _), size in zip(distinct.tolist(), num_bytes.tolist(), strict=True):
            arguments = [f'"phase":"{PHASE_NAMES[phase]}"']
            for name, value in (("micro_batch", micro_batch), ("chunk", chunk), ("layer", layer)):
                if value >= 0:
                    arguments.append(f'"{name}":{value}')
            if size:
                arguments.append(f'"bytes":{_number(size)}')
            texts.append(f',"args":{{{",".join(arguments)}}}}}')
        return texts, inverse.reshape(-1).tolist()

    def text(self, row: int) -> str:
        heads, arguments = self._heads, self._arguments
        start, duration = _microseconds(self._starts[row]), _microseconds(self._durations[row])
        return f'{heads[0][heads[1][row]]}{start},"dur":{duration}{arguments[0][arguments[1][row]]}'


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
