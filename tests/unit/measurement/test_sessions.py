"""Runs over cases: budget, interleaving, failures, and the choice of the clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import groupby
from types import SimpleNamespace

import pytest

from moesim.errors import SimulationError
from moesim.measurement.cases import Case, Work
from moesim.measurement.clocks import EventSampler, HostSampler, build_sampler
from moesim.measurement.sessions import MIN_SAMPLES, Deadline, Progress, measure
from moesim.measurement.workbenches import Workbench

BENCH = Workbench("cpu", 0, cache_bytes=1e6, memory_bytes=1e9)


class SteppingClock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def case(name: str, call: Callable[[], object], *, working_set_bytes: float = 1e6, repetitions: int = 1) -> Case:
    work = Work(call, "python", repetitions)
    return Case("gemm", name, "forward", "fp32", {"m": 1}, 8.0, 4.0, working_set_bytes, lambda bench: work)


def run(cases: list[Case], clock: Callable[[], float], budget_s: float) -> tuple[list[dict], Progress]:
    written: list[dict] = []
    progress = measure(
        cases, BENCH, written.append, session="s", deadline=Deadline(clock, budget_s), report=lambda progress: None
    )
    return written, progress


def test_every_case_gets_a_record_with_its_samples() -> None:
    written, progress = run([case(f"c{i}", lambda: None) for i in range(20)], time.monotonic, time.monotonic() + 60)
    assert [record["operation"] for record in written] == [f"c{i}" for i in range(20)]
    assert (progress.measured, progress.left) == (20, 0)
    for record in written:
        assert record["samples"] >= MIN_SAMPLES
        assert 0 < record["min_s"] <= record["lower_quartile_s"] <= record["median_s"] <= record["upper_quartile_s"]


def test_a_sleep_is_timed_right_and_repetitions_divide_it() -> None:
    written, _ = run(
        [case("one", lambda: time.sleep(2e-3)), case("ten", lambda: time.sleep(2e-3), repetitions=10)],
        time.monotonic,
        time.monotonic() + 60,
    )
    assert 2e-3 <= written[0]["median_s"] < 20e-3
    assert 2e-4 <= written[1]["median_s"] < 20e-4


def test_no_case_is_begun_after_the_budget() -> None:
    written, progress = run([case(f"c{i}", lambda: None) for i in range(50)], SteppingClock(), budget_s=14.0)
    assert 1 <= len(written) < 14
    assert progress.left == 50 - len(written)
    assert all(record["samples"] >= MIN_SAMPLES for record in written)


def test_samples_of_a_batch_take_turns() -> None:
    order: list[str] = []
    cases = [case(name, lambda name=name: order.append(name)) for name in "ab"]
    written, _ = run(cases, time.monotonic, time.monotonic() + 60)
    turns = [name for name, _ in groupby(order)]
    assert len(turns) >= 2 * min(record["samples"] for record in written)  # one after the other, there would be 4


def test_a_case_that_fails_or_does_not_fit_is_skipped_with_its_reason() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel for this device\nand a long trace")

    cases = [case("fails", fail), case("large", lambda: None, working_set_bytes=2e9), case("fine", lambda: None)]
    written, progress = run(cases, time.monotonic, time.monotonic() + 60)
    assert [record["record"] for record in written] == ["skip", "skip", "result"]
    assert written[0]["reason"] == "RuntimeError: no kernel for this device"
    assert "2e+09 bytes" in written[1]["reason"]
    assert (progress.measured, progress.skipped, progress.left) == (1, 2, 0)


def test_a_case_that_breaks_the_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(Workbench, "wait", fail)
    with pytest.raises(SimulationError, match="left the device unusable"):
        run([case("fails", fail)], time.monotonic, time.monotonic() + 60)


def fake_torch(*, can_capture: bool) -> SimpleNamespace:
    """Events that are 4 ms apart, and graphs that record how often they are replayed."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 4.0

    class Graph:
        replays = 0

        def replay(self) -> None:
            Graph.replays += 1

    @contextmanager
    def capture(graph: Graph, stream: str):
        assert stream == "stream"
        yield
        if not can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")

    cuda = SimpleNamespace(
        Event=Event, CUDAGraph=Graph, graph=capture, current_stream=lambda: "stream", synchronize=lambda: None
    )
    return SimpleNamespace(cuda=cuda)


@pytest.mark.parametrize(("can_capture", "timed_by"), [(True, "cuda_graph"), (False, "cuda_events")])
def test_a_device_is_timed_by_graphs_and_by_events_where_none_can_be_made(
    monkeypatch: pytest.MonkeyPatch, can_capture: bool, timed_by: str
) -> None:
    torch = fake_torch(can_capture=can_capture)
    monkeypatch.setitem(sys.modules, "torch", torch)
    bench = Workbench("cuda", 0, cache_bytes=1e6, memory_bytes=1e9)
    works = [Work(lambda: time.sleep(1e-3), "sleep") for _ in range(2)]
    timed = build_sampler(works, "device", bench)
    assert isinstance(timed.sampler, EventSampler)
    assert timed.sampler.timed_by == timed_by
    assert timed.host_s is not None
    assert timed.host_s >= 1e-3
    assert timed.sampler.calls_per_sample == 2
    timed.sampler.start()
    assert timed.sampler.collect() == [2e-3]
    assert timed.sampler.collect() == []
    assert torch.cuda.CUDAGraph.replays == (2 if can_capture else 0)
    assert isinstance(build_sampler(works, "host", bench).sampler, HostSampler)
