"""``moesim simulate``: a step rank by rank, over draws of loads, with a trace and a picture of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesim.cli import EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED
from moesim.cli.options import JsonOption, ProfilesOption
from moesim.errors import FormatError, Problem, ScenarioError, nearest_name

if TYPE_CHECKING:
    from moesim.describe.perturbations import Perturbations
    from moesim.estimation.loading import LoadedScenario
    from moesim.estimation.simulated_step import SimulatedStep

TRACE_SUFFIXES = (".json", ".json.gz")
Repeated = list[str] | None


@dataclass(frozen=True)
class _Request:
    """Options of one command, as they were typed."""

    scenario: str
    assignments: Sequence[str]
    profiles: Sequence[Path]
    network: Literal["closed", "flow", "shared"]
    schedule: str | None
    draws: int
    seed: int
    ranks: str | None
    timeline: Path | None
    chart: Path | None
    slow_ranks: Sequence[str]
    slow_links: Sequence[str]
    flapping_links: Sequence[str]
    speed_spread: float
    host_jitter: str | None


def simulate(
    scenario: Annotated[str, typer.Argument(help="Scenario file, or the name of a shipped scenario.")],
    as_json: JsonOption = False,
    assignments: Annotated[
        Repeated, typer.Option("--set", metavar="PATH=VALUE", help="Set a field; may be repeated.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", metavar="N", help="Steps to draw, each with loads of its own.")] = 1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Same seed, same answer and same files.")] = 0,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="NAME", help="Pipeline schedule instead of the scenario's.")
    ] = None,
    schedules: Annotated[
        bool, typer.Option("--compare-schedules", help="Estimate every pipeline schedule as well.")
    ] = False,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", metavar="0,1,8-11", help="Ranks to record; the first of each stage by default."),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="OUT.json.gz", help="Write a trace of the first draw, for Perfetto."),
    ] = None,
    chart: Annotated[
        Path | None, typer.Option("--chart", metavar="OUT.html", help="Draw the first draw's timeline.")
    ] = None,
    slow_ranks: Annotated[
        Repeated, typer.Option("--slow-rank", metavar="RANK=FACTOR", help="Its kernels take FACTOR times as long.")
    ] = None,
    slow_links: Annotated[
        Repeated,
        typer.Option("--slow-link", metavar="LEVEL[:RANK]=SHARE", help="Links with SHARE of their bandwidth."),
    ] = None,
    flapping_links: Annotated[
        Repeated,
        typer.Option(
            "--flapping-link",
            metavar="LEVEL[:RANK]=SHARE,PERIOD,DUTY",
            help="Links that have SHARE of their bandwidth for DUTY of every PERIOD.",
        ),
    ] = None,
    speed_spread: Annotated[
        float, typer.Option("--speed-spread", metavar="SIGMA", help="Spread of the devices' speeds, of the logarithm.")
    ] = 0.0,
    host_jitter: Annotated[
        str | None, typer.Option("--host-jitter", metavar="TIME", help='Mean lateness of hosts per pass: "50 us".')
    ] = None,
    network: Annotated[
        Literal["closed", "flow", "shared"],
        typer.Option(
            "--network",
            help="Collectives by closed form; with the contention of their own groups on the real wires; or with all "
            "traffic of a rank on the same ports.",
        ),
    ] = "closed",
    profiles: ProfilesOption = None,
) -> int:
    """Simulate a step on every rank: what each stream does when, what waits for whom, and how draws differ."""
    request = _Request(
        scenario=scenario,
        assignments=assignments or (),
        profiles=profiles or (),
        network=network,
        schedule=schedule,
        draws=draws,
        seed=seed,
        ranks=ranks,
        timeline=timeline,
        chart=chart,
        slow_ranks=slow_ranks or (),
        slow_links=slow_links or (),
        flapping_links=flapping_links or (),
        speed_spread=speed_spread,
        host_jitter=host_jitter,
    )
    loaded, recorded, perturbations = _checked(request)
    answer = _simulated(request, loaded, recorded, perturbations)
    _write_files(request, loaded, answer)  # first: what cannot be written is an error, not an answer
    _print_answer(answer, loaded, as_json=as_json, schedules=schedules)
    if answer.is_interrupted:
        print(f"interrupted: {answer.draws} of {answer.draws_asked} draws are finished", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0 if answer.estimate.fits else EXIT_DOES_NOT_FIT


def _checked(request: _Request) -> tuple[LoadedScenario, tuple[int, ...], Perturbations]:
    """Scenario, ranks to record and what goes wrong; every problem of the command line and the scenario at once."""
    from moesim.describe.perturbations import read_perturbations
    from moesim.estimation.estimate import with_network

    problems: list[Problem] = []

    def gathered(step: Callable[[], Any]) -> Any:
        """Result of a step, or None and its problems."""
        try:
            return step()
        except (ScenarioError, FormatError) as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
            return None

    for name, least, value in (("--draws", 1, request.draws), ("--seed", 0, request.seed)):
        if value < least:
            problems.append(_option_problem(name, f"{value} is below {least}", f"give a whole number from {least} on"))
    gathered(lambda: _check_outputs(request))
    assignments = gathered(lambda: [*request.assignments, *_schedule_assignments(request)])
    loaded = gathered(lambda: _loaded(request, assignments or request.assignments))
    ranks: tuple[int, ...] = gathered(lambda: _ranks(request, loaded)) or ()
    perturbations: Perturbations | None = None
    if loaded is not None:
        levels = [level.name for level in loaded.system.hardware.fabric.levels]
        perturbations = gathered(
            lambda: read_perturbations(
                slow_ranks=request.slow_ranks,
                speed_spread=request.speed_spread,
                slow_links=request.slow_links,
                flapping_links=request.flapping_links,
                host_jitter=request.host_jitter,
                num_ranks=loaded.scenario.devices,
                levels=levels,
            )
        )
    if problems or perturbations is None:
        raise ScenarioError(problems)
    return with_network(loaded, "flow" if request.network == "flow" else "closed"), ranks, perturbations


def _option_problem(option: str, message: str, remedy: str) -> Problem:
    return Problem("E-CLI-001", message, remedy, field=option)


def _loaded(request: _Request, assignments: Sequence[str]) -> LoadedScenario:
    from moesim.cli.commands import _library
    from moesim.estimation.loading import load

    return load(request.scenario, assignments=assignments, library=_library(list(request.profiles)))


def _check_outputs(request: _Request) -> None:
    """Refuse files that cannot be written before anything is simulated."""
    from moesim.resources import check_writable

    problems = []
    wanted = (("--timeline", request.timeline, TRACE_SUFFIXES), ("--chart", request.chart, (".html",)))
    for option, path, suffixes in wanted:
        if path is None:
            continue
        if not path.name.endswith(suffixes):
            remedy = f"give a name that ends in {' or '.join(suffixes)}"
            problems.append(_option_problem(option, f"{path} has no ending that says what it is", remedy))
            continue
        try:
            check_writable(path)
        except OSError as error:
            message = f"cannot write {error.filename}: {error.strerror}"
            problems.append(Problem("E-OUT-001", message, "check the folder and its permissions", field=option))
    if problems:
        raise ScenarioError(problems)


def _schedule_assignments(request: _Request) -> list[str]:
    """Fields that ``--schedule`` sets: the name, and the chunks per stage that it takes where none are set."""
    from moesim.structure.chunk_placement import FOLDED_SCHEDULES
    from moesim.structure.pipeline_schedules import SCHEDULES

    name = request.schedule
    if name is None:
        return []
    if name not in SCHEDULES:
        near = nearest_name(name, SCHEDULES)
        remedy = f"did you mean {near!r}?" if near else f"there are {', '.join(SCHEDULES)}"
        raise ScenarioError([Problem("E-SCN-010", f"no schedule is called {name!r}", remedy, field="--schedule")])
    chunks = "parallelism.pipeline.virtual_stages"
    assignments = [f"parallelism.pipeline.schedule={name}"]
    if name != "interleaved_one_f_one_b" and not any(given.startswith(chunks) for given in request.assignments):
        assignments.append(f"{chunks}={2 if name in FOLDED_SCHEDULES else 1}")
    return assignments


def _ranks(request: _Request, loaded: LoadedScenario | None) -> tuple[int, ...]:
    """Ranks to record, rising; those typed, and the first of each stage where a file is wanted and none are typed."""
    from moesim.structure.placement import parse_rank_ranges

    if request.ranks is None:
        return ()
    try:
        ranks = tuple(sorted(set(parse_rank_ranges(request.ranks))))
    except ValueError:
        message = f"{request.ranks!r} is no list of ranks"
        raise ScenarioError([_option_problem("--ranks", message, "give numbers and ranges such as 0,1,8-11")]) from None
    if loaded is not None and not 0 <= ranks[0] <= ranks[-1] < loaded.scenario.devices:
        wrong = [rank for rank in ranks if not 0 <= rank < loaded.scenario.devices]
        message = f"rank {wrong[0]} is not among the {loaded.scenario.devices} ranks"
        remedy = f"give ranks from 0 to {loaded.scenario.devices - 1}"
        raise ScenarioError([_option_problem("--ranks", message, remedy)])
    return ranks


def _simulated(
    request: _Request,
    loaded: LoadedScenario,
    ranks: tuple[int, ...],
    perturbations: Perturbations,
) -> SimulatedStep:
    from moesim.cli.simulate_text import draw_progress
    from moesim.estimation.simulation import simulate_loaded

    with draw_progress(request.draws) as advance:
        return simulate_loaded(
            loaded,
            draws=request.draws,
            seed=request.seed,
            perturbations=perturbations,
            ranks=ranks,
            records=request.timeline is not None or request.chart is not None,
            shares_links=request.network == "shared",
            advance=advance,
        )


def _print_answer(answer: SimulatedStep, loaded: LoadedScenario, *, as_json: bool, schedules: bool) -> None:
    from moesim.cli.commands import _print_json

    comparison = None
    if schedules:
        from moesim.study.schedule_comparison import compare_schedules

        comparison = compare_schedules(loaded)
    if as_json:
        extra = {} if comparison is None else {"schedules": comparison.to_json()["schedules"]}
        _print_json(answer.to_json() | extra)
        return
    from moesim.cli.simulate_text import print_simulation

    print_simulation(answer)
    if comparison is not None:
        from moesim.cli.text import print_schedules

        print_schedules(comparison)


def _write_files(request: _Request, loaded: LoadedScenario, answer: SimulatedStep) -> None:
    if answer.recording is None:
        return
    if answer.contention is not None:
        print("recorded ranks have links of their own: what sharing adds is not in the files", file=sys.stderr)
    if request.timeline is not None:
        from moesim.formats.chrome_trace import write_simulated_trace

        count = write_simulated_trace(answer, request.timeline)
        print(f"wrote {count:,} events to {request.timeline}; open it at ui.perfetto.dev", file=sys.stderr)
    if request.chart is not None:
        from moesim.report.charts import write_timeline_chart

        write_timeline_chart(loaded, answer, request.chart)
        print(f"wrote {request.chart}", file=sys.stderr)
