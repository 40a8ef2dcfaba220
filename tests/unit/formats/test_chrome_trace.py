"""Traces by the format's rules, read back, byte for byte the same, whole or not at all."""

from __future__ import annotations

import errno
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pipeline_timelines import pipeline_timeline
from trace_event_rules import check_trace

from moesim.engine.memory_timeline import MemoryTimeline
from moesim.engine.timelines import EVENT_FIELDS, STREAMS, Timeline
from moesim.errors import FormatError, SimulationError
from moesim.formats import chrome_trace
from moesim.formats.chrome_trace import TraceProcess, read_chrome_trace, write_chrome_trace

PROCESSES = [TraceProcess(stage, stage, range(stage * 8, stage * 8 + 8)) for stage in range(4)]


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    times = np.array([1e-3, 1.1e-3, 0.9e-3, 1.2e-3]) * np.pi
    return pipeline_timeline("one_f_one_b", 1, 6, times, 2 * times, 1e-5)


def memory_of(timeline: Timeline) -> MemoryTimeline:
    ranks = np.repeat(timeline.ranks, 2)
    time_s = np.tile([0.0, 1e-3], len(timeline.ranks))
    return MemoryTimeline(ranks, time_s, {"weights": time_s * 0 + 2**30, "activations": time_s * 1e9})


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_obeys_the_format(name: str, timeline: Timeline, tmp_path: Path) -> None:
    count = write_chrome_trace(timeline, tmp_path / name, processes=PROCESSES, memory=memory_of(timeline))
    events = check_trace(tmp_path / name)
    assert count == sum(map(len, events.values()))
    assert len(events["X"]) == len(timeline)
    assert len(events["s"]) == len(timeline.messages) == 2 * 3 * 6
    assert {event["name"] for event in events["C"]} == {"memory", "all_to_all link"}
    processes = {event["pid"]: event["args"]["name"] for event in events["M"] if event["name"] == "process_name"}
    assert processes[2] == "rank 2, stage 2 (and 8 like it)"
    labels = {event["pid"]: event["args"]["labels"] for event in events["M"] if event["name"] == "process_labels"}
    assert labels[1] == "stands for ranks 1, 8-15"
    threads = {event["args"]["name"] for event in events["M"] if event["name"] == "thread_name"}
    assert threads == {"compute", "all_to_all"}
    exchange = next(event for event in events["X"] if event["cat"] == "all_to_all")
    assert exchange["args"] == {"phase": "forward", "micro_batch": 0, "chunk": 0, "layer": 0, "bytes": 1000000}


def test_link_counters_carry_the_bytes(timeline: Timeline, tmp_path: Path) -> None:
    write_chrome_trace(timeline, tmp_path / "trace.json")
    points = [event for event in check_trace(tmp_path / "trace.json")["C"] if event["pid"] == 1]
    times = np.array([event["ts"] * 1e-6 for event in points])
    rates = np.array([event["args"]["bytes_per_s"] for event in points])
    moved = float((rates[:-1] * np.diff(times)).sum())
    assert rates[-1] == 0
    assert moved == pytest.approx(timeline.num_bytes[timeline.rank == 1].sum(), rel=1e-9)


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_what_is_read_is_what_was_written_and_writes_the_same(name: str, timeline: Timeline, tmp_path: Path) -> None:
    memory = memory_of(timeline)
    write_chrome_trace(timeline, tmp_path / name, processes=PROCESSES, memory=memory, other_data={"seed": 7})
    trace = read_chrome_trace(tmp_path / name)
    for field in EVENT_FIELDS:
        if field != "name":
            np.testing.assert_allclose(getattr(trace.timeline, field), getattr(timeline, field), atol=0.6e-9)
    assert [trace.timeline.names[i] for i in trace.timeline.name] == [timeline.names[i] for i in timeline.name]
    np.testing.assert_array_equal(np.sort(trace.timeline.messages.target_rank), np.sort(timeline.messages.target_rank))
    assert trace.memory is not None
    np.testing.assert_allclose(trace.memory.total, memory.total)
    assert trace.processes[3].stands_for == (3, *range(24, 32))
    assert trace.other_data["seed"] == 7
    again = tmp_path / f"again_{name}"
    write_chrome_trace(
        trace.timeline, again, processes=trace.processes, memory=trace.memory, other_data=trace.other_data
    )
    assert again.read_bytes() == (tmp_path / name).read_bytes()


def test_equal_timelines_give_equal_bytes_whatever_the_file_is_called(timeline: Timeline, tmp_path: Path) -> None:
    for name in ("one.json.gz", "two.json.gz"):
        write_chrome_trace(timeline, tmp_path / name)
    packed = (tmp_path / "one.json.gz").read_bytes()
    assert packed == (tmp_path / "two.json.gz").read_bytes()
    assert packed[4:8] == bytes(4)  # gzip's time of writing
    write_chrome_trace(timeline, tmp_path / "plain.json")
    assert gzip.decompress(packed) == (tmp_path / "plain.json").read_bytes()


def test_operations_that_follow_one_another_never_overlap_after_rounding(tmp_path: Path) -> None:
    """A thousand operations of 1.4 ns each: every time falls between two nanoseconds."""
    count = 1000
    times = np.arange(count + 1) * 1.4e-9
    zeros = np.zeros(count, dtype=np.int64)
    timeline = Timeline(
        rank=zeros,
        stream=zeros.astype(np.int8),
        name=zeros.astype(np.int32),
        category=zeros.astype(np.int8),
        start_s=times[:-1],
        end_s=times[1:],
        layer=zeros.astype(np.int32),
        micro_batch=zeros.astype(np.int32),
        chunk=zeros.astype(np.int32),
        phase=zeros.astype(np.int8),
        num_bytes=zeros.astype(float),
        names=("tick",),
        messages=pipeline_timeline("gpipe", 1, 1, np.ones(1), np.ones(1), 0.0).messages,
    )
    write_chrome_trace(timeline, tmp_path / "trace.json")
    events = check_trace(tmp_path / "trace.json")["X"]
    assert sum(event["dur"] for event in events) == pytest.approx(1.4)


def test_arrows_start_and_end_in_transfers_where_those_are_recorded(timeline: Timeline, tmp_path: Path) -> None:
    messages = timeline.messages
    link = STREAMS.index("pipeline_p2p")
    sends = replace(
        timeline.take(np.zeros(len(messages), dtype=np.int64)),
        rank=messages.source_rank,
        stream=np.full(len(messages), link, dtype=np.int8),
        start_s=messages.source_s,
        end_s=messages.target_s,
    )
    arrays = {name: np.concatenate([getattr(timeline, name), getattr(sends, name)]) for name in EVENT_FIELDS}
    both = Timeline(**arrays, names=timeline.names, messages=messages).sorted()
    one_way = both.take((both.stream != link) | (both.phase == 0))
    write_chrome_trace(one_way, tmp_path / "trace.json")
    events = check_trace(tmp_path / "trace.json")
    assert {event["tid"] for event in events["s"]} == {link + 1}
    assert [event["ts"] for event in events["s"]] == pytest.approx(np.sort(messages.source_s) * 1e6, abs=1e-3)


def test_numbers_that_are_no_numbers_are_refused(timeline: Timeline, tmp_path: Path) -> None:
    broken = replace(timeline, end_s=timeline.end_s * np.nan)
    with pytest.raises(SimulationError, match="end_s"):
        write_chrome_trace(broken, tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(
    timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json.gz"
    write_chrome_trace(timeline, path)
    before = path.read_bytes()

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(chrome_trace, "_microseconds", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_chrome_trace(timeline, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json.gz"]


def test_a_folder_that_is_missing_is_named(timeline: Timeline, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing") as caught:
        write_chrome_trace(timeline, tmp_path / "missing" / "trace.json")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("absent.json", None),
        ("empty.json", b""),
        ("text.json", b"hello"),
        ("list.json", b"[]"),
        ("other.json", json.dumps({"traceEvents": [{"ph": "i", "pid": 0}], "otherData": {}}).encode()),
        ("plain.json.gz", b"{}"),
        ("cut.json.gz", gzip.compress(b'{"traceEvents": []}')[:-9]),
    ],
)
def test_files_that_are_no_traces_are_refused_by_name(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_chrome_trace(tmp_path / name)
    (problem,) = caught.value.problems
    assert problem.code == "E-FMT-014"
    assert problem.file == str(tmp_path / name)
