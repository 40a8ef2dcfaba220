"""Fit a device's constants on what was measured on it: what ``moesim calibrate`` does.

Every block of constants is fitted on its own cases, with the others as they are by then; predictions are those of
``moesim compare``, so that no formula is written twice. Whole shapes stay out in turn, and their errors are reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.fitted_surfaces import FittedSurfaces
from moesim.cost.surface_transfer import takes_surfaces
from moesim.describe.hardware import Device, Stack
from moesim.structure.columns import FloatArray
from moesim.study.device_figures import figure_at, fitted_figure, with_value
from moesim.study.measured_cases import MeasuredCase, Measurements
from moesim.study.measured_operations import MappedCase, map_case
from moesim.study.measurement_comparison import Judge, judge_of, operation_times_s
from moesim.study.robust_fits import Parameter, RobustFit, Values, fit_robustly

STREAMS = ("copy", "residual_add", "cast_from_fp32")
"""Kernels that read and write whole tensors with wide accesses: what a memory's streaming rate is."""
FOLDS = 5
ASIDE = ("preset", "step", "method", "kind")
"""Parts of a shape that do not make it another one: who routes, who multiplies."""


@dataclass(frozen=True)
class FitBlock:
    """Constants fitted together on some cases; ``ranges`` gives path and limits."""

    name: str
    takes: Callable[[MeasuredCase], bool]
    ranges: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class FittedBlock:
    """A block's fit on all of its cases and, shape by shape, the errors of those left out.

    ``held_out`` are log(predicted / measured) of every case when its whole shape was not fitted on; ``covered`` the
    share of them within 1.645 of the fit's spread.
    """

    name: str
    fit: RobustFit
    held_out: FloatArray
    covered: float
    cases: tuple[str, ...]

    @property
    def held_out_median(self) -> float:
        """Median of |predicted / measured - 1| of left-out shapes."""
        return float(np.median(np.abs(np.expm1(self.held_out)))) if self.held_out.size else float("nan")

    @property
    def held_out_p90(self) -> float:
        """90th percentile of the same."""
        return float(np.quantile(np.abs(np.expm1(self.held_out)), 0.9)) if self.held_out.size else float("nan")


def shape_of(case: MeasuredCase) -> str:
    """Sizes of a case without its pass, precision, load preset and library: what is left out as a whole.

    Examples
    --------
    >>> sizes = {"m": 1, "k": 2, "method": "loop"}
    >>> shape_of(MeasuredCase("c", "gemm", "gemm", "dgrad", "bf16", sizes, 0, 0, 1, 0, 1, "", ""))
    'gemm/k=2,m=1'
    """
    sizes = ",".join(f"{name}={value}" for name, value in sorted(case.shape.items()) if name not in ASIDE)
    return f"{case.suite}/{sizes}"


def is_fit_half(case: MeasuredCase) -> bool:
    """Whether a case's shape falls into the half that shipped constants are fitted on; the other half judges.

    The first byte of SHA-256 of :func:`shape_of` is even. All passes, presets and libraries of a shape go together.
    """
    return hashlib.sha256(shape_of(case).encode()).digest()[0] % 2 == 0


def half_of(measurements: Measurements, half: str) -> Measurements:
    """Cases of a half of the shapes, ``fit`` or ``judge``; anything else is all of them."""
    if half not in ("fit", "judge"):
        return measurements
    chosen = [case for case in measurements.cases if is_fit_half(case) == (half == "fit")]
    return replace(measurements, cases=tuple(chosen))


def fold_of(case: MeasuredCase, folds: int = FOLDS) -> int:
    """Fold of a case's shape, by its hash."""
    return hashlib.sha256(shape_of(case).encode()).digest()[1] % folds


def surface_blocks() -> tuple[FitBlock, ...]:
    """Constants of a device whose GEMMs and attention surfaces price."""
    return (
        FitBlock("memory_bound", _is_stream, _MEMORY),
        FitBlock("optimizer", _is_large_update, _UPDATE),
        FitBlock(
            "gemm",
            lambda case: case.suite == "gemm",
            {
                "sustained_clock_fraction": (0.2, 1.3),
                "kernels.gemm.accumulation_fraction": (0.02, 1.0),
                "kernels.gemm.unaligned_slowdown": (1.0, 20.0),
            },
        ),
        FitBlock("eight_bit", _is_scaled_by_tensor, {"kernels.gemm.eight_bit_fraction": (0.1, 1.5)}),
        FitBlock("row_scales", _is_large_and_scaled_by("row"), {"kernels.gemm.row_scale_slowdown": (0.9, 4.0)}),
        FitBlock("block_scales", _is_large_and_scaled_by("block"), {"kernels.gemm.block_scale_slowdown": (0.9, 4.0)}),
    )


LARGE_UPDATE = 2.0**24
"""Elements from which an update is a matter of bandwidth, not of many small tensors."""
LARGE_PRODUCT = 1e11
"""FLOPs from which the scales of a product slow its main loop, not the start of a kernel with other tiles."""
_UPDATE = {"kernels.memory_bound.update_fraction": (0.01, 1.2)}
_MEMORY = {"kernels.memory_bound.memory_fraction": (0.01, 1.2), "kernels.memory_bound.fixed_time": (1e-8, 1e-3)}


def constant_blocks(device: Device) -> tuple[FitBlock, ...]:
    """Constants of a device without surfaces; assumed peaks are fitted, known ones scaled by one fraction."""
    assumed = [name for name, figure in device.peak_flop_rate.items() if figure.kind == "assumed"]
    rates = {f"peak_flop_rate.{name}": (1e8, 1e16) for name in assumed} or {
        "kernels.gemm.compute_fraction": (0.01, 1.2)
    }
    gemm = {**rates, "kernels.gemm.memory_fraction": (0.01, 2.0), "kernels.gemm.fixed_time": (1e-8, 1e-3)}
    gemm["kernels.gemm.prologue_length"] = (0.1, 1e4)
    return (
        FitBlock("memory_bound", _is_stream, _MEMORY),
        FitBlock("optimizer", _is_large_update, _UPDATE),
        FitBlock("gemm", lambda case: case.suite == "gemm", gemm),
        FitBlock(
            "attention", lambda case: case.suite == "attention", {"kernels.attention.compute_fraction": (0.001, 1.2)}
        ),
    )


def _is_large_update(case: MeasuredCase) -> bool:
    return case.suite == "optimizer" and case.size("elements") >= LARGE_UPDATE


def _is_scaled_by_tensor(case: MeasuredCase) -> bool:
    return case.operation == "scaled_gemm" and case.text("scaling") == "tensor"


def _is_large_and_scaled_by(scaling: str) -> Callable[[MeasuredCase], bool]:
    def takes(case: MeasuredCase) -> bool:
        return case.operation == "scaled_gemm" and case.text("scaling") == scaling and case.flops >= LARGE_PRODUCT

    return takes


def _is_stream(case: MeasuredCase) -> bool:
    return case.suite == "memory_bound" and case.operation in STREAMS


@dataclass(frozen=True)
class Calibration:
    """A device with its fitted figures, and each block's fit."""

    device: Device
    blocks: tuple[FittedBlock, ...]

    @property
    def refused(self) -> dict[str, str]:
        """Constants that no case determines, and why."""
        return {name: why for block in self.blocks for name, why in block.fit.refused.items()}


def calibrate(
    cases: Sequence[MeasuredCase], device: Device, stack: Stack, surfaces: FittedSurfaces, *, source: str
) -> Calibration:
    """Fit a device's constants on measured cases.

    Parameters
    ----------
    cases : sequence of MeasuredCase
        What was timed on it.
    device : Device
        Where the search starts; constants that the cases do not determine stay.
    stack : Stack
        Software whose operations the cases are.
    surfaces : FittedSurfaces
        Those of the device.
    source : str
        Where the cases come from, for the provenance of every fitted figure.

    Returns
    -------
    Calibration
        The device with fitted figures.
    """
    blocks = surface_blocks() if takes_surfaces(device) else constant_blocks(device)
    fitted: list[FittedBlock] = []
    for block in blocks:
        chosen = [case for case in cases if block.takes(case)]
        done = fit_block(block, chosen, judge_of(device, stack, surfaces))
        fitted.append(done)
        for path, error in done.fit.standard_errors.items():
            text = _provenance(source, block.name, done)
            spread = max(error, done.fit.spread)
            device = fitted_figure(
                device, path, float(f"{done.fit.values[path]:.4g}"), source=text, error_fraction=spread
            )
    return Calibration(device, tuple(fitted))


def _provenance(source: str, name: str, block: FittedBlock) -> str:
    shapes = len(set(block.cases))
    return (
        f"{source}: {block.fit.num_cases} cases of {shapes} shapes of {name}, soft L1; whole shapes left out: median "
        f"error {block.held_out_median:.1%}, 90th percentile {block.held_out_p90:.1%}"
    )


def fit_block(block: FitBlock, cases: Sequence[MeasuredCase], start: Judge) -> FittedBlock:
    """Fit one block, and again without each fold of shapes."""
    mapped = [map_case(case, start.stack) for case in cases]
    fit = _fit(block, cases, mapped, start)
    held_out = np.full(len(cases), np.nan)
    folds = [fold_of(case) for case in cases]
    for fold in sorted(set(folds)):
        inside = [index for index, of in enumerate(folds) if of != fold]
        outside = [index for index, of in enumerate(folds) if of == fold]
        if not inside:
            continue
        part = _fit(block, [cases[i] for i in inside], [mapped[i] for i in inside], start)
        judge = at_values(start, part.values)
        some = [cases[i] for i in outside]
        held_out[outside] = _log_ratios(some, [mapped[i] for i in outside], judge)
    known = held_out[np.isfinite(held_out)]
    covered = float(np.mean(np.abs(known) <= 1.645 * fit.spread)) if known.size else float("nan")
    return FittedBlock(block.name, fit, known, covered, tuple(shape_of(case) for case in cases))


def _fit(block: FitBlock, cases: Sequence[MeasuredCase], mapped: Sequence[MappedCase], start: Judge) -> RobustFit:
    parameters = []
    for path, (low, high) in block.ranges.items():
        figure = figure_at(start.device, path)
        value = figure.value if figure else float(np.sqrt(low * high))
        parameters.append(Parameter(path, value, low, high))

    def log_ratios(values: Values) -> FloatArray:
        return _log_ratios(cases, mapped, at_values(start, values))

    fit = fit_robustly(parameters, log_ratios, num_cases=len(cases))
    missing = {name for name in fit.refused if figure_at(start.device, name) is None}
    return replace(fit, values={name: value for name, value in fit.values.items() if name not in missing})


def at_values(judge: Judge, values: Values) -> Judge:
    """A judge whose device has other values at some paths."""
    device = judge.device
    for path, value in values.items():
        device = with_value(device, path, value)
    surfaces = judge.surfaces
    unaligned = device.kernels.gemm.unaligned_slowdown
    if surfaces.gemm is not None and unaligned is not None:
        surfaces = replace(surfaces, gemm=replace(surfaces.gemm, penalty_unaligned=unaligned.value))
    return judge_of(device, judge.stack, surfaces)


def _log_ratios(cases: Sequence[MeasuredCase], mapped: Sequence[MappedCase], judge: Judge) -> FloatArray:
    predicted = np.array([times.sum() for times in operation_times_s(mapped, judge)])
    return np.asarray(np.log(predicted / np.array([case.median_s for case in cases])))


def host_times(cases: Sequence[MeasuredCase]) -> dict[str, float]:
    """Seconds of the host side that a stack's ``launch`` states, as measured; what was not measured is absent."""
    names = {"kernel": "kernel_launch_time", "read_back": "host_synchronisation_time", "graph_launch": "graph_launch"}
    found = {
        names[case.operation]: case.median_s for case in cases if case.suite == "launch" and case.operation in names
    }
    return dict(sorted(found.items()))


def grouped_fraction(cases: Sequence[MeasuredCase], judge: Judge) -> float | None:
    """Rate of a stack's grouped products over that of the device's GEMMs: median over cases, at most 1.

    None where no case shows it, or where the device has a surface of grouped products, which knows.
    """
    chosen = [
        case
        for case in cases
        if case.suite == "grouped_gemm" and case.text("method") != "loop" and case.pass_name != "wgrad"
    ]
    if not chosen or judge.surfaces.moe is not None:
        return None
    ratios = _log_ratios(chosen, [map_case(case, judge.stack) for case in chosen], judge)
    return float(min(np.exp(np.median(ratios)), 1.0))
