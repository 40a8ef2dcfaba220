"""One run over the cases: in batches whose samples interleave, until the budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moesim.errors import SimulationError
from moesim.measurement.cases import Case, UnmeasurableError
from moesim.measurement.clocks import EventSampler, HostSampler, Timed, build_sampler, summarise
from moesim.measurement.record_files import Json, Record
from moesim.measurement.workbenches import Workbench

BATCH_CASES = 8
MIN_SAMPLES = 3
MAX_SAMPLES = 40
SLICE_S = (0.02, 0.6)
"""Least and most time for the samples of one case; preparing it comes on top."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A budget of time, on a clock that is an argument so that tests need not wait."""

    clock: Callable[[], float]
    end_s: float

    @property
    def left_s(self) -> float:
        """Seconds left, zero or less when the budget is spent."""
        return self.end_s - self.clock()


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    total: int
    measured: int = 0
    skipped: int = 0
    latest: str = ""

    @property
    def left(self) -> int:
        """Cases without a record."""
        return self.total - self.measured - self.skipped


@dataclass(slots=True)
class Prepared:
    """A case that is warmed up: its clock, and the samples it gave, in seconds per operation."""

    case: Case
    timed: Timed
    implementation: str
    repetitions: int
    num_sets: int
    num_samples: int
    samples_s: list[float]
    details: Mapping[str, Json]


def measure(
    cases: Sequence[Case],
    bench: Workbench,
    write: Callable[[Record], None],
    *,
    session: str,
    deadline: Deadline,
    report: Callable[[Progress], None],
) -> Progress:
    """Measure cases until none or no time is left; every batch is written as soon as it is done.

    Parameters
    ----------
    cases : sequence of Case
        In the order of their value.
    bench : Workbench
        The device.
    write : callable
        Receives one record per case.
    session : str
        Name of the session the records belong to.
    deadline : Deadline
        No case is begun after it; what is begun is finished with at least ``MIN_SAMPLES`` samples.
    report : callable
        Told after each batch.

    Returns
    -------
    Progress
        How many cases were measured, skipped and left.

    Raises
    ------
    SimulationError
        If a case leaves the device unusable.
    """
    progress = Progress(len(cases))
    pending = list(cases)
    while pending and deadline.left_s > 0:
        slice_s = min(max(deadline.left_s / len(pending), SLICE_S[0]), SLICE_S[1])
        batch = _next_batch(pending, bench)
        for _ in range(_measure_batch(batch, bench, write, session, deadline, slice_s, progress)):
            pending.pop(0)
        bench.release()
        report(progress)
    return progress


def _measure_batch(
    batch: Sequence[Case],
    bench: Workbench,
    write: Callable[[Record], None],
    session: str,
    deadline: Deadline,
    slice_s: float,
    progress: Progress,
) -> int:
    """Measure cases in turns and return how many were begun; nothing holds their memory after that."""
    prepared, num_begun = [], 0
    for case in batch:
        if deadline.left_s <= 0:
            break
        num_begun += 1
        made = _prepare(case, bench, slice_s)
        if isinstance(made, str):
            write({"record": "skip", "session": session, **description(case), "reason": made})
            progress.skipped += 1
        else:
            prepared.append(made)
    for done in _sampled(prepared, bench, deadline):
        write({"record": "result", "session": session, **description(done.case), **measurement(done, bench)})
        progress.measured += 1
        progress.latest = done.case.identifier
    return num_begun


def _next_batch(pending: Sequence[Case], bench: Workbench) -> list[Case]:
    """Return the next cases whose inputs fit into memory together."""
    batch = [pending[0]]
    for case in pending[1:BATCH_CASES]:
        needed = sum(max(one.working_set_bytes, bench.memory_bytes / BATCH_CASES) for one in [*batch, case])
        if needed > bench.memory_bytes:
            break
        batch.append(case)
    return batch


def _prepare(case: Case, bench: Workbench, slice_s: float) -> Prepared | str:
    """Fill the inputs of a case and warm it up, or return why that cannot be."""
    if case.working_set_bytes > bench.memory_bytes:
        return f"needs {case.working_set_bytes:.3g} bytes, but {bench.memory_bytes:.3g} may be used"
    num_sets = bench.num_sets(case.working_set_bytes, BATCH_CASES) if case.rotates else 1
    try:
        works = [case.prepare(bench) for _ in range(num_sets)]
        timed = build_sampler(works, case.timing, bench)
    except (RuntimeError, AttributeError, TypeError) as error:  # out of memory; not in this torch, not on this device
        reason = why_unmeasured(error)
        _check_device(bench, case, reason)
        return reason
    affordable = int(slice_s / max(timed.sampler.expected_s, 1e-9))
    num_samples = min(max(affordable, MIN_SAMPLES), MAX_SAMPLES)
    work = works[-1]
    return Prepared(case, timed, work.implementation, work.repetitions, num_sets, num_samples, [], work.details)


def why_unmeasured(error: Exception) -> str:
    """Say in one line why a case has no result.

    Parameters
    ----------
    error : Exception
        What stopped it.
    """
    first = (str(error).splitlines() or [""])[0][:300]
    return first if isinstance(error, UnmeasurableError) else f"{type(error).__name__}: {first}"


def _check_device(bench: Workbench, case: Case, reason: str) -> None:
    """Make sure that a failed case did not take the device with it; every later case would fail as well."""
    try:
        bench.wait()
    except RuntimeError as error:
        raise SimulationError(f"{case.identifier} left the device unusable ({reason})", bench.seed) from error


def _sampled(prepared: list[Prepared], bench: Workbench, deadline: Deadline) -> list[Prepared]:
    """Take the samples of a batch in turns, so that a drift of clocks or neighbours meets all cases alike."""
    for turn in range(max((one.num_samples for one in prepared), default=0)):
        if turn >= MIN_SAMPLES and deadline.left_s <= 0:
            break
        active = [one for one in prepared if turn < one.num_samples]
        queued = [one for one in active if isinstance(one.timed.sampler, EventSampler)]
        if queued:
            queued[-1].timed.sampler.start()  # not counted: keeps the device busy while the host enqueues the turn
        for one in sorted(active, key=lambda one: isinstance(one.timed.sampler, HostSampler)):  # waiting ones last
            one.timed.sampler.start()
        bench.wait()
        for one in active:
            one.samples_s.append(one.timed.sampler.collect()[-1] / one.repetitions)
    return prepared


def description(case: Case) -> Record:
    """Return what a record says of a case, whether it was measured or not.

    Parameters
    ----------
    case : Case
        The case.
    """
    return {
        "case": case.identifier,
        "suite": case.suite,
        "operation": case.operation,
        "pass": case.pass_name,
        "dtype": case.dtype,
        "shape": dict(case.shape),
        "flops": float(case.flops),
        "bytes": float(case.traffic_bytes),
        **({"loads": list(case.loads)} if case.loads else {}),
    }


def measurement(done: Prepared, bench: Workbench) -> Record:
    """Return what a record says of a case that was measured.

    Parameters
    ----------
    done : Prepared
        With all its samples.
    bench : Workbench
        The device.
    """
    summary = summarise(done.samples_s)
    host_s = done.timed.host_s
    return {
        "median_s": summary.median_s,
        "lower_quartile_s": summary.lower_quartile_s,
        "upper_quartile_s": summary.upper_quartile_s,
        "iqr_s": summary.iqr_s,
        "min_s": summary.min_s,
        "samples": summary.num_samples,
        "calls_per_sample": done.timed.sampler.calls_per_sample,
        "timed_by": done.timed.sampler.timed_by,
        "host_s": None if host_s is None else host_s / done.repetitions,
        "implementation": done.implementation,
        "input_sets": done.num_sets,
        "rotated_bytes": float(done.num_sets * done.case.working_set_bytes),
        "exceeds_cache": done.num_sets * done.case.working_set_bytes > bench.cache_bytes,
        **done.details,
    }
