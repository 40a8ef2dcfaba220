"""How fast a timeline is written and read: 100,000 operations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pipeline_timelines import pipeline_timeline
from pytest_benchmark.fixture import BenchmarkFixture

from moesim.engine.timelines import EVENT_FIELDS, Timeline
from moesim.formats.chrome_trace import read_chrome_trace, write_chrome_trace

pytestmark = pytest.mark.benchmark(group="trace")
PIECES = 10


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    """16 stages, 160 micro-batches, each pass in ten layers."""
    whole = pipeline_timeline("one_f_one_b", 1, 160, np.full(16, 1e-3), np.full(16, 2e-3), 1e-5)
    arrays = {name: np.repeat(getattr(whole, name), PIECES) for name in EVENT_FIELDS}
    piece = np.tile(np.arange(PIECES), len(whole))
    width = (arrays["end_s"] - arrays["start_s"]) / PIECES
    arrays["start_s"] = arrays["start_s"] + piece * width
    arrays["end_s"] = arrays["start_s"] + width
    arrays["layer"] = piece.astype(np.int32)
    return Timeline(**arrays, names=whole.names, messages=whole.messages)


def test_write_a_compressed_trace(benchmark: BenchmarkFixture, timeline: Timeline, tmp_path: Path) -> None:
    assert len(timeline) > 100_000
    benchmark(write_chrome_trace, timeline, tmp_path / "trace.json.gz")


def test_read_a_compressed_trace(benchmark: BenchmarkFixture, timeline: Timeline, tmp_path: Path) -> None:
    write_chrome_trace(timeline, tmp_path / "trace.json.gz")
    trace = benchmark(read_chrome_trace, tmp_path / "trace.json.gz")
    assert len(trace.timeline) == len(timeline)
