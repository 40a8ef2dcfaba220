"""The command ``measure`` for suites over several ranks: groups, agreement, records on the first rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesim.errors import MoesimError, Problem, ScenarioError
from moesim.measurement.cases import Case, DeviceKind, by_value
from moesim.measurement.distributed.optional_back_ends import BackEnds
from moesim.measurement.distributed.processes import (
    HOW_TO_LAUNCH,
    BackendName,
    Launch,
    close_ranks,
    open_ranks,
    read_launch,
)
from moesim.measurement.distributed.ranks import Ranks, check_experts
from moesim.measurement.distributed.suites import DISTRIBUTED_SUITES, NEEDS_SEVERAL, expert_layers, train_steps
from moesim.measurement.distributed.targets import DistributedTarget
from moesim.measurement.distributed.together import measure_together
from moesim.measurement.fingerprints import conditions
from moesim.measurement.record_files import Json, Record
from moesim.measurement.sessions import Deadline, Progress
from moesim.measurement.workbenches import Workbench, open_workbench

SETTINGS = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NVLS_ENABLE", "NCCL_IB_DISABLE")
"""Variables that change what NCCL does; their values are part of what was measured on."""


@dataclass(frozen=True, slots=True)
class DistributedOptions:
    """What the command line asks of a suite over several ranks."""

    suite: str
    device: DeviceKind
    backend: BackendName
    seed: int
    expert_parallel: int | None
    is_learned: bool
    back_ends: BackEnds
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run leaves to be told: its session, how far it came, conditions of the ranks at its end."""

    session: str
    progress: Progress
    conditions: Record


def launched(asked_backend: str | None) -> Launch | None:
    """Return how this process was launched, and insist on a launcher where a backend was asked for.

    Parameters
    ----------
    asked_backend : str, optional
        Of the command line.

    Raises
    ------
    ScenarioError
        If it was not, or its variables are wrong.
    """
    launch = read_launch(os.environ)
    if launch is None and asked_backend is not None:
        what = f"a backend ({asked_backend}) joins processes, but this one was not launched as one of several"
        raise ScenarioError([Problem("E-CLI-001", what, HOW_TO_LAUNCH, field="--backend")])
    return launch


def distributed_cases(suite: str, target: DistributedTarget) -> list[Case]:
    """Return the cases of a suite.

    Parameters
    ----------
    suite : str
        A key of ``DISTRIBUTED_SUITES``.
    target : DistributedTarget
        The device and the processes.

    Raises
    ------
    ScenarioError
        If the experts of no shape divide over the ranks, or the suite needs several ranks and there is one.
    """
    if suite in NEEDS_SEVERAL and target.ranks.size == 1:
        what = f"{suite} needs at least two processes, and this is one"
        raise ScenarioError([Problem("E-CLI-001", what, HOW_TO_LAUNCH, field="SUITE")])
    found = by_value([DISTRIBUTED_SUITES[suite](target)])
    if not found:
        experts = {shape.num_experts for shape in expert_layers.shapes(target)}
        experts |= {shape.layer.num_experts for shape in train_steps.shapes(target)}
        check_experts(min(experts), target.ranks.expert_parallel)
    return found


def run_together(
    options: DistributedOptions,
    launch: Launch,
    dtypes: tuple[str, ...],
    *,
    begin: Callable[[Sequence[Case], Record, Record], tuple[str, list[Case]]],
    write: Callable[[Record], None],
    deadline: Deadline,
    report: Callable[[Progress], None],
) -> Finished:
    """Measure a suite on this rank, as one of several.

    Parameters
    ----------
    options : DistributedOptions
        What is wanted.
    launch : Launch
        Which rank this is.
    dtypes : tuple of str
        Precisions.
    begin : callable
        On the first rank: enter the session, given all cases and what its record says of the processes and their
        devices, and return its name and the cases that are left.
    write : callable
        Receives the records of the first rank.
    deadline : Deadline
        That of the first rank counts.
    report : callable
        Told after each batch.

    Raises
    ------
    MoesimError
        If anything is wrong; on all ranks alike where that can be.
    """
    ranks = open_ranks(launch, options.backend, expert_parallel=options.expert_parallel, timeout_s=options.timeout_s)
    target = DistributedTarget(options.device, dtypes, options.seed, ranks, options.is_learned, options.back_ends)
    cases = distributed_cases(options.suite, target)
    try:
        bench = _agreed_bench(options, ranks)
        group, of_ranks = _group_record(options, launch, ranks), _conditions(options, ranks)
        session, pending = _begun(ranks, lambda: begin(cases, group, of_ranks), cases)
        progress = measure_together(
            pending,
            bench,
            ranks,
            write if ranks.is_first else _ignore,
            session=session,
            deadline=deadline,
            report=report,
        )
        finished = Finished(session, progress, _conditions(options, ranks))
        close_ranks(ranks)
    except RuntimeError as error:  # of torch.distributed: a connection that was closed, or a timeout
        if isinstance(error, MoesimError):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        what = f"rank {ranks.rank}: an exchange with the other ranks ended ({reason})"
        remedy = "the records so far are whole; see what another rank says, then run the same command again"
        raise MoesimError(what, remedy, "E-RUN-001") from error
    return finished


def _agreed_bench(options: DistributedOptions, ranks: Ranks) -> Workbench:
    """Open the device with values of its own, and the least memory and largest cache of all ranks."""
    bench = open_workbench(options.device, options.seed + ranks.rank)
    bench.cache_bytes = ranks.largest(bench.cache_bytes)
    bench.memory_bytes = -ranks.largest(-bench.memory_bytes)
    return bench


def _begun(ranks: Ranks, begin: Callable[[], tuple[str, list[Case]]], cases: Sequence[Case]) -> tuple[str, list[Case]]:
    """Let the first rank open the file, and tell the others which cases are left; its failure is everyone's."""
    told: list[Json] | None = None
    failure: MoesimError | None = None
    if ranks.is_first:
        try:
            session, pending = begin()
            told = [session, *(case.identifier for case in pending)]
        except MoesimError as error:
            failure = error
    shared = ranks.share(told)
    if failure is not None:
        raise failure
    if not isinstance(shared, list):
        raise ScenarioError([Problem("E-OUT-001", "the first rank could not begin", "see what it says")])
    left = set(shared[1:])
    return str(shared[0]), [case for case in cases if case.identifier in left]


def _group_record(options: DistributedOptions, launch: Launch, ranks: Ranks) -> Record:
    """Describe the processes, for the fingerprint of a session."""
    import torch

    settings: Record = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    version = torch.cuda.nccl.version() if options.backend == "nccl" else None
    return {
        "backend": options.backend,
        "nccl_version": ".".join(str(part) for part in version) if version else None,
        "world_size": ranks.size,
        "expert_parallel": ranks.expert_parallel,
        "ranks_per_host": launch.ranks_per_host,
        "settings": settings,
    }


def _conditions(options: DistributedOptions, ranks: Ranks) -> Record:
    """Read clocks, power and temperature of every rank's device; a processor tells nothing."""
    return {} if options.device == "cpu" else {"rank_conditions": ranks.gather(conditions(options.device))}


def _ignore(_: Record) -> None:
    """Leave records to the first rank."""
