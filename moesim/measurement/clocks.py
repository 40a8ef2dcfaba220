"""How a call is timed: CUDA graphs between events, single calls between events, or the host's clock."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from moesim.measurement.cases import Timing, Work
from moesim.measurement.workbenches import Workbench

SAMPLE_S = {"cuda": 1e-3, "cpu": 5e-4}
"""Length of a sample: events resolve half a microsecond, the host's clock less than a tenth."""
MAX_CALLS = 256
HOST_CALLS = 3
WARM_UP_CALLS = 2


@dataclass(frozen=True, slots=True)
class Summary:
    """What samples say: seconds per operation."""

    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    min_s: float
    num_samples: int

    @property
    def iqr_s(self) -> float:
        """Distance of the quartiles."""
        return self.upper_quartile_s - self.lower_quartile_s


def summarise(samples_s: Sequence[float]) -> Summary:
    """Median, quartiles and minimum of samples.

    Examples
    --------
    >>> summary = summarise([4.0, 1.0, 2.0, 3.0, 9.0])
    >>> summary.median_s, summary.iqr_s, summary.min_s, summary.num_samples
    (3.0, 2.0, 1.0, 5)
    """
    import numpy as np

    lower, middle, upper = np.quantile(np.asarray(samples_s, dtype=np.float64), [0.25, 0.5, 0.75])
    return Summary(float(middle), float(lower), float(upper), min(samples_s), len(samples_s))


class AbstractSampler(ABC):
    """A prepared call that can be timed again and again."""

    timed_by: str
    calls_per_sample: int
    expected_s: float
    """About what one sample takes."""

    @abstractmethod
    def start(self) -> None:
        """Take one sample; the device may still be at it when this returns."""

    @abstractmethod
    def collect(self) -> list[float]:
        """Return seconds per call of the samples started since the last time; the device must be done."""


class HostSampler(AbstractSampler):
    """Seconds on the host's clock until the device has done the calls."""

    timed_by = "host_clock"

    def __init__(self, run: Callable[[], None], calls_per_sample: int, expected_s: float, wait: Callable[[], None]):
        self.calls_per_sample = calls_per_sample
        self.expected_s = expected_s
        self._run = run
        self._wait = wait
        self._taken: list[float] = []

    def start(self) -> None:
        """Run the calls and wait for them."""
        self._wait()
        begin = time.perf_counter()
        self._run()
        self._wait()
        self._taken.append((time.perf_counter() - begin) / self.calls_per_sample)

    def collect(self) -> list[float]:
        """Return seconds per call of each sample."""
        taken, self._taken = self._taken, []
        return taken


class EventSampler(AbstractSampler):
    """Seconds between two CUDA events around the calls, or around the graph that holds them."""

    def __init__(
        self, run: Callable[[], None], calls_per_sample: int, expected_s: float, timed_by: str, holds: object = None
    ):
        self.calls_per_sample = calls_per_sample
        self.expected_s = expected_s
        self.timed_by = timed_by
        self._run = run
        self._holds = holds  # a graph knows addresses only: without this, tensors under them would be freed
        self._events: list[tuple[_Event, _Event]] = []

    def start(self) -> None:
        """Enqueue the calls between two events."""
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._run()
        end.record()
        self._events.append((begin, end))

    def collect(self) -> list[float]:
        """Return seconds per call of each sample; ``elapsed_time`` is in milliseconds."""
        events, self._events = self._events, []
        return [begin.elapsed_time(end) * 1e-3 / self.calls_per_sample for begin, end in events]


class _Event(ABC):
    """The part of ``torch.cuda.Event`` that is used here."""

    @abstractmethod
    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to another."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A sampler and what was learned while it was made."""

    sampler: AbstractSampler
    host_s: float | None
    """Seconds the host needs to issue one call; None where the host itself does the work."""


def build_sampler(works: Sequence[Work], timing: Timing, bench: Workbench) -> Timed:
    """Warm a case up and choose how to time it.

    Parameters
    ----------
    works : sequence of Work
        The same call on sets of inputs that together exceed the cache.
    timing : str
        What is wanted: the device's time, the same with the gaps of the host, or the time until an answer is back.
    bench : Workbench
        The device.
    """
    calls = [work.call for work in works]
    call_s = warm_up(calls, bench)
    per_set = max(1, round(SAMPLE_S[bench.device] / max(call_s, 1e-9) / len(calls)))
    rounds = min(per_set, max(1, MAX_CALLS // len(calls)))
    count = rounds * len(calls)

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    expected_s = call_s * count
    if not bench.is_cuda or timing == "host":
        return Timed(HostSampler(run, count, expected_s, bench.wait), None)
    host_s = host_seconds(calls, bench)
    graph = None if timing == "eager" else _captured(run)
    if graph is None:
        return Timed(EventSampler(run, count, expected_s, "cuda_events"), host_s)
    graph.replay()
    bench.wait()
    return Timed(EventSampler(graph.replay, count, expected_s, "cuda_graph", holds=run), host_s)


def warm_up(calls: Sequence[Callable[[], object]], bench: Workbench) -> float:
    """Call every set once, at least a few times in all; return the seconds of a later call.

    Parameters
    ----------
    calls : sequence of callable
        One per set of inputs.
    bench : Workbench
        The device.
    """
    for index in range(max(WARM_UP_CALLS, len(calls) if bench.is_cuda else 1)):
        calls[index % len(calls)]()
    bench.wait()
    begin = time.perf_counter()
    for call in calls[:HOST_CALLS]:
        call()
    bench.wait()
    return (time.perf_counter() - begin) / len(calls[:HOST_CALLS])


def host_seconds(calls: Sequence[Callable[[], object]], bench: Workbench) -> float:
    """Seconds to issue one call to an idle device.

    Parameters
    ----------
    calls : sequence of callable
        One per set of inputs.
    bench : Workbench
        The device.
    """
    seconds = []
    for index in range(HOST_CALLS):
        bench.wait()
        begin = time.perf_counter()
        calls[index % len(calls)]()
        seconds.append(time.perf_counter() - begin)
    bench.wait()
    return median(seconds)


class _Graph(ABC):
    """The part of ``torch.cuda.CUDAGraph`` that is used here."""

    @abstractmethod
    def replay(self) -> None:
        """Enqueue everything that was captured."""


def _captured(run: Callable[[], None]) -> _Graph | None:
    """Capture the calls in a graph, so that a short kernel is not timed by the gaps between launches.

    Capture and preparation share one stream: backward kernels run on the stream of their forward ones.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError:  # a call that waits for the device, or whose kernels cannot be captured
        torch.cuda.synchronize()
        return None
    captured: _Graph = graph
    return captured
