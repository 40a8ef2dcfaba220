"""One run over distributed cases: every rank does the same, the slowest rank's time counts, the first rank writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moesim.errors import MoesimError
from moesim.measurement.cases import Case
from moesim.measurement.clocks import (
    MAX_CALLS,
    AbstractSampler,
    EventSampler,
    HostSampler,
    Timed,
    host_seconds,
    summarise,
    warm_up,
)
from moesim.measurement.record_files import Record
from moesim.measurement.sessions import (
    MAX_SAMPLES,
    MIN_SAMPLES,
    SLICE_S,
    Deadline,
    Prepared,
    Progress,
    description,
    measurement,
    why_unmeasured,
)

if TYPE_CHECKING:
    from moesim.measurement.distributed.ranks import Ranks
    from moesim.measurement.workbenches import Workbench

BATCH_CASES = 4
SAMPLE_S = 5e-3
"""Ranks leave a barrier some 10 to 100 microseconds apart."""
GO_ON = "the case is skipped from now on: run the same command again to measure the others"


def measure_together(
    cases: Sequence[Case],
    bench: Workbench,
    ranks: Ranks,
    write: Callable[[Record], None],
    *,
    session: str,
    deadline: Deadline,
    report: Callable[[Progress], None],
) -> Progress:
    """Measure cases on all ranks until none or no time is left; the first rank's clock decides for all.

    Parameters
    ----------
    cases : sequence of Case
        In the order of their value, the same on every rank.
    bench : Workbench
        The device of this rank, with memory and cache that all ranks agree on.
    ranks : Ranks
        The processes.
    write : callable
        Receives one record per case, on the first rank.
    session : str
        Name of the session the records belong to.
    deadline : Deadline
        No case is begun after it.
    report : callable
        Told after each batch.

    Returns
    -------
    Progress
        How many cases were measured, skipped and left.

    Raises
    ------
    MoesimError
        If a rank fails in a case and another does not answer.
    """
    progress, pending = Progress(len(cases)), list(cases)
    while pending and (slice_s := _agreed_slice_s(ranks, deadline, len(pending))) > 0:
        batch = _next_batch(pending, bench)
        _measure_batch(batch, bench, ranks, write, session, deadline, slice_s, progress)
        del pending[: len(batch)]
        bench.release()
        report(progress)
    return progress


def _measure_batch(
    batch: Sequence[Case],
    bench: Workbench,
    ranks: Ranks,
    write: Callable[[Record], None],
    session: str,
    deadline: Deadline,
    slice_s: float,
    progress: Progress,
) -> None:
    """Measure cases in turns; nothing holds their memory after that."""
    prepared = []
    for case in batch:
        made = _prepare(case, bench, ranks, slice_s, write, session)
        if isinstance(made, str):
            _write_skip(write, session, case, made)
            progress.skipped += 1
        else:
            prepared.append(made)
    for done in _sampled(prepared, bench, ranks, deadline):
        write({"record": "result", "session": session, **description(done.case), **measurement(done, bench)})
        progress.measured += 1
        progress.latest = done.case.identifier


def _agreed_slice_s(ranks: Ranks, deadline: Deadline, num_pending: int) -> float:
    """Time for the samples of one case, as the first rank sees it; zero when the budget is spent."""
    left_s = deadline.left_s
    wanted = min(max(left_s / num_pending, SLICE_S[0]), SLICE_S[1]) if left_s > 0 else 0.0
    agreed = ranks.share(wanted)
    assert isinstance(agreed, float)
    return agreed


def _next_batch(pending: Sequence[Case], bench: Workbench) -> list[Case]:
    """Return the next cases whose inputs fit into memory together."""
    batch, needed = [pending[0]], pending[0].working_set_bytes
    for case in pending[1:BATCH_CASES]:
        needed += case.working_set_bytes
        if needed > bench.memory_bytes:
            break
        batch.append(case)
    return batch


def _prepare(
    case: Case, bench: Workbench, ranks: Ranks, slice_s: float, write: Callable[[Record], None], session: str
) -> Prepared | str:
    """Fill the inputs of a case on every rank and warm it up, or return why that cannot be."""
    if case.working_set_bytes > bench.memory_bytes:
        return f"needs {case.working_set_bytes:.3g} bytes, but {bench.memory_bytes:.3g} may be used"
    num_sets = bench.num_sets(case.working_set_bytes, BATCH_CASES) if case.rotates else 1
    works, call_s, reason = [], 0.0, None
    try:
        works = [case.prepare(bench) for _ in range(num_sets)]
        call_s = warm_up([work.call for work in works], bench)
    except (RuntimeError, AttributeError, TypeError) as error:  # out of memory; not in this torch; another rank died
        reason = why_unmeasured(error)
    agreed = _agreed(case, ranks, reason, write, session)
    if agreed is not None:
        return agreed
    expected_s = ranks.largest(call_s)
    timed = _timed([work.call for work in works], expected_s, bench)
    affordable = int(slice_s / max(timed.sampler.expected_s, 1e-9))
    num_samples = min(max(affordable, MIN_SAMPLES), MAX_SAMPLES)
    work = works[-1]
    return Prepared(case, timed, work.implementation, work.repetitions, num_sets, num_samples, [], work.details)


def _agreed(case: Case, ranks: Ranks, reason: str | None, write: Callable[[Record], None], session: str) -> str | None:
    """Return why all ranks skip a case, or end where a rank cannot go on; the next run begins behind the case."""
    try:
        agreed = ranks.agree(reason)
    except RuntimeError as error:
        ranks.leave(str(reason))
        _write_skip(write, session, case, f"rank {ranks.rank}: {reason}")
        what = f"rank {ranks.rank} failed in {case.identifier} while another rank waited for it: {reason}"
        raise MoesimError(what, GO_ON, "E-RUN-001") from error
    gone = ranks.those_who_left() if agreed is not None else []
    if gone and agreed is not None:
        _write_skip(write, session, case, agreed)
        what = f"rank {ranks.rank} lost rank {gone[0]} in {case.identifier}: {agreed}"
        raise MoesimError(what, GO_ON, "E-RUN-001")
    return agreed


def _timed(calls: list[Callable[[], object]], call_s: float, bench: Workbench) -> Timed:
    """Choose how many calls make a sample; every rank makes as many."""
    rounds = max(1, min(round(SAMPLE_S / max(call_s, 1e-9) / len(calls)), MAX_CALLS // len(calls)))
    count = rounds * len(calls)

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    if not bench.is_cuda:
        return Timed(HostSampler(run, count, call_s * count, bench.wait), None)
    return Timed(_LedSampler(calls[0], run, count, call_s * count), host_seconds(calls, bench))


class _LedSampler(EventSampler):
    """Events around the calls, behind one call that is not counted: the device is busy while the host gets ahead."""

    def __init__(self, lead: Callable[[], object], run: Callable[[], None], calls_per_sample: int, expected_s: float):
        super().__init__(run, calls_per_sample, expected_s, "cuda_events")
        self._lead = lead

    def start(self) -> None:
        """Enqueue one call, then the calls between two events."""
        self._lead()
        super().start()


def _sampled(prepared: list[Prepared], bench: Workbench, ranks: Ranks, deadline: Deadline) -> list[Prepared]:
    """Take the samples of a batch in turns, each behind a barrier; then let the slowest rank count."""
    for turn in range(max((one.num_samples for one in prepared), default=0)):
        if turn >= MIN_SAMPLES and ranks.share(deadline.left_s <= 0):
            break
        for one in prepared:
            if turn < one.num_samples:
                one.samples_s.append(_sample_s(one.timed.sampler, bench, ranks) / one.repetitions)
    return [_slowest(one, ranks) for one in prepared]


def _sample_s(sampler: AbstractSampler, bench: Workbench, ranks: Ranks) -> float:
    bench.wait()
    ranks.barrier()
    bench.wait()
    sampler.start()
    bench.wait()
    return sampler.collect()[-1]


def _slowest(one: Prepared, ranks: Ranks) -> Prepared:
    """Replace each sample by that of the slowest rank, and keep the medians of all."""
    of_ranks = ranks.gather_numbers(one.samples_s)
    slowest = [max(samples) for samples in zip(*of_ranks, strict=True)]
    medians = [summarise(samples).median_s for samples in of_ranks]
    host_s = None if one.timed.host_s is None else ranks.largest(one.timed.host_s)
    details: Record = {**one.details, "rank_medians_s": list(medians)}
    return replace(one, samples_s=slowest, timed=Timed(one.timed.sampler, host_s), details=details)


def _write_skip(write: Callable[[Record], None], session: str, case: Case, reason: str) -> None:
    write({"record": "skip", "session": session, **description(case), "reason": reason})
