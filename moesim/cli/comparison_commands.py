"""The command ``moesim compare``: predictions against what ``moesim measure`` timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from moesim.cli import EXIT_TOLERANCE
from moesim.cli.options import JsonOption, ProfilesOption, SampleOption


def compare(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.jsonl", help="What moesim measure wrote.")],
    profile: Annotated[str, typer.Option("--profile", metavar="ID", help="Device that is predicted.")],
    stack: Annotated[
        str | None,
        typer.Option("--stack", metavar="ID", help="Software of layers and blocks; a PyTorch one by default."),
    ] = None,
    half: Annotated[
        Literal["all", "fit", "judge"],
        typer.Option("--half", help="Shapes that shipped constants were fitted on, or those that judge them."),
    ] = "all",
    time: SampleOption = "median",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0.0, help="Exit with 1 if the median error of a suite is above this."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="REPORT.md", help="Write the error table here.")] = None,
    chart: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE.html", help="Draw predicted over measured.")
    ] = None,
    as_json: JsonOption = False,
    profiles: ProfilesOption = None,
) -> int:
    """Compare predicted with measured times, case by case, worst first."""
    from moesim.describe.hardware_library import HardwareLibrary
    from moesim.formats.measurement_records import read_measurements
    from moesim.study.calibration import half_of
    from moesim.study.measurement_comparison import DEFAULT_STACK, compare_measurements, judge
    from moesim.study.measurement_report import comparison_markdown

    judged_by = judge(profile, stack or DEFAULT_STACK, HardwareLibrary(profiles or []))
    measured = half_of(read_measurements(results), half)
    if time == "minimum":
        measured = measured.of_shortest_samples()
    comparison = compare_measurements(measured, judged_by, source=str(results))
    name = results.name if half == "all" else f"{results.name}, the half of the shapes that is to {half}"
    report = comparison_markdown(comparison, source=name)
    if out is not None:
        out.write_text(report, encoding="utf-8")
    if chart is not None:
        from moesim.report.comparison_figures import write_comparison_chart

        write_comparison_chart(comparison, chart, source=results.name)
    if as_json:
        sys.stdout.write(json.dumps(comparison.to_json(), indent=1, allow_nan=False) + "\n")
    else:
        print(report)
    beyond = comparison.suites_beyond(tolerance) if tolerance is not None else []
    if beyond:
        print(f"moesim: median error above {tolerance:.0%}: {', '.join(beyond)}", file=sys.stderr)
    return EXIT_TOLERANCE if beyond else 0
