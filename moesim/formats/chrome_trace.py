"""Timelines as Trace Event JSON, for Perfetto (ui.perfetto.dev) and Chrome's tracing page.

A process is a rank, a thread one of its streams. Times are whole nanoseconds, written as the format's microseconds.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesim import __version__
from moesim.engine.memory_timeline import MemoryTimeline
from moesim.engine.timelines import (
    COMPUTE_STREAM,
    EVENT_TYPES,
    STREAMS,
    TIMELINE_PHASES,
    Messages,
    Timeline,
)
from moesim.errors import FormatError, Problem, SimulationError
from moesim.estimation.simulated_step import SimulatedStep
from moesim.resources import replaced_file
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.placement import parse_rank_ranges, rank_ranges
from moesim.structure.step_graph import CATEGORIES

COMPRESSION_LEVEL = 4
EVENTS_PER_CHUNK = 16384
TRANSFER_STREAM = STREAMS.index("pipeline_p2p")
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


@dataclass(frozen=True)
class ChromeTrace:
    """A trace that was read: the timeline to the nanosecond, its processes, memory where it has any, other data."""

    timeline: Timeline
    processes: tuple[TraceProcess, ...]
    memory: MemoryTimeline | None
    other_data: Mapping[str, Any]


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
    _require_finite(timeline)
    count = 0
    facts = {"moesim_version": __version__, **(other_data or {}), "processes": [_fact(item) for item in processes]}
    with _writer(path) as write:
        header = {"displayTimeUnit": "ms", "otherData": facts}
        write(json.dumps(header, allow_nan=False)[:-1] + ', "traceEvents": [\n')
        separator = ""
        for events in _events(timeline, processes, memory):
            write(separator + ",\n".join(events))
            separator = ",\n"
            count += len(events)
        write("\n]}\n")
    return count


def write_simulated_trace(answer: SimulatedStep, path: str | Path) -> int:
    """Write what a simulation recorded of its first draw; as ``write_chrome_trace``."""
    if answer.recording is None:
        raise ValueError("nothing was recorded")
    processes = [TraceProcess(rank.rank, rank.stage, rank.stands_for) for rank in answer.ranks]
    facts = {
        "scenario": answer.estimate.scenario,
        "engine": answer.estimate.engine,
        "seed": answer.seed,
        "step_time_s": answer.recorded_step_time_s,
    }
    recording = answer.recording
    return write_chrome_trace(recording.timeline, path, processes=processes, memory=recording.memory, other_data=facts)


def _require_finite(timeline: Timeline) -> None:
    for name in ("start_s", "end_s", "num_bytes"):
        if not np.isfinite(getattr(timeline, name)).all():
            raise SimulationError(f"a timeline whose {name} are not all finite cannot be written")


def _fact(process: TraceProcess) -> dict[str, Any]:
    """What a process is, for programs."""
    ranks = rank_ranges(sorted({process.rank, *process.stands_for}))
    return {"rank": process.rank, "stage": process.stage, "stands_for": ranks}


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[str], object]]:
    """What writes text to a file that is replaced at the end; the same text gives the same bytes, compressed or not."""
    with replaced_file(path) as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION_LEVEL, fileobj=raw, mtime=0) as packed:
                yield lambda text: packed.write(text.encode())
        else:
            yield lambda text: raw.write(text.encode())


def _events(
    timeline: Timeline, processes: Sequence[TraceProcess], memory: MemoryTimeline | None
) -> Iterator[list[str]]:
    """Events as JSON texts, in lists of bounded length: names first, then all others by time."""
    yield list(_metadata(timeline, processes, memory))
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


def _metadata(timeline: Timeline, processes: Sequence[TraceProcess], memory: MemoryTimeline | None) -> Iterator[str]:
    """Names and order of processes and threads."""
    known = {process.rank: process for process in processes}
    ranks = {*known, *timeline.ranks.tolist(), *([] if memory is None else memory.rank.tolist())}
    for position, rank in enumerate(sorted(ranks)):
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


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


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
        whole = np.asarray(timeline.num_bytes, dtype=np.float64).view(np.int64)
        columns = (timeline.phase, timeline.micro_batch, timeline.chunk, timeline.layer, whole)
        table = np.stack([column.astype(np.int64) for column in columns], axis=1)
        distinct, inverse = np.unique(table, axis=0, return_inverse=True)
        num_bytes = distinct[:, 4].copy().view(np.float64)
        texts = []
        for (phase, micro_batch, chunk, layer, _), size in zip(distinct.tolist(), num_bytes.tolist(), strict=True):
            arguments = [f'"phase":"{TIMELINE_PHASES[phase]}"']
            for name, value in (("micro_batch", micro_batch), ("chunk", chunk), ("layer", layer)):
                if value >= 0:
                    arguments.append(f'"{name}":{value}')
            if size:
                arguments.append(f'"bytes":{_number(size)}')
            texts.append(f',"args":{{{",".join(arguments)}}}}}')
        return texts, inverse.reshape(-1).tolist()

    def text(self, row: int) -> str:
        """JSON of one operation."""
        heads, arguments = self._heads, self._arguments
        start, duration = _microseconds(self._starts[row]), _microseconds(self._durations[row])
        return f'{heads[0][heads[1][row]]}{start},"dur":{duration}{arguments[0][arguments[1][row]]}'


class _Arrows:
    """Messages as flow events, each end bound to a slice of its rank; viewers draw an arrow only between slices.

    An arrow starts in the transfer that runs then, else in what the sender computed last, and ends in what the receiver
    computes next. Where nothing is left to bind to, the arrow is left out. Its true times are among its arguments.
    """

    def __init__(self, timeline: Timeline, slices: _Slices) -> None:
        messages = timeline.messages
        sent_ns, received_ns = nanoseconds(messages.source_s), nanoseconds(messages.target_s)
        sources = _bound_ends(messages.source_rank, sent_ns, timeline, slices, is_source=True)
        targets = _bound_ends(messages.target_rank, received_ns, timeline, slices, is_source=False)
        kept = np.flatnonzero((sources.tid > 0) & (targets.tid > 0))
        self.source_ns, self.target_ns = sources.time_ns[kept], targets.time_ns[kept]
        self._source_rank, self._target_rank = messages.source_rank[kept].tolist(), messages.target_rank[kept].tolist()
        self._source_tid, self._target_tid = sources.tid[kept].tolist(), targets.tid[kept].tolist()
        self._source_times, self._target_times = self.source_ns.tolist(), self.target_ns.tolist()
        self._bytes = messages.num_bytes[kept].tolist()
        self._sent, self._received = sent_ns[kept].tolist(), received_ns[kept].tolist()

    def start_text(self, row: int) -> str:
        """JSON of the beginning of one arrow."""
        place = f'"pid":{self._source_rank[row]},"tid":{self._source_tid[row]}'
        sent, received = _microseconds(self._sent[row]), _microseconds(self._received[row])
        arguments = f'"args":{{"bytes":{_number(self._bytes[row])},"sent_us":{sent},"received_us":{received}}}'
        return f'{{"ph":"s",{self._text(row, place, self._source_times[row])},{arguments}}}'

    def end_text(self, row: int) -> str:
        """JSON of the end of one arrow."""
        place = f'"pid":{self._target_rank[row]},"tid":{self._target_tid[row]}'
        return f'{{"ph":"f","bp":"e",{self._text(row, place, self._target_times[row])}}}'

    def _text(self, row: int, place: str, time_ns: int) -> str:
        return f'{place},"id":{row + 1},"name":"{MESSAGE_NAME}","cat":"pipeline_p2p","ts":{_microseconds(time_ns)}'


class _Ends(NamedTuple):
    """Ends of arrows, arrays (n_arrows,): times moved into a slice, and its thread; 0 where there is none."""

    time_ns: IntArray
    tid: IntArray


def _bound_ends(ranks: IntArray, time_ns: IntArray, timeline: Timeline, slices: _Slices, *, is_source: bool) -> _Ends:
    """Bind the ends of arrows on some ranks, by the first rule that finds a slice."""
    ends = _Ends(time_ns.copy(), np.zeros_like(time_ns))
    others = [stream for stream in range(len(STREAMS)) if stream != COMPUTE_STREAM]
    rules: list[tuple[_Rule, int]] = [(_running, TRANSFER_STREAM), (_last_begun, COMPUTE_STREAM)]
    rules += [(_last_begun, stream) for stream in others]
    if not is_source:
        rules = [(_next_to_end, stream) for stream in (COMPUTE_STREAM, *others)]
    for rank in np.unique(ranks).tolist():
        own = np.flatnonzero((timeline.rank == rank) & (slices.end_ns > slices.start_ns))
        for rule, stream in rules:
            open_ends = np.flatnonzero((ranks == rank) & (ends.tid == 0))
            chosen = own[timeline.stream[own] == stream]
            if len(open_ends) and len(chosen):
                moved = rule(time_ns[open_ends], slices.start_ns[chosen], slices.end_ns[chosen])
                found = moved >= 0
                ends.time_ns[open_ends[found]] = moved[found]
                ends.tid[open_ends[found]] = stream + 1
    return ends


_Rule = Callable[[IntArray, IntArray, IntArray], IntArray]
"""Times and the starts and ends of slices that follow one another -> times inside a slice; -1 where there is none."""


def _running(time_ns: IntArray, start: IntArray, end: IntArray) -> IntArray:
    """The same times, where a slice is running."""
    at = np.searchsorted(start, time_ns, side="right") - 1
    return np.where((at >= 0) & (time_ns < end[at]), time_ns, -1)


def _last_begun(time_ns: IntArray, start: IntArray, end: IntArray) -> IntArray:
    """Times in the last slice that began before; at its end where it has ended."""
    at = np.searchsorted(start, time_ns, side="left") - 1
    return np.where(at >= 0, np.minimum(time_ns, end[at] - 1), -1)


def _next_to_end(time_ns: IntArray, start: IntArray, end: IntArray) -> IntArray:
    """Times in the first slice that ends later; at its start where it has not begun."""
    at = np.searchsorted(end, time_ns, side="right")
    inside = np.minimum(at, len(end) - 1)
    return np.where(at < len(end), np.maximum(time_ns, start[inside]), -1)


class _Counter:
    """Values over time of one counter of one rank, one or several series."""

    def __init__(self, rank: int, name: str, time_ns: IntArray, series: Mapping[str, FloatArray]) -> None:
        self.time_ns = time_ns
        self._head = f'{{"ph":"C","pid":{rank},"name":{json.dumps(name)},"ts":'
        self._times = time_ns.tolist()
        self._series = [(json.dumps(key), np.asarray(values).tolist()) for key, values in series.items()]

    def text(self, row: int) -> str:
        """JSON of one point."""
        values = ",".join(f"{key}:{_number(column[row])}" for key, column in self._series)
        return f'{self._head}{_microseconds(self._times[row])},"args":{{{values}}}}}'


def _link_counters(timeline: Timeline, slices: _Slices) -> Iterator[_Counter]:
    """Bytes per second of each rank's streams of communication: a transfer's mean rate while it lasts, then nothing."""
    for rank in timeline.ranks.tolist():
        for name in LINK_STREAMS:
            own = (timeline.rank == rank) & (timeline.stream == STREAMS.index(name)) & (timeline.num_bytes > 0)
            moving = np.flatnonzero(own & (slices.end_ns > slices.start_ns))
            if not len(moving):
                continue
            start, end = slices.start_ns[moving], slices.end_ns[moving]
            rate = timeline.num_bytes[moving] / ((end - start) * 1e-9)
            is_last = np.append(start[1:] > end[:-1], True)
            times = np.concatenate([start, end[is_last]])
            rates = np.concatenate([rate, np.zeros(int(is_last.sum()))])
            order = np.argsort(times, kind="stable")
            yield _Counter(rank, f"{name} link", times[order], {"bytes_per_s": rates[order]})


def _memory_counters(memory: MemoryTimeline | None) -> Iterator[_Counter]:
    for rank in [] if memory is None else np.unique(memory.rank).tolist():
        assert memory is not None
        own = memory.of_rank(rank)
        yield _Counter(rank, MEMORY_NAME, nanoseconds(own.time_s), own.parts)


def read_chrome_trace(path: str | Path) -> ChromeTrace:
    """Read a trace that ``write_chrome_trace`` wrote; writing it again gives the same bytes.

    Raises
    ------
    FormatError
        If the file cannot be read or is no such trace.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        document = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        events = document["traceEvents"]
        by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in "MXsfC"}
        for event in events:
            by_kind[event["ph"]].append(event)
        facts = document["otherData"]
        processes = tuple(
            TraceProcess(fact["rank"], fact["stage"], parse_rank_ranges(fact["stands_for"]))
            for fact in facts["processes"]
        )
        timeline = _read_timeline(by_kind["X"], _read_messages(by_kind["s"], by_kind["f"]))
        return ChromeTrace(timeline, processes, _read_memory(by_kind["C"]), facts)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (KeyError, TypeError, ValueError, IndexError, EOFError, zlib.error) as error:
        raise _unreadable(path, f"it is no trace of moesim ({type(error).__name__}: {error})") from error


def _unreadable(path: Path, why: str) -> FormatError:
    remedy = "give a file that moesim simulate --timeline wrote"
    return FormatError([Problem("E-FMT-014", f"the trace cannot be read: {why}", remedy, str(path))])


def _seconds(time_us: float) -> float:
    return round(time_us * 1e3) * 1e-9


def _read_timeline(slices: list[dict[str, Any]], messages: Messages) -> Timeline:
    """Operations in the order of a timeline."""
    number_of_name: dict[str, int] = {}
    columns: dict[str, list[Any]] = {name: [] for name in EVENT_TYPES}
    for event in slices:
        arguments = event["args"]
        start_us = event["ts"]
        columns["rank"].append(event["pid"])
        columns["stream"].append(event["tid"] - 1)
        columns["name"].append(number_of_name.setdefault(event["name"], len(number_of_name)))
        columns["category"].append(CATEGORIES.index(event["cat"]))
        columns["start_s"].append(_seconds(start_us))
        columns["end_s"].append(_seconds(start_us + event["dur"]))
        columns["phase"].append(TIMELINE_PHASES.index(arguments["phase"]))
        columns["num_bytes"].append(arguments.get("bytes", 0.0))
        for name in ("layer", "micro_batch", "chunk"):
            columns[name].append(arguments.get(name, -1))
    arrays: dict[str, Any] = {name: np.array(columns[name], dtype=kind) for name, kind in EVENT_TYPES.items()}
    order = np.lexsort((arrays["start_s"], arrays["stream"], arrays["rank"]))
    arrays = {name: array[order] for name, array in arrays.items()}
    return Timeline(**arrays, names=tuple(number_of_name), messages=messages)


def _read_messages(starts: list[dict[str, Any]], ends: list[dict[str, Any]]) -> Messages:
    end_of = {event["id"]: event for event in ends}
    pairs = [(event, end_of[event["id"]]) for event in sorted(starts, key=lambda event: int(event["id"]))]
    return Messages(
        np.array([start["pid"] for start, _ in pairs], dtype=np.int64),
        np.array([_seconds(start["args"]["sent_us"]) for start, _ in pairs], dtype=np.float64),
        np.array([end["pid"] for _, end in pairs], dtype=np.int64),
        np.array([_seconds(start["args"]["received_us"]) for start, _ in pairs], dtype=np.float64),
        np.array([start["args"]["bytes"] for start, _ in pairs], dtype=np.float64),
    )


def _read_memory(counters: list[dict[str, Any]]) -> MemoryTimeline | None:
    points = sorted((event for event in counters if event["name"] == MEMORY_NAME), key=lambda event: int(event["pid"]))
    if not points:
        return None
    return MemoryTimeline(
        np.array([event["pid"] for event in points], dtype=np.int64),
        np.array([_seconds(event["ts"]) for event in points]),
        {name: np.array([event["args"][name] for event in points], dtype=np.float64) for name in points[0]["args"]},
    )
