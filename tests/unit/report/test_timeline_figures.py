"""What the Gantt chart draws adds up to what ran."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pipeline_timelines import pipeline_timeline
from plotly import graph_objects as go

from moesim.engine.memory_timeline import MemoryTimeline
from moesim.engine.timelines import EVENT_FIELDS, STREAMS, Timeline
from moesim.report.timeline_figures import EXACT_BARS, INTERVALS, MAX_RANKS, timeline_figure
from moesim.structure.step_graph import CATEGORIES


def small_timeline() -> Timeline:
    return pipeline_timeline("one_f_one_b", 1, 6, np.full(3, 0.1), np.full(3, 0.2), 0.01)


def chopped(timeline: Timeline, pieces: int) -> Timeline:
    """Every operation in equal pieces, categories by turns on the compute stream: nine of ten the first one."""
    arrays = {name: np.repeat(getattr(timeline, name), pieces) for name in EVENT_FIELDS}
    piece = np.tile(np.arange(pieces), len(timeline))
    width = (arrays["end_s"] - arrays["start_s"]) / pieces
    arrays["start_s"] = arrays["start_s"] + piece * width
    arrays["end_s"] = arrays["start_s"] + width
    on_compute = arrays["stream"] == STREAMS.index("compute")
    rare = CATEGORIES.index("attention")
    arrays["category"] = np.where(on_compute & (piece % 10 == 5), rare, arrays["category"]).astype(np.int8)
    return Timeline(**arrays, names=timeline.names, messages=timeline.messages).sorted()


def drawn_seconds(figure: go.Figure, meta: str, row: str) -> float:
    traces = [trace for trace in figure.data if trace.meta == meta]
    return sum(x for trace in traces for x, y in zip(trace.x, trace.y, strict=True) if y == row) / 1e3


def test_bars_of_a_small_timeline_are_its_operations() -> None:
    timeline = small_timeline()
    figure = timeline_figure(timeline, stage_of_rank={0: 0, 1: 1, 2: 2})
    assert {trace.meta for trace in figure.data if trace.meta} == {"whole", "label"}
    for rank in range(3):
        for stream in (0, 1):
            own = (timeline.rank == rank) & (timeline.stream == stream)
            expected = (timeline.end_s - timeline.start_s)[own].sum()
            assert drawn_seconds(figure, "whole", f"{rank}/{stream}") == pytest.approx(expected, rel=1e-9)
    labels = figure.layout.yaxis.ticktext
    assert labels[:3] == ("<b>rank 0, stage 0</b>  compute", "all-to-all", "<b>rank 1, stage 1</b>  compute")
    assert {entry.name for entry in figure.data if entry.name} == {"Expert layers", "Communication"}
    numbers = next(trace for trace in figure.data if trace.meta == "label")
    assert len(numbers.text) == 3 * 6 * 2
    assert set(numbers.text) == set("012345")


def test_forward_passes_are_lighter() -> None:
    traces = [trace for trace in timeline_figure(small_timeline()).data if trace.meta == "whole"]
    colours = {trace.marker.color: sum(trace.x) for trace in traces}
    assert colours["#E69F00"] == pytest.approx(2 * colours["#F0C566"])


def test_many_operations_become_what_takes_most_of_each_interval() -> None:
    timeline = chopped(small_timeline(), 600)
    assert len(timeline) > EXACT_BARS
    figure = timeline_figure(timeline)
    whole = [trace for trace in figure.data if trace.meta == "whole"]
    assert sum(len(trace.x) for trace in whole) < 1000
    assert {trace.marker.color for trace in whole} == {"#E69F00", "#F0C566", "#D55E00", "#E69E66"}
    width = timeline.end / INTERVALS
    for rank in range(3):
        own = (timeline.rank == rank) & (timeline.stream == 0)
        expected = (timeline.end_s - timeline.start_s)[own].sum()
        assert drawn_seconds(figure, "whole", f"{rank}/0") == pytest.approx(expected, abs=12 * 2 * width)
    near = [trace for trace in figure.data if trace.meta == "near"]
    assert {y for trace in near for y in trace.y} <= {"0/0", "0/1", "1/0", "1/1"}
    assert "#0072B2" in {trace.marker.color for trace in near}
    begin, end = figure.layout.xaxis2.range
    assert begin < timeline.end / 2 * 1e3 < end


def test_ranks_beyond_the_limit_are_left_out() -> None:
    timeline = small_timeline()
    many = [replace(timeline, rank=timeline.rank + 3 * copy) for copy in range(10)]
    arrays = {name: np.concatenate([getattr(part, name) for part in many]) for name in EVENT_FIELDS}
    figure = timeline_figure(Timeline(**arrays, names=timeline.names, messages=timeline.messages).sorted())
    ranks = {int(row.split("/")[0]) for row in figure.layout.yaxis.categoryarray}
    assert ranks == set(range(MAX_RANKS))


def test_memory_has_a_line_for_each_different_rank_and_the_capacity() -> None:
    timeline = small_timeline()
    points = np.tile([0.0, 0.5], 3)
    held = np.array([1.0, 2.0, 1.0, 2.0, 1.0, 3.0]) * 2**30
    memory = MemoryTimeline(np.repeat([0, 1, 2], 2), points, {"weights": held * 0, "activations": held})
    figure = timeline_figure(timeline, memory=memory, capacity_bytes=4.0 * 2**30)
    lines = [trace for trace in figure.data if trace.meta == "memory"]
    assert [line.name for line in lines] == ["rank 0", "rank 2"]
    assert list(lines[1].y) == [1.0, 3.0, 3.0]
    assert figure.layout.shapes[-1].y0 == pytest.approx(4.0)
