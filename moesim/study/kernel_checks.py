"""Validate the kernel surfaces of every operator against a folder of measured tables: ``moesim validate kernels``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moesim.cost.moe_surface import MoeMachine
from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import FormatError, Problem, ScenarioError
from moesim.study.fit_attention import DeviceFigures
from moesim.study.kernel_tables import kernel_table_paths
from moesim.study.kernel_transfer import write_transfer_validation
from moesim.study.kernel_validation import (
    fit_gemm_tables,
    validate_gemm,
    write_gemm_surfaces,
    write_kernel_report,
)
from moesim.study.kernel_validation_attention import write_attention_validation
from moesim.study.kernel_validation_moe import write_moe_validation

Validator = Callable[[Path, Path, Path | None, int], list[str]]


def validate_kernel_tables(
    data: Path, reports: Path, *, operators: Sequence[str] = (), surfaces: Path | None = None, seed: int = 0
) -> list[str]:
    """Fit on four fifths of the shapes, judge on the fifth, five times; then each device from the others.

    Parameters
    ----------
    data : Path
        Folder of ``<device>_<operator>_bf16.csv.gz`` tables.
    reports : Path
        Folder of the reports, ``<operator>.md`` and ``.csv``, and ``transfer.md``.
    operators : sequence of str, optional
        Only these; by default all there are.
    surfaces : Path, optional
        Folder for surfaces fitted on all rows; none are written without it.
    seed : int, optional
        Seed of the folds.

    Returns
    -------
    list of str
        Targets that were missed.

    Raises
    ------
    ScenarioError
        If an operator is unknown.
    FormatError
        If the folder or a table is wrong.
    """
    unknown = [name for name in operators if name not in VALIDATORS]
    if unknown:
        message = f"no operator is called {unknown[0]!r}"
        raise ScenarioError([Problem(code="E-SCN-010", message=message, remedy=f"there are {', '.join(VALIDATORS)}")])
    if not data.is_dir():
        message, remedy = f"{data} is not a folder", "give the folder of the kernel tables"
        raise FormatError([Problem(code="E-FMT-001", message=message, remedy=remedy, file=str(data))])
    chosen = tuple(operators) or tuple(VALIDATORS)
    failures: list[str] = []
    for name in chosen:
        failures += [f"{name}: {failure}" for failure in VALIDATORS[name](data, reports, surfaces, seed)]
    write_transfer_validation(data, chosen, reports=reports, surfaces=surfaces)
    return failures


def _gemm(data: Path, reports: Path, surfaces: Path | None, seed: int) -> list[str]:
    fitted = fit_gemm_tables(data, seed=seed)
    validation = validate_gemm(data, seed=seed, fitted=fitted)
    write_kernel_report(validation, reports)
    if surfaces is not None:
        write_gemm_surfaces(fitted, surfaces, seed=seed)
    return validation.failures


def _attention(data: Path, reports: Path, surfaces: Path | None, seed: int) -> list[str]:
    library = HardwareLibrary()
    figures = {}
    for name in kernel_table_paths(data, "attention_prefill"):
        device = library.device(name)
        peak = device.peak_flop_rate["bf16"].value
        figures[name] = DeviceFigures(peak, device.memory_bandwidth.value, device.compute_units.value)
    return write_attention_validation(data, figures, reports=reports, surfaces=surfaces, seed=seed)


def _moe(data: Path, reports: Path, surfaces: Path | None, seed: int) -> list[str]:
    library = HardwareLibrary()
    machines = {}
    for name in kernel_table_paths(data, "moe"):
        device = library.device(name)
        peak = device.peak_flop_rate["bf16"].value
        machines[name] = MoeMachine(peak, device.memory_bandwidth.value, device.compute_units.value)
    return write_moe_validation(data, machines, reports=reports, surfaces=surfaces, seed=seed)


VALIDATORS: dict[str, Validator] = {"gemm": _gemm, "attention": _attention, "moe": _moe}
