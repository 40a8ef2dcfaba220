"""The command ``moesim calibrate``: constants of a device fitted on what was measured on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesim.cli.options import JsonOption, ProfilesOption, SampleOption

if TYPE_CHECKING:
    from moesim.describe.hardware_library import HardwareLibrary
    from moesim.structure.step_graph import CollectiveKind
    from moesim.study.calibration_report import CalibrationResult
    from moesim.study.link_calibration import LinkCase
    from moesim.study.measured_cases import MeasuredCase

SURFACES = "surfaces"
KERNELS = "flash_kernels"


def calibrate(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Results of moesim measure, logs of nccl-tests, traces of PyTorch."),
    ],
    profile: Annotated[str, typer.Option("--profile", metavar="ID", help="Device to start from.")],
    out: Annotated[Path, typer.Option("--out", metavar="ID.yaml", help="The calibrated profile to write.")],
    stack: Annotated[str | None, typer.Option("--stack", metavar="ID", help="Software the cases ran with.")] = None,
    stack_out: Annotated[
        Path | None,
        typer.Option("--stack-out", metavar="ID.yaml", help="Write the stack with what was measured of it."),
    ] = None,
    half: Annotated[
        Literal["all", "fit"], typer.Option("--half", help="fit: leave the judging half of the shapes out.")
    ] = "all",
    time: SampleOption = "median",
    collective: Annotated[
        str | None, typer.Option("--collective", metavar="KIND", help="Of logs that do not name their program.")
    ] = None,
    level: Annotated[
        str, typer.Option("--level", metavar="NAME", help="Links that logs and traces ran over.")
    ] = "links",
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="ID", help="Whose levels collectives ran over: --stack-out gets their links."
        ),
    ] = None,
    as_json: JsonOption = False,
    profiles: ProfilesOption = None,
) -> int:
    """Fit a device's constants robustly, say what the cases leave open, and write a profile."""
    from moesim.describe.hardware_library import HardwareLibrary
    from moesim.study.calibration_report import calibration_text
    from moesim.study.measurement_comparison import DEFAULT_STACK

    library = HardwareLibrary(profiles or [])
    cases, links = _read(results, _kind(collective), level, is_shortest=time == "minimum")
    source = ", ".join(path.name for path in results)
    result = _fit(cases, links, library, profile, stack, is_half=half == "fit", source=source)
    collectives = _collectives(result, library, stack or DEFAULT_STACK, cluster, source) if cluster else None
    _write(result, library, profile, out, source)
    if stack_out is not None:
        _write_stack(result, library, stack or DEFAULT_STACK, stack_out, collectives)
    if as_json:
        sys.stdout.write(json.dumps({**result.to_json(), "profile": out.stem}, indent=1, allow_nan=False) + "\n")
    else:
        print(calibration_text(result))
        print(f"wrote {out}", file=sys.stderr)
    return 0


def _kind(name: str | None) -> CollectiveKind | None:
    from moesim.errors import Problem, ScenarioError
    from moesim.study.link_calibration import ALGORITHM_OF

    found = next((kind for kind in ALGORITHM_OF if kind == name), None)
    if name is not None and found is None:
        message, remedy = f"no collective is called {name!r}", f"there are {', '.join(ALGORITHM_OF)}"
        raise ScenarioError([Problem("E-SCN-010", message, remedy, field="--collective")])
    return found


def _read(
    paths: list[Path], kind: CollectiveKind | None, level: str, *, is_shortest: bool
) -> tuple[list[MeasuredCase], list[LinkCase]]:
    """Cases and collectives of all files, each by what its first lines say it is; all problems together."""
    from moesim.errors import FormatError, Problem
    from moesim.formats.kineto_trace import looks_like_trace, read_kineto_trace
    from moesim.formats.measurement_records import read_measurements
    from moesim.formats.nccl_tests_log import looks_like_nccl_tests, read_nccl_tests_log
    from moesim.study.link_calibration import link_cases

    cases: list[MeasuredCase] = []
    links: list[LinkCase] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            if looks_like_trace(path):
                found, collectives = read_kineto_trace(path, level=level)
                cases += found
                links += collectives
            elif looks_like_nccl_tests(path.read_text(encoding="utf-8", errors="replace")):
                links += read_nccl_tests_log(path, kind=kind, level=level)
            else:
                measured = read_measurements(path)
                if is_shortest:
                    measured = measured.of_shortest_samples()
                cases += measured.cases
                links += link_cases(measured.cases)
        except FormatError as error:
            problems += error.problems
    if problems:
        raise FormatError(problems)
    return cases, links


def _fit(
    cases: list[MeasuredCase],
    links: list[LinkCase],
    library: HardwareLibrary,
    profile: str,
    stack: str | None,
    *,
    is_half: bool,
    source: str,
) -> CalibrationResult:
    from moesim.study.calibration import at_values, grouped_fraction, host_times, is_fit_half
    from moesim.study.calibration import calibrate as fit_device
    from moesim.study.calibration_report import CalibrationResult
    from moesim.study.kernel_calibration import fit_attention_kernels, measured_elementwise
    from moesim.study.link_calibration import fit_links
    from moesim.study.measurement_comparison import DEFAULT_STACK, judge, judge_of
    from moesim.study.overlap_calibration import hidden_shares

    judged_by = judge(profile, stack or DEFAULT_STACK, library)
    chosen = [case for case in cases if is_fit_half(case) or not is_half]
    calibration = fit_device(chosen, judged_by.device, judged_by.stack, judged_by.surfaces, source=source)
    fitted = judge_of(calibration.device, judged_by.stack, at_values(judged_by, {}).surfaces)
    has_surfaces = judged_by.surfaces.attention is not None
    kernels = fit_attention_kernels(chosen, fitted) if has_surfaces else []
    refused = {} if links else {"links": "no collectives among the cases"}
    if not any(case.suite == "overlap" for case in cases):
        refused["overlap"] = "no suite overlap among the cases"
    overlap, grouped = hidden_shares(cases), grouped_fraction(chosen, fitted)
    elementwise = measured_elementwise(chosen, fitted, source=f"{source}: medians over shapes")
    return CalibrationResult(
        calibration, kernels, fit_links(links), host_times(chosen), refused, elementwise, overlap, grouped
    )


def _write(result: CalibrationResult, library: HardwareLibrary, profile: str, out: Path, source: str) -> None:
    """Write the device's profile and, in a folder ``surfaces`` beside its folder, the attention kernels."""
    from moesim.formats.profile_files import write_json, write_profile
    from moesim.study.device_figures import figure_at
    from moesim.study.kernel_calibration import kernels_document

    base, calibration = library.path("devices", profile), result.calibration
    assert base is not None
    assert calibration is not None
    names = [name for block in calibration.blocks for name in block.fit.standard_errors]
    figures = {name: figure for name in names if (figure := figure_at(calibration.device, name)) is not None}
    links = [
        f"{one.level} {one.family}: {one.fit.values['alpha_s']:.4g} s a round, "
        f"{one.fit.values['beta_bytes_per_s']:.4g} bytes/s"
        for one in result.levels
        if not one.fit.refused
    ]
    host = [f"{name} {seconds:.4g} s" for name, seconds in result.host.items()]
    notes = f"Calibrated on {source} from {profile}."
    notes += "".join(f" {head}: {'; '.join(some)}." for head, some in (("Links", links), ("Host", host)) if some)
    fields = {
        "name": f"{calibration.device.name}, calibrated",
        "surface_device": calibration.device.surface_device or profile,
        "notes": notes,
    }
    write_profile(base, out, figures=figures, fields=fields)
    if result.kernels:
        folder = out.parent.parent if out.parent.name == "devices" else out.parent
        document = kernels_document(result.kernels, out.stem, source)
        write_json(folder / SURFACES / f"{KERNELS}_{out.stem}.json", document)


def _collectives(
    result: CalibrationResult, library: HardwareLibrary, stack: str, cluster: str, source: str
) -> dict[str, Any]:
    """The stack's collectives with the links that were measured, as its profile has them."""
    from moesim.formats.profile_files import plain_fields
    from moesim.study.link_profiles import measured_collectives

    tiers = measured_collectives(library.stack(stack), library.cluster(cluster), result.levels, source=source)
    return {name: plain_fields(tier) for name, tier in tiers.items()}


def _write_stack(
    result: CalibrationResult, library: HardwareLibrary, stack: str, out: Path, collectives: dict[str, Any] | None
) -> None:
    """Write the stack's profile with the launch times, element-wise kernels and links that were measured."""
    from moesim.describe.quantities import DurationFigure, Figure, NumberFigure
    from moesim.formats.profile_files import write_profile

    base = library.path("stacks", stack)
    assert base is not None
    figures: dict[str, Figure] = {
        f"launch.{name}": DurationFigure.fitted(seconds, "moesim calibrate", 0.2)
        for name, seconds in result.host.items()
        if name in ("kernel_launch_time", "host_synchronisation_time")
    }
    if result.grouped_fraction is not None:
        figures["gemm_compute_fraction"] = NumberFigure(
            value=result.grouped_fraction,
            kind="fitted",
            source="moesim calibrate: grouped products over GEMMs",
            error_fraction=0.1,
        )
    fields: dict[str, Any] = {"name": f"{library.stack(stack).name}, calibrated"}
    if result.elementwise is not None:
        fields["elementwise"] = result.elementwise.model_dump()
    if collectives is not None:
        fields["collectives"] = collectives
    write_profile(base, out, figures=figures, fields=fields)
