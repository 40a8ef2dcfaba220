"""Arguments of the command ``measure``: read and checked, all that is wrong told together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from moesim.errors import MoesimError, Problem, ScenarioError, nearest_name
from moesim.measurement.cases import DeviceKind
from moesim.measurement.distributed.optional_back_ends import BackEnds, ExchangeBy, ExpertsBy
from moesim.measurement.distributed.processes import DEVICE_OF_BACKEND, BackendName
from moesim.measurement.distributed.suites import DISTRIBUTED_SUITES
from moesim.measurement.record_files import RecordFile
from moesim.measurement.suites import SUITES
from moesim.units import parse_quantity

WHOLE = "single_gpu"
TARGETS = (WHOLE, *dict.fromkeys([*SUITES, *DISTRIBUTED_SUITES]))
MAX_SEED = 2**31
MAX_RANKS = 2**20
USAGE = """python -m moesim measure SUITE [--budget 8min] [--out results.jsonl] [--device cuda|cpu] [--seed N]
           single_gpu: [--suites NAME,NAME]
           collectives, overlap, moe_layer, train_step, memory, by torchrun: [--backend nccl|gloo]
                    [--expert-parallel N] [--routing drawn|learned] [--experts torch|grouped_gemm]
                    [--exchange all_to_all|deepep] [--timeout 5min]"""
DESCRIPTION = (
    "Measure kernels, layers, blocks and steps, and append the results to a file. A run that was cut goes on where it "
    "stopped. Several processes: torchrun --nproc-per-node 4 -m moesim measure moe_layer --backend gloo"
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Parameters
    ----------
    target : str
        One of ``TARGETS``.
    budget_s : float
        Time to spend.
    out : RecordFile
        File to append to.
    device : str
        ``cuda`` or ``cpu``.
    suites : tuple of str
        Of a device, where the target is one.
    seed : int
        Of inputs and routing.
    backend : str, optional
        As asked for; None takes the device's.
    expert_parallel : int, optional
        Ranks that share the experts; None for all.
    is_learned : bool
        Whether tokens go where the router says, not the draw.
    back_ends : BackEnds
        Libraries that replace torch's own.
    timeout_s : float
        How long a process waits for the others.
    """

    target: str
    budget_s: float
    out: RecordFile
    device: DeviceKind
    suites: tuple[str, ...]
    seed: int
    backend: BackendName | None
    expert_parallel: int | None
    is_learned: bool
    back_ends: BackEnds
    timeout_s: float

    @property
    def is_distributed(self) -> bool:
        """Whether the target is a suite over several ranks, which one process can run as well."""
        return self.target in DISTRIBUTED_SUITES


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are problems."""

    def error(self, message: str) -> NoReturn:
        raise usage_error(message, f"the usage is: {' '.join(USAGE.split())}")


def usage_error(message: str, remedy: str) -> ScenarioError:
    """Return an error of the command line.

    Parameters
    ----------
    message, remedy : str
        What is wrong and what to do.
    """
    return ScenarioError([Problem("E-CLI-001", message, remedy)])


def read_options(argv: Sequence[str]) -> Options:
    """Read and check the arguments.

    Parameters
    ----------
    argv : sequence of str
        After the word ``measure``.

    Raises
    ------
    ScenarioError
        With everything that is wrong.
    """
    found = _parser().parse_args(list(argv))
    problems: list[Problem] = []
    target = found.suite or ""
    _check_choice("SUITE", target, TARGETS, problems)
    is_distributed = target in DISTRIBUTED_SUITES
    device, backend = _device_and_backend(found.device, found.backend, problems)
    suites = _suites(target, found.suites, problems)
    budget_s = _duration_s("--budget", found.budget, problems)
    timeout_s = _duration_s("--timeout", found.timeout, problems)
    _check_number("--seed", found.seed, (0, MAX_SEED - 1), problems)
    if found.expert_parallel is not None:
        _check_number("--expert-parallel", found.expert_parallel, (1, MAX_RANKS), problems)
    for field, choice, legal in (
        ("--routing", found.routing, ("drawn", "learned")),
        ("--experts", found.experts, get_args(ExpertsBy)),
        ("--exchange", found.exchange, get_args(ExchangeBy)),
    ):
        _check_choice(field, choice, legal, problems)
    if not found.out.strip():
        problems.append(Problem("E-OUT-001", "no file is named", "write one such as results.jsonl", field="--out"))
    if target in TARGETS and not is_distributed:
        _check_alone(target, {"--backend": found.backend, "--expert-parallel": found.expert_parallel}, problems)
    if problems:
        raise ScenarioError(problems)
    return Options(
        target=target,
        budget_s=budget_s,
        out=RecordFile(Path(found.out)),
        device=device,
        suites=suites,
        seed=int(found.seed),
        backend=backend,
        expert_parallel=None if found.expert_parallel is None else int(found.expert_parallel),
        is_learned=found.routing == "learned",
        back_ends=BackEnds(
            "grouped_gemm" if found.experts == "grouped_gemm" else "torch",
            "deepep" if found.exchange == "deepep" else "all_to_all",
        ),
        timeout_s=timeout_s,
    )


def _parser() -> _Parser:
    parser = _Parser(prog="python -m moesim measure", usage=USAGE, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("suite", nargs="?", help=f"what to measure: {', '.join(TARGETS)}")
    add("--budget", default="8min", help="time to spend, such as 30s or 8min (default: 8min)")
    add("--out", default="results.jsonl", help="file to append to (default: results.jsonl)")
    add("--device", help="cuda or cpu (default: cuda, with --backend gloo cpu)")
    add("--suites", help=f"of single_gpu, some of: {', '.join(SUITES)} (default: all)")
    add("--seed", default="0", help="seed of inputs and routing (default: 0)")
    add("--backend", help="nccl or gloo (default: what the device has)")
    add("--expert-parallel", help="ranks that share the experts (default: all); more ranks hold copies of them")
    add("--routing", default="drawn", help="drawn (default): tokens go where the simulator's draw says; learned")
    add("--experts", default="torch", help="who multiplies: torch (default) or the package grouped_gemm")
    add("--exchange", default="all_to_all", help="who exchanges rows: all_to_all (default) or the package deepep")
    add("--timeout", default="5min", help="how long a process waits for the others (default: 5min)")
    return parser


def _device_and_backend(
    device: str | None, backend: str | None, problems: list[Problem]
) -> tuple[DeviceKind, BackendName | None]:
    """Take the device from the backend where only that is given; they must fit."""
    if backend is not None:
        _check_choice("--backend", backend, tuple(DEVICE_OF_BACKEND), problems)
    wanted = device if device is not None else DEVICE_OF_BACKEND.get(backend or "", "cuda")
    _check_choice("--device", wanted, ("cuda", "cpu"), problems)
    joined = DEVICE_OF_BACKEND.get(backend or "", wanted)
    if wanted in ("cuda", "cpu") and joined != wanted:
        what = f"{backend} joins processes on {joined}, but --device is {wanted}"
        remedy = f"leave out --device, or --backend for {wanted}'s own"
        problems.append(Problem("E-SCN-011", what, remedy, field="--backend"))
    named: BackendName | None = "nccl" if backend == "nccl" else "gloo" if backend == "gloo" else None
    return "cuda" if wanted == "cuda" else "cpu", named


def _suites(target: str, names: str | None, problems: list[Problem]) -> tuple[str, ...]:
    """Return the suites of a device that the target stands for."""
    if target != WHOLE:
        if names is not None and target in TARGETS:
            what = f"--suites chooses from {WHOLE}, but {target!r} is measured"
            problems.append(Problem("E-CLI-001", what, "leave it out", field="--suites"))
        return (target,)
    if names is None:
        return tuple(SUITES)
    suites = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in suites or ("",):
        _check_choice("--suites", name, tuple(SUITES), problems)
    return suites


def _check_alone(target: str, given: Mapping[str, str | None], problems: list[Problem]) -> None:
    """Refuse options about several ranks where one device is measured."""
    for field, value in given.items():
        if value is not None:
            what = f"{target} is measured on one device"
            remedy = f"leave it out, or measure one of {', '.join(DISTRIBUTED_SUITES)}"
            problems.append(Problem("E-SCN-011", what, remedy, field=field))


def _check_number(field: str, text: str, legal: tuple[int, int], problems: list[Problem]) -> None:
    least, most = legal
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        what = f"{text[:40]!r} is not a whole number from {least} to {most}"
        problems.append(Problem("E-SCN-007", what, f"write one such as {least}", field=field))


def _duration_s(field: str, text: str, problems: list[Problem]) -> float:
    """Read a duration; a problem is added if it is not a positive one."""
    try:
        duration_s = parse_quantity(text, "seconds")
    except MoesimError as error:
        problems.append(Problem(error.code, error.message, error.remedy, field=field))
        return 0.0
    if duration_s <= 0:
        problems.append(Problem("E-SCN-007", f"{text!r} is no time at all", "give at least 10s", field=field))
    return duration_s


def _check_choice(field: str, found: str, legal: Sequence[str], problems: list[Problem]) -> None:
    if found in legal:
        return
    near = nearest_name(found, legal)
    remedy = f"did you mean {near!r}?" if near else f"choose from {', '.join(legal)}"
    what = f"{found[:60]!r} is not among the choices" if found else "nothing is named"
    problems.append(Problem("E-SCN-010", what, remedy, field=field))
