"""The command ``measure``: arguments in, records in a file, sentences for people on stderr, an exit code out."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from moesim.errors import MoesimError, Problem, ScenarioError
from moesim.measurement.arguments import Options, read_options, usage_error
from moesim.measurement.cases import Case, DeviceKind, Target, by_value
from moesim.measurement.distributed.optional_back_ends import check_back_ends
from moesim.measurement.distributed.processes import HOW_TO_LAUNCH, Launch, check_backend
from moesim.measurement.distributed.ranks import ALONE
from moesim.measurement.distributed.runs import (
    DistributedOptions,
    Finished,
    distributed_cases,
    launched,
    run_together,
)
from moesim.measurement.distributed.targets import DistributedTarget
from moesim.measurement.fingerprints import conditions, fingerprint, program_arguments, session_name
from moesim.measurement.record_files import SCHEMA_VERSION, Json, Record, finished_cases
from moesim.measurement.sessions import Deadline, Progress, measure
from moesim.measurement.suites import SUITES
from moesim.measurement.workbenches import open_workbench

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
MIN_TORCH = (2, 4)
BFLOAT_CAPABILITY = 8
OF_ONE_RANK = "E-RUN-001"


def run(argv: Sequence[str], clock: Callable[[], float] = time.monotonic) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str
        Arguments after the word ``measure``.
    clock : callable
        Seconds, for the budget.

    Returns
    -------
    int
        Exit code.
    """
    begin_s = clock()
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        options = read_options(argv)
        _run(options, Deadline(clock, begin_s + options.budget_s), is_first)
    except KeyboardInterrupt:
        if is_first:
            _say("interrupted; the records so far are whole, and the same command goes on from them")
        return EXIT_INTERRUPTED
    except MoesimError as error:
        for problem in error.problems:
            if is_first or problem.code == OF_ONE_RANK:
                _say(f"error: {problem.sentence()} [{problem.code}]")
        return EXIT_BAD_INPUT
    except SystemExit as error:  # --help
        return int(error.code or 0)
    return EXIT_OK


def _run(options: Options, deadline: Deadline, is_first: bool) -> None:
    """Measure what is left of the wanted suites and append it to the file."""
    _check_torch(options)
    launch = launched(options.backend)
    if options.is_distributed and launch is not None and launch.size > 1:
        finished = _run_together(options, launch, deadline, is_first)
    else:
        finished = _run_alone(options, launch, deadline)
    if not is_first:
        return
    progress = finished.progress
    options.out.append(
        {
            "record": "end",
            "session": finished.session,
            "measured": progress.measured,
            "skipped": progress.skipped,
            "left": progress.left,
            "elapsed_s": options.budget_s - deadline.left_s,
            "conditions": conditions(options.device),
            **finished.conditions,
        }
    )
    _say(_summary(progress, options))


def _run_alone(options: Options, launch: Launch | None, deadline: Deadline) -> Finished:
    """Measure in this process alone."""
    if launch is not None and launch.size > 1:
        raise usage_error(
            f"{options.target} is measured on one device, but {launch.size} processes were launched",
            "run it without torchrun, or give --nproc-per-node 1",
        )
    if launch is not None and options.backend is not None:
        check_backend(options.backend)
    dtypes = _dtypes(options.device)
    if options.is_distributed:
        _check_group(options)
        target = DistributedTarget(options.device, dtypes, options.seed, ALONE, options.is_learned, options.back_ends)
        cases = distributed_cases(options.target, target)
    else:
        of_device = Target(options.device, dtypes, options.seed)
        cases = by_value([SUITES[name](of_device) for name in options.suites])
    session, pending = _begin(options, cases, {}, {})
    return Finished(session, _measure(pending, options, session, deadline), {})


def _run_together(options: Options, launch: Launch, deadline: Deadline, is_first: bool) -> Finished:
    """Measure in this process as one of several."""
    wanted = DistributedOptions(
        suite=options.target,
        device=options.device,
        backend=options.backend or ("nccl" if options.device == "cuda" else "gloo"),
        seed=options.seed,
        expert_parallel=options.expert_parallel,
        is_learned=options.is_learned,
        back_ends=options.back_ends,
        timeout_s=options.timeout_s,
    )

    def begin(cases: Sequence[Case], group: Record, of_ranks: Record) -> tuple[str, list[Case]]:
        return _begin(options, cases, group, of_ranks)

    return run_together(
        wanted,
        launch,
        _dtypes(options.device),
        begin=begin,
        write=options.out.append,
        deadline=deadline,
        report=_reporter() if is_first else lambda progress: None,
    )


def _begin(options: Options, cases: Sequence[Case], group: Record, of_ranks: Record) -> tuple[str, list[Case]]:
    """Open the file, enter the session if it is new, and return its name and the cases that are left."""
    records = options.out.recover()
    identity = fingerprint(options.device, options.seed) | group
    session = session_name(identity)
    if not any(record["record"] == "session" and record.get("session") == session for record in records):
        argv: Json = program_arguments()
        options.out.append(
            {
                "record": "session",
                "schema_version": SCHEMA_VERSION,
                "session": session,
                "fingerprint": identity,
                "conditions": conditions(options.device),
                **of_ranks,
                "argv": argv,
            }
        )
    finished = finished_cases(records, session)
    pending = [case for case in cases if case.identifier not in finished]
    if len(pending) < len(cases):
        _say(f"{len(cases) - len(pending)} of {len(cases)} cases are in the file already")
    return session, pending


def _measure(cases: Sequence[Case], options: Options, session: str, deadline: Deadline) -> Progress:
    """Measure on a stream of our own: graphs cannot be captured on the default one."""
    import torch

    bench = open_workbench(options.device, options.seed)
    stream = torch.cuda.stream(torch.cuda.Stream()) if bench.is_cuda else nullcontext()
    with stream:
        return measure(cases, bench, options.out.append, session=session, deadline=deadline, report=_reporter())


def _reporter() -> Callable[[Progress], None]:
    """Return what tells people of every tenth of the cases."""
    shown = 0

    def report(progress: Progress) -> None:
        nonlocal shown
        if (decile := 10 * (progress.total - progress.left) // max(progress.total, 1)) > shown:
            shown = decile
            _say(f"{progress.total - progress.left}/{progress.total}  {progress.latest}")

    return report


def _dtypes(device: DeviceKind) -> tuple[str, ...]:
    """Return the precisions to measure: bf16, or fp16 on devices before it."""
    import torch

    if device == "cpu":
        return ("fp32", "bf16")
    has_bfloat = torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= BFLOAT_CAPABILITY
    return ("bf16",) if has_bfloat else ("fp16",)


def _summary(progress: Progress, options: Options) -> str:
    left = f"; {progress.left} are left: run the same command again to go on" if progress.left else ""
    skipped = f", {progress.skipped} skipped (the file says why)" if progress.skipped else ""
    return f"{progress.measured} cases measured{skipped}{left}; records are in {options.out.path}"


def _check_group(options: Options) -> None:
    """Refuse an expert-parallel group that one process cannot form."""
    if options.expert_parallel not in (None, 1):
        what = f"{options.expert_parallel} ranks are to share the experts, but there is one process"
        raise ScenarioError([Problem("E-SCN-003", what, HOW_TO_LAUNCH, field="--expert-parallel")])


def _check_torch(options: Options) -> None:
    """Make sure that torch is there, new enough and sees the device."""
    try:
        import torch
    except ImportError as error:
        raise usage_error(
            f"torch cannot be imported ({error})", "install it: pip install 'moesim[measure]', or pip install torch"
        ) from error
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < MIN_TORCH:
        wanted = ".".join(str(part) for part in MIN_TORCH)
        raise usage_error(f"torch is {torch.__version__}, but at least {wanted} is needed", "install a newer torch")
    check_back_ends(options.back_ends)
    if options.backend == "nccl":
        check_backend(options.backend)
    if options.device == "cuda" and not torch.cuda.is_available():
        is_built = torch.version.cuda is not None or torch.version.hip is not None
        why = "torch sees none" if is_built else f"torch {torch.__version__} was built without CUDA"
        remedy = "add --device cpu to try the suite on the processor"
        raise ScenarioError([Problem("E-SCN-010", f"there is no CUDA device: {why}", remedy, field="--device")])


def _say(sentence: str) -> None:
    sys.stderr.write(f"measure: {sentence}\n")
