"""One run of the lab: measure, fit on the flat network, predict the rest, report."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moesim.errors import Problem, ScenarioError
from validation.netlab.cases import lab_cases, short_cases
from validation.netlab.fits import fit_library
from validation.netlab.measurements import Progress, measure_all, networks_of
from validation.netlab.namespaces import lab_problem, missing_requirements, signals_as_exceptions, sweep
from validation.netlab.predictions import Predictor
from validation.netlab.reports import Report, RunFacts
from validation.netlab.results import rows_of, verdicts, write_profiles

LEAST_RATE, MOST_RATE_PER_CORE = 10e6, 250e6
"""Bit/s of a link. Above the second, eight hosts were seen to ask for more than the cores can move."""


@dataclass(frozen=True)
class RunOptions:
    """What a run may be told; ``folder`` is where profiles and reports go."""

    folder: Path
    rate: float = 60e6
    repeats: int = 7
    is_short: bool = False


def run_lab(options: RunOptions, progress: Progress) -> Report:
    """Run the lab.

    Parameters
    ----------
    options : RunOptions
        Rate, repetitions, folder.
    progress : callable
        Told what is going on.

    Returns
    -------
    Report
        Rows, verdicts and constants; the profiles are written already.

    Raises
    ------
    ScenarioError
        E-NET-004 with everything that is missing or wrong.
    KeyboardInterrupt
        On SIGTERM too, after everything was removed.
    """
    problems = option_problems(options) or missing_requirements()
    if problems:
        raise ScenarioError(problems)
    start, load_before = time.monotonic(), os.getloadavg()[0]
    collectives, steps = (short_cases if options.is_short else lab_cases)(options.rate)
    with signals_as_exceptions():
        for name in sweep():
            progress(f"removed what a killed run left: {name}")
        measurements = measure_all(collectives, steps, options.repeats, progress)
    progress("fitting gloo over TCP on the flat network")
    fit = fit_library([one for one in measurements.collectives if one.case.role == "fit"])
    networks = networks_of(collectives, steps)
    source = f"network lab, {networks[0].name} at {options.rate / 1e6:g} Mb/s, {len(fit.errors)} collectives"
    write_profiles(options.folder / "profiles", networks, fit, source)
    progress("predicting every case from the profiles")
    rows = rows_of(measurements, Predictor(options.folder / "profiles"), os.cpu_count() or 1)
    machine = {"kernel": platform.release(), "torch": _version("torch"), "cores": str(os.cpu_count())}
    seconds, load_after = time.monotonic() - start, os.getloadavg()[0]
    facts = RunFacts(machine, options.rate, options.repeats, seconds, load_before, load_after)
    return Report(facts, fit.constants, measurements, rows, verdicts(rows))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def option_problems(options: RunOptions) -> list[Problem]:
    """Everything that is wrong with the options, and torch if it is missing."""
    problems, cores = [], os.cpu_count() or 1
    highest = MOST_RATE_PER_CORE * cores
    if not LEAST_RATE <= options.rate <= highest:
        limits = f"from {LEAST_RATE / 1e6:g} to {highest / 1e6:g} Mb/s"
        message = f"links of {options.rate / 1e6:g} Mb/s: with {cores} cores, 8 hosts can be emulated {limits}"
        problems.append(lab_problem(message, "give a rate within these limits; 60Mb/s is usual", "rate"))
    if options.repeats < 1:
        problems.append(lab_problem(f"{options.repeats} repetitions", "give at least 1; 7 are usual", "repeats"))
    if _version("torch") == "none":
        message = "torch is not installed, whose gloo the lab measures"
        problems.append(lab_problem(message, 'install the extra "measure": pip install -e ".[measure]"'))
    return problems
