"""The command ``measure``: arguments in, records in a file, sentences for people on stderr, an exit code out."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from moesim.errors import MoesimError, Problem, ScenarioError, nearest_name
from moesim.measurement.cases import Case, DeviceKind, Target, by_value
from moesim.measurement.fingerprints import conditions, fingerprint, program_arguments, session_name
from moesim.measurement.record_files import SCHEMA_VERSION, RecordFile, finished_cases
from moesim.measurement.sessions import Deadline, Progress, measure
from moesim.measurement.suites import SUITES
from moesim.measurement.workbenches import open_workbench
from moesim.units import parse_quantity

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
MIN_TORCH = (2, 4)
TARGETS = ("single_gpu",)
BFLOAT_CAPABILITY = 8
MAX_SEED = 2**31
USAGE = """python -m moesim measure single_gpu [--budget 8min] [--out results.jsonl] [--device cuda|cpu]
                                    [--suites NAME,NAME] [--seed N]"""


@dataclass(frozen=True, slots=True)
class _Options:
    budget_s: float
    out: RecordFile
    device: DeviceKind
    suites: tuple[str, ...]
    seed: int


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
    try:
        options = _read_options(argv)
        _run(options, Deadline(clock, begin_s + options.budget_s))
    except KeyboardInterrupt:
        _say("interrupted; the records so far are whole, and the same command goes on from them")
        return EXIT_INTERRUPTED
    except MoesimError as error:
        for problem in error.problems:
            _say(f"error: {problem.sentence()} [{problem.code}]")
        return EXIT_BAD_INPUT
    except SystemExit as error:  # --help
        return int(error.code or 0)
    return EXIT_OK


def _run(options: _Options, deadline: Deadline) -> None:
    """Measure what is left of the wanted suites and append it to the file."""
    _check_torch(options.device)
    records = options.out.recover()
    identity = fingerprint(options.device, options.seed)
    session = session_name(identity)
    if not any(record["record"] == "session" and record.get("session") == session for record in records):
        options.out.append(
            {
                "record": "session",
                "schema_version": SCHEMA_VERSION,
                "session": session,
                "fingerprint": identity,
                "conditions": conditions(options.device),
                "argv": program_arguments(),
            }
        )
    cases = _cases(options)
    finished = finished_cases(records, session)
    pending = [case for case in cases if case.identifier not in finished]
    if len(pending) < len(cases):
        _say(f"{len(cases) - len(pending)} of {len(cases)} cases are in the file already")
    progress = _measure(pending, options, session, deadline)
    options.out.append(
        {
            "record": "end",
            "session": session,
            "measured": progress.measured,
            "skipped": progress.skipped,
            "left": progress.left,
            "elapsed_s": options.budget_s - deadline.left_s,
            "conditions": conditions(options.device),
        }
    )
    _say(_summary(progress, options))


def _measure(cases: Sequence[Case], options: _Options, session: str, deadline: Deadline) -> Progress:
    """Measure on a stream of our own: graphs cannot be captured on the default one."""
    import torch

    bench = open_workbench(options.device, options.seed)
    shown = 0

    def report(progress: Progress) -> None:
        nonlocal shown
        if (decile := 10 * (progress.total - progress.left) // max(progress.total, 1)) > shown:
            shown = decile
            _say(f"{progress.total - progress.left}/{progress.total}  {progress.latest}")

    stream = torch.cuda.stream(torch.cuda.Stream()) if bench.is_cuda else nullcontext()
    with stream:
        return measure(cases, bench, options.out.append, session=session, deadline=deadline, report=report)


def _cases(options: _Options) -> list[Case]:
    target = Target(options.device, _dtypes(options.device), options.seed)
    return by_value([SUITES[name](target) for name in options.suites])


def _dtypes(device: DeviceKind) -> tuple[str, ...]:
    """Return the precisions to measure: bf16, or fp16 on devices before it."""
    import torch

    if device == "cpu":
        return ("fp32", "bf16")
    has_bfloat = torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= BFLOAT_CAPABILITY
    return ("bf16",) if has_bfloat else ("fp16",)


def _summary(progress: Progress, options: _Options) -> str:
    left = f"; {progress.left} are left: run the same command again to go on" if progress.left else ""
    skipped = f", {progress.skipped} skipped (the file says why)" if progress.skipped else ""
    return f"{progress.measured} cases measured{skipped}{left}; records are in {options.out.path}"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are problems."""

    def error(self, message: str) -> NoReturn:
        raise _usage_error(message, f"the usage is: {' '.join(USAGE.split())}")


def _read_options(argv: Sequence[str]) -> _Options:
    """Read and check the arguments; all that is wrong is told together."""
    parser = _Parser(
        prog="python -m moesim measure",
        usage=USAGE,
        description="Measure kernels, layers and blocks on one device, and append the results to a file. "
        "A run that was cut goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("target", nargs="?", help="what to measure: single_gpu")
    parser.add_argument("--budget", default="8min", help="time to spend, such as 30s or 8min (default: 8min)")
    parser.add_argument("--out", default="results.jsonl", help="file to append to (default: results.jsonl)")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--suites", default=",".join(SUITES), help=f"some of: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--seed", default="0", help="seed of inputs and routing (default: 0)")
    found = parser.parse_args(list(argv))
    problems: list[Problem] = []
    _check_choice("target", found.target or "", TARGETS, problems)
    _check_choice("--device", found.device, ("cuda", "cpu"), problems)
    suites = tuple(dict.fromkeys(name.strip() for name in found.suites.split(",") if name.strip()))
    for name in suites or ("",):
        _check_choice("--suites", name, tuple(SUITES), problems)
    budget_s = _budget_s(found.budget, problems)
    if not re.fullmatch(r"[0-9]{1,10}", found.seed) or int(found.seed) >= MAX_SEED:
        what = f"{found.seed[:40]!r} is not a whole number from 0 to {MAX_SEED - 1}"
        problems.append(Problem("E-SCN-007", what, "write a seed such as 0", field="--seed"))
    if not found.out.strip():
        problems.append(Problem("E-OUT-001", "no file is named", "write one such as results.jsonl", field="--out"))
    if problems:
        raise ScenarioError(problems)
    device: DeviceKind = "cuda" if found.device == "cuda" else "cpu"
    return _Options(budget_s, RecordFile(Path(found.out)), device, suites, int(found.seed))


def _budget_s(text: str, problems: list[Problem]) -> float:
    """Read the budget; a problem is added if it is no positive duration."""
    try:
        budget_s = parse_quantity(text, "seconds")
    except MoesimError as error:
        problems.append(Problem(error.code, error.message, error.remedy, field="--budget"))
        return 0.0
    if budget_s <= 0:
        problems.append(Problem("E-SCN-007", f"{text!r} is no time at all", "give at least 10s", field="--budget"))
    return budget_s


def _check_choice(field: str, found: str, legal: Sequence[str], problems: list[Problem]) -> None:
    if found in legal:
        return
    near = nearest_name(found, legal)
    remedy = f"did you mean {near!r}?" if near else f"choose from {', '.join(legal)}"
    what = f"{found[:60]!r} is not among the choices" if found else "nothing is named"
    problems.append(Problem("E-SCN-010", what, remedy, field=field))


def _check_torch(device: DeviceKind) -> None:
    """Make sure that torch is there, new enough and sees the device."""
    try:
        import torch
    except ImportError as error:
        raise _usage_error(
            f"torch cannot be imported ({error})", "install it: pip install 'moesim[measure]', or pip install torch"
        ) from error
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < MIN_TORCH:
        wanted = ".".join(str(part) for part in MIN_TORCH)
        raise _usage_error(f"torch is {torch.__version__}, but at least {wanted} is needed", "install a newer torch")
    if device == "cuda" and not torch.cuda.is_available():
        is_built = torch.version.cuda is not None or torch.version.hip is not None
        why = "torch sees none" if is_built else f"torch {torch.__version__} was built without CUDA"
        remedy = "add --device cpu to try the suite on the processor"
        raise ScenarioError([Problem("E-SCN-010", f"there is no CUDA device: {why}", remedy, field="--device")])


def _usage_error(message: str, remedy: str) -> ScenarioError:
    return ScenarioError([Problem("E-CLI-001", message, remedy)])


def _say(sentence: str) -> None:
    sys.stderr.write(f"measure: {sentence}\n")
