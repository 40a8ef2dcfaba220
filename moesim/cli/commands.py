"""The commands and their options; each imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesim.cli import EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_TOLERANCE
from moesim.cli.calibration_commands import calibrate as calibrate_command
from moesim.cli.collective_commands import network as network_command
from moesim.cli.collective_validation_commands import validate_collectives_command
from moesim.cli.comparison_commands import compare as compare_command
from moesim.cli.network_commands import topology_commands
from moesim.cli.options import JsonOption, ProfilesOption
from moesim.cli.simulate_commands import simulate as simulate_command
from moesim.errors import FormatError, MoesimError, Problem, ScenarioError

if TYPE_CHECKING:
    from moesim.describe.hardware_library import HardwareLibrary
    from moesim.estimation.loading import LoadedScenario
    from moesim.study.schedule_comparison import ScheduleComparison

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""Root of the usage errors: click's ClickException, which typer may carry inside and does not export."""

application = typer.Typer(
    name="moesim",
    help="How long does a step of a Mixture-of-Experts model take on a cluster, why, and does it fit?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
hardware_commands = typer.Typer(help="Devices, clusters and software stacks.", no_args_is_help=True)
chart_commands = typer.Typer(help="Self-contained HTML charts that work offline.", no_args_is_help=True)
validate_commands = typer.Typer(help="Predictions against published figures.", no_args_is_help=True)
application.add_typer(validate_commands, name="validate")
application.add_typer(hardware_commands, name="hardware")
application.add_typer(chart_commands, name="chart")
application.command(name="network")(network_command)
application.command(name="simulate")(simulate_command)
application.command(name="compare")(compare_command)
application.command(name="calibrate")(calibrate_command)
application.add_typer(topology_commands, name="topology")

ScenarioArgument = Annotated[str, typer.Argument(help="Scenario file, or the name of a shipped scenario.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set a field; may be repeated.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The chart to write.")]


def run(arguments: Sequence[str]) -> int:
    """Run a command line; bad input ends with exit code 2 and a sentence, never with a traceback."""
    command = typer.main.get_command(application)
    wants_json = "--json" in arguments
    try:
        result = command.main(args=list(arguments), prog_name="moesim", standalone_mode=False)
        return int(result or 0)
    except typer.Exit as error:
        return int(error.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except USAGE_ERROR as error:
        format_message = getattr(error, "format_message", error.__str__)
        message = str(format_message())
        if "\n" in message:  # a command without arguments shows its help
            print(message, file=sys.stderr)
            return EXIT_BAD_INPUT
        problem = Problem(code="E-CLI-001", message=message.rstrip("."), remedy="see moesim --help")
        return _report([problem], wants_json=wants_json)
    except (ScenarioError, FormatError) as error:
        return _report(list(error.problems), wants_json=wants_json)
    except MoesimError as error:
        return _report([Problem(code="E-SIM-001", message=str(error), remedy="see above")], wants_json=wants_json)
    except OSError as error:
        place = str(error.filename) if error.filename else None
        problem = Problem(
            code="E-OUT-001",
            message=f"cannot open {place or 'a file'}: {error.strerror or error}",
            remedy="check the path, its folder and its permissions",
            file=place,
        )
        return _report([problem], wants_json=wants_json)


def _report(problems: list[Problem], *, wants_json: bool) -> int:
    """Print problems: as JSON on stdout when asked for, as sentences on stderr otherwise."""
    if wants_json:
        _print_json({"errors": [problem.to_json() for problem in problems]})
    else:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        print(f"moesim: {count}", file=sys.stderr)
        for problem in problems:
            print(f"  [{problem.code}] {problem.sentence()}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


def _library(profiles: list[Path] | None) -> HardwareLibrary:
    from moesim.describe.hardware_library import HardwareLibrary

    return HardwareLibrary(profiles or [])


def _load(scenario: str, assignments: list[str] | None, profiles: list[Path] | None) -> LoadedScenario:
    from moesim.estimation.loading import load

    return load(scenario, assignments=assignments or [], library=_library(profiles))


@application.command()
def estimate(
    scenarios: Annotated[
        list[str], typer.Argument(metavar="SCENARIO...", help="Scenario files or names; several stand side by side.")
    ],
    as_json: JsonOption = False,
    assignments: SetOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print each term's formula with its numbers.")] = False,
    network: Annotated[
        Literal["closed", "flow"],
        typer.Option("--network", help="Collectives by closed form, or with contention simulated on the real wires."),
    ] = "closed",
    schedules: Annotated[
        bool, typer.Option("--compare-schedules", help="Estimate every pipeline schedule as well.")
    ] = False,
    profiles: ProfilesOption = None,
) -> int:
    """Step time, its parts, memory and cost of one or more scenarios."""
    from moesim.estimation.estimate import estimate_loaded, with_network

    loaded, problems = [], []
    for scenario in scenarios:
        try:
            loaded.append(with_network(_load(scenario, assignments, profiles), network))
        except (ScenarioError, FormatError) as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ScenarioError(problems)
    answers = [estimate_loaded(item) for item in loaded]
    if as_json:
        objects = [answer.to_json() for answer in answers]
        if explain:
            from moesim.estimation.explanation import explain_step

            for item, answer in zip(loaded, objects, strict=True):
                answer["explanation"] = [term.to_json() for term in explain_step(item)]
        if schedules:
            for comparison, answer in zip(_schedule_comparisons(loaded), objects, strict=True):
                answer["schedules"] = comparison.to_json()["schedules"]
        _print_json(objects[0] if len(objects) == 1 else {"schema_version": 1, "answers": objects})
    else:
        from moesim.cli.text import print_estimates, print_explanation, print_schedules

        print_estimates(answers)
        if schedules:
            for comparison in _schedule_comparisons(loaded):
                print_schedules(comparison)
        if explain:
            for item in loaded:
                print_explanation(item)
    return 0 if all(answer.fits for answer in answers) else EXIT_DOES_NOT_FIT


def _schedule_comparisons(loaded: list[LoadedScenario]) -> list[ScheduleComparison]:
    from moesim.study.schedule_comparison import compare_schedules

    return [compare_schedules(item) for item in loaded]


@application.command()
def check(
    file: Annotated[str, typer.Argument(help="Scenario or space file, or the name of a shipped scenario.")],
    as_json: JsonOption = False,
    assignments: SetOption = None,
    profiles: ProfilesOption = None,
) -> int:
    """Check a scenario or a space file completely, without estimating it."""
    from moesim.describe.documents import read_document
    from moesim.resources import find_scenario

    document = read_document(find_scenario(file))
    if "axes" in document.data:
        from moesim.estimation.spaces import read_space
        from moesim.estimation.tables import check_space

        space = read_space(file)
        check_space(space, profiles or [])
        facts: dict[str, Any] = {"kind": "space", "rows": len(space), "axes": [axis.name for axis in space.axes]}
    else:
        loaded = _load(file, assignments, profiles)
        facts = {"kind": "scenario", "scenario": loaded.scenario.name, "devices": loaded.scenario.devices}
    if as_json:
        _print_json({"ok": True, **facts})
    else:
        print(f"{file}: fine ({', '.join(f'{key} {value}' for key, value in facts.items())})")
    return 0


@application.command()
def schema() -> int:
    """Print the JSON schema of scenario files."""
    from moesim.describe.scenario import Scenario

    _print_json(Scenario.model_json_schema())
    return 0


@hardware_commands.command("list")
def hardware_list(as_json: JsonOption = False, profiles: ProfilesOption = None) -> int:
    """List the names of devices, clusters and stacks."""
    library = _library(profiles)
    kinds: tuple[Literal["devices", "clusters", "stacks"], ...] = ("devices", "clusters", "stacks")
    names = {kind: library.names(kind) for kind in kinds}
    if as_json:
        _print_json(names)
        return 0
    from moesim.cli.text import print_hardware_list

    print_hardware_list(library)
    return 0


@hardware_commands.command("show")
def hardware_show(
    name: Annotated[str, typer.Argument(help="Name of a device, cluster or stack.")],
    as_json: JsonOption = False,
    profiles: ProfilesOption = None,
) -> int:
    """Show one profile: every figure with its source."""
    library = _library(profiles)
    readers: dict[str, Callable[[str], Any]] = {
        "devices": library.device,
        "clusters": library.cluster,
        "stacks": library.stack,
    }
    kinds: tuple[Literal["devices", "clusters", "stacks"], ...] = ("devices", "clusters", "stacks")
    for kind in kinds:
        if library.path(kind, name) is not None:
            profile = readers[kind](name)
            if as_json:
                _print_json(profile.model_dump(mode="json"))
            else:
                from moesim.cli.text import print_profile

                print_profile(profile, kind)
            return 0
    every = [known for kind in kinds for known in library.names(kind)]
    from moesim.errors import nearest_name

    near = nearest_name(name, every)
    remedy = f"did you mean {near!r}?" if near else "see moesim hardware list"
    message = f"no device, cluster or stack is called {name!r}"
    raise ScenarioError([Problem(code="E-SCN-009", message=message, remedy=remedy)])


@application.command()
def sweep(
    space: Annotated[str, typer.Argument(help="Space file: a base scenario and axes.")],
    output: Annotated[Path, typer.Option("--output", metavar="ROWS.csv", help="Table to write.")],
    as_json: JsonOption = False,
    profiles: ProfilesOption = None,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="Processes; one per core by default.")] = None,
) -> int:
    """Estimate every scenario of a space; an interrupted sweep goes on where it stopped."""
    from moesim.study.sweep import run_sweep

    if as_json:
        _print_json(run_sweep(space, output, profiles=profiles or [], workers=workers).to_json())
        return 0
    from moesim.cli.text import print_sweep, sweep_progress

    with sweep_progress() as advance:
        summary = run_sweep(space, output, profiles=profiles or [], workers=workers, advance=advance)
    print_sweep(summary)
    return 0


def _chart(kind: str, scenario: str, out: Path, assignments: list[str] | None, profiles: list[Path] | None) -> int:
    loaded = _load(scenario, assignments, profiles)
    from moesim.report import charts

    writer: dict[str, Callable[[LoadedScenario, Path], None]] = {
        "breakdown": charts.write_breakdown_chart,
        "memory": charts.write_memory_chart,
        "scaling": charts.write_scaling_chart,
    }
    writer[kind](loaded, out)
    print(f"wrote {out}", file=sys.stderr)
    return 0


@chart_commands.command("breakdown")
def chart_breakdown(
    scenario: ScenarioArgument, out: OutOption, assignments: SetOption = None, profiles: ProfilesOption = None
) -> int:
    """Where the step goes: exposed and hidden time by category."""
    return _chart("breakdown", scenario, out, assignments, profiles)


@chart_commands.command("memory")
def chart_memory(
    scenario: ScenarioArgument, out: OutOption, assignments: SetOption = None, profiles: ProfilesOption = None
) -> int:
    """Memory of the fullest device by category, against what is usable."""
    return _chart("memory", scenario, out, assignments, profiles)


@chart_commands.command("scaling")
def chart_scaling(
    scenario: ScenarioArgument, out: OutOption, assignments: SetOption = None, profiles: ProfilesOption = None
) -> int:
    """Step time, throughput and cost against the number of devices, weak and strong."""
    return _chart("scaling", scenario, out, assignments, profiles)


@application.command()
def predict(
    operator: Annotated[str, typer.Argument(help="gemm, moe or attention.")],
    device: Annotated[str, typer.Option("--device", metavar="ID", help="Device the kernels run on.")],
    shapes: Annotated[Path, typer.Option("--input", metavar="SHAPES.csv", help="One row per kernel.")],
    output: Annotated[Path, typer.Option("--output", metavar="PREDICTIONS.csv", help="The rows with predictions.")],
    profiles: ProfilesOption = None,
) -> int:
    """Predict kernel times for the shapes of a CSV file, with intervals."""
    from moesim.study.predictions import NEEDED, predict_file

    if operator not in NEEDED:
        message, remedy = f"no operator is called {operator!r}", f"there are {', '.join(NEEDED)}"
        raise ScenarioError([Problem(code="E-SCN-010", message=message, remedy=remedy)])
    rows = predict_file(operator, device, shapes, output, library=_library(profiles))
    print(f"wrote {rows} rows to {output}", file=sys.stderr)
    return 0


@application.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def measure() -> int:
    """Time kernels and layers on this machine with PyTorch; ``moesim measure --help`` has the options."""
    from moesim.measurement import main as run_measurement

    return run_measurement(sys.argv[2:])


def _validation_folder(given: Path | None, name: str) -> Path:
    """Folder of published figures: the one given, or that of a checkout; a wheel carries none."""
    if given is not None:
        return given
    from moesim.resources import data_directory

    try:
        return data_directory("validation") / name
    except FileNotFoundError:
        message, remedy = (
            "this installation carries no published figures",
            f"give --data: a folder like validation/{name}",
        )
        raise FormatError([Problem(code="E-FMT-001", message=message, remedy=remedy)]) from None


DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="PATH", help="Published figures: a table or its folder.")
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.md", help="Write the error table to a file.")
]
ToleranceOption = Annotated[
    float | None,
    typer.Option("--tolerance", min=0.0, help="Exit with 1 if the median error of what was not fitted is above this."),
]


validate_commands.command("collectives")(validate_collectives_command)


@validate_commands.command("papers")
def validate_papers_command(
    data: DataOption = None, report: ReportOption = None, tolerance: ToleranceOption = None, as_json: JsonOption = False
) -> int:
    """Predict figures of papers as they are, and print every error."""
    from moesim.study.paper_validation import read_paper_cases, validate_papers

    result = validate_papers(read_paper_cases(_validation_folder(data, "papers") / "cases.json"))
    if report is not None:
        report.write_text(result.to_markdown(), encoding="utf-8")
    if as_json:
        _print_json(result.to_json())
    else:
        print(result.to_markdown())
    judged = result.statistics("judge")
    return EXIT_TOLERANCE if tolerance is not None and judged.get("median", 0.0) > tolerance else 0


@validate_commands.command("kernels")
def validate_kernels_command(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder of measured kernel tables.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the reports.")] = Path(
        "validation/kernels"
    ),
    operators: Annotated[
        list[str] | None, typer.Option("--operator", help="gemm, attention or moe; may be repeated.")
    ] = None,
    surfaces: Annotated[
        Path | None, typer.Option("--surfaces", metavar="DIR", help="Write surfaces fitted on all rows here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the folds.")] = 0,
) -> int:
    """Judge kernel surfaces on shapes they were not fitted on; exits with 1 if a target is missed."""
    from moesim.study.kernel_checks import validate_kernel_tables

    failures = validate_kernel_tables(data, out, operators=operators or (), surfaces=surfaces, seed=seed)
    for report in sorted(out.glob("*.md")):
        print(report.read_text(encoding="utf-8"))
    print("Missed targets: " + ("; ".join(failures) or "none"))
    return EXIT_TOLERANCE if failures else 0


@validate_commands.command("published")
def validate_published_command(
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write the report and tables here.")] = None,
    tolerance: ToleranceOption = None,
    as_json: JsonOption = False,
) -> int:
    """Predict published training runs as they are, and print every error and every run left out."""
    from moesim.study.published_validation import run_published_validation

    report = run_published_validation(_validation_folder(data, "published"), out)
    if as_json:
        _print_json(report.to_json())
    else:
        print(report.to_markdown())
    return EXIT_TOLERANCE if tolerance is not None and report.overall().median > tolerance else 0


@application.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Estimate Mixture-of-Experts steps on clusters."""
    if version:
        from moesim import __version__

        print(f"moesim {__version__}")
        raise typer.Exit(0)
