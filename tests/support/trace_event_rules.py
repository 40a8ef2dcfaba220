"""The rules of the Trace Event Format (Google, 2016) that a viewer relies on, checked on a file as it lies there.

Knows nothing of how moesim writes it: names, times, nesting, arrows and counters only.
"""

from __future__ import annotations

import gzip
import json
import math
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]
NESTED = 4
"""Slices before a moment among which that around it is looked for: how deep slices may nest."""
METADATA = {
    "process_name": "name",
    "process_labels": "labels",
    "process_sort_index": "sort_index",
    "thread_name": "name",
    "thread_sort_index": "sort_index",
}


def load_events(path: Path) -> list[Event]:
    """Events of a trace, compressed or not; strict JSON: no NaN, no infinity, no key given twice."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), pairs
        return dict(pairs)

    document = json.loads(text, parse_constant=refuse, object_pairs_hook=distinct)
    assert isinstance(document["traceEvents"], list)
    assert document.get("displayTimeUnit", "ms") in ("ms", "ns")
    return list(document["traceEvents"])


def check_trace(path: Path) -> dict[str, list[Event]]:
    """Check every rule; returns the events by phase letter."""
    by_phase: dict[str, list[Event]] = defaultdict(list)
    last_of_thread: dict[tuple[int, Any], float] = defaultdict(lambda: -math.inf)
    for event in load_events(path):
        assert event["ph"] in "MXBEsftC", event
        assert isinstance(event["pid"], int), event
        assert isinstance(event["name"], str), event
        by_phase[event["ph"]].append(event)
        if event["ph"] == "M":
            assert METADATA[event["name"]] in event["args"], event
            continue
        assert is_number(event["ts"]), event
        thread = (event["pid"], event.get("tid"))
        assert event["ts"] >= last_of_thread[thread], event
        last_of_thread[thread] = event["ts"]
    check_names(by_phase)
    slices = check_slices(by_phase)
    check_arrows(by_phase, slices)
    check_counters(by_phase["C"])
    return by_phase


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def check_names(by_phase: dict[str, list[Event]]) -> None:
    """Each process and thread that has events has one name."""
    named = [event for event in by_phase["M"] if event["name"] in ("process_name", "thread_name")]
    names = {(event["name"], event["pid"], event.get("tid")): event["args"]["name"] for event in named}
    assert len(names) == len(named), "a name given twice"
    assert all(names.values())
    for phase in "XBEsftC":
        for event in by_phase[phase]:
            assert any(key[:2] == ("process_name", event["pid"]) for key in names), event
            if "tid" in event:
                assert ("thread_name", event["pid"], event["tid"]) in names, event


def check_slices(by_phase: dict[str, list[Event]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Begin and end match, no duration is negative, slices of a thread follow or contain each other; in ns."""
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in by_phase["X"]:
        assert is_number(event["dur"]), event
        begin = round(event["ts"] * 1e3)
        slices[event["pid"], event["tid"]].append((begin, begin + round(event["dur"] * 1e3)))
    open_begins: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in sorted(by_phase["B"] + by_phase["E"], key=lambda event: float(event["ts"])):
        thread = (event["pid"], event["tid"])
        if event["ph"] == "B":
            open_begins[thread].append(event)
        else:
            begin = open_begins[thread].pop()
            assert event.get("name", begin["name"]) == begin["name"]
            slices[thread].append((round(begin["ts"] * 1e3), round(event["ts"] * 1e3)))
    assert not any(open_begins.values()), "a begin without an end"
    for thread, spans in slices.items():
        stack: list[tuple[int, int]] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while stack and stack[-1][1] <= begin:
                stack.pop()
            assert not stack or end <= stack[-1][1], f"{thread}: slices cross at {begin} ns"
            stack.append((begin, end))
    return slices


def check_arrows(by_phase: dict[str, list[Event]], slices: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
    """Each arrow starts once and ends once, later or at the same time, both ends inside a slice."""
    begins = {thread: sorted(spans) for thread, spans in slices.items()}
    starts = {event["id"]: event for event in by_phase["s"]}
    ends = {event["id"]: event for event in by_phase["f"]}
    assert len(starts) == len(by_phase["s"])
    assert len(ends) == len(by_phase["f"])
    assert set(starts) == set(ends)
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"], (start, end)
        assert end.get("bp") == "e", end
        for event in (start, end):
            time_ns = round(event["ts"] * 1e3)
            own = begins[event["pid"], event["tid"]]
            near = own[max(bisect_right(own, (time_ns, math.inf)) - NESTED, 0) :][: NESTED + 1]
            assert any(begin <= time_ns < stop or begin == time_ns == stop for begin, stop in near), event


def check_counters(counters: list[Event]) -> None:
    """Values are numbers, and the series of a counter are the same at every point."""
    series: dict[tuple[int, str], set[str]] = {}
    for event in counters:
        assert event["args"]
        assert all(is_number(value) for value in event["args"].values()), event
        keys = series.setdefault((event["pid"], event["name"]), set(event["args"]))
        assert keys == set(event["args"]), event
