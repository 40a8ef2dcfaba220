"""Fit single attention kernels by library and pass, and how often a stack's element-wise kernels go over their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from moesim.cost.attention_surface import AttentionParameters, AttentionTimeSurface
from moesim.cost.efficiency_surfaces import OVERLAP_EXPONENT, device_rates
from moesim.describe.hardware import ElementwiseKernels
from moesim.describe.quantities import PRECISION_BYTES
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import Gemm
from moesim.study.calibration import FOLDS, fold_of, shape_of
from moesim.study.kernel_tables import half_widths_of_bins
from moesim.study.measured_cases import MeasuredCase
from moesim.study.measured_operations import WIDENING, MappedCase, map_case
from moesim.study.measurement_comparison import Judge, operation_times_s
from moesim.study.robust_fits import Parameter, RobustFit, Values, fit_robustly

KERNEL_START = AttentionParameters(
    fixed_s=2.5e-6,
    compute_fraction=0.4,
    head_64_factor=0.8,
    head_192_factor=0.9,
    head_256_factor=1.0,
    lone_tile_factor=1.5,
    tile_s=3e-7,
    extra_passes=0.0,
    token_s=1e-15,
    cache_bytes=1.0,
    overlap_exponent=1.1,
    tile_element_s=1.2e-10,
    stream_exponent=4.0,
)
"""A kernel alone: no operator around it, operands from memory, whose copies run beside the products."""
KERNEL_RANGES = {
    "compute_fraction": (0.02, 1.2),
    "head_64_factor": (0.4, 1.2),
    "head_192_factor": (0.3, 1.3),
    "head_256_factor": (0.3, 1.4),
    "lone_tile_factor": (1.0, 2.0),
    "tile_s": (1e-8, 3e-5),
    "tile_element_s": (1e-12, 1e-8),
}
"""A row of tiles of 64 to 128 queries is the shortest that a compute unit takes."""
BACKWARD_ROW_BYTES = 14.0
"""Around a backward pass, per query element in 16 bits: result and its gradient are read for their row sums (4), sums
of query gradients in fp32 set to zero (4), read (4) and written in 16 bits (2)."""
LARGE_BYTES = 8.0 * 2**20
"""Traffic from which the time of a kernel is that of its bytes."""


@dataclass(frozen=True)
class FittedKernel:
    """An attention kernel: library, pass, its surface, the fit, and log errors of shapes left out."""

    library: str
    pass_name: str
    surface: AttentionTimeSurface
    fit: RobustFit
    held_out: FloatArray
    cases: tuple[str, ...]

    def to_json(self, half: float) -> dict[str, Any]:
        """Return the kernel as its document holds it, with a half width of its interval."""
        errors = np.abs(np.expm1(self.held_out))
        return {
            "library": self.library,
            "pass": self.pass_name,
            "parameters": {name: float(f"{value:.5g}") for name, value in asdict(self.surface.parameters).items()},
            "domain": {name: list(limits) for name, limits in self.surface.domain.items()},
            "interval": {"level": 0.9, "edges_s": [], "half_widths": [float(f"{half:.3g}")]},
            "standard_errors": {name: float(f"{error:.3g}") for name, error in self.fit.standard_errors.items()},
            "refused": dict(self.fit.refused),
            "held_out": {
                "median": float(f"{np.median(errors):.3g}"),
                "p90": float(f"{np.quantile(errors, 0.9):.3g}"),
                "count": len(errors),
            },
            "fit_cases": list(self.cases),
        }


def fit_attention_kernels(cases: Sequence[MeasuredCase], judge: Judge) -> list[FittedKernel]:
    """Fit a kernel for every library and pass with at least four shapes.

    Parameters
    ----------
    cases : sequence of MeasuredCase
        Any; those of the attention suite with a library of their own are taken.
    judge : Judge
        The device at its sustained clock.

    Returns
    -------
    list of FittedKernel
        In the order of the cases.
    """
    groups: dict[tuple[str, str], list[MeasuredCase]] = {}
    for case in cases:
        if case.suite == "attention" and case.text("method") not in ("", "default"):
            groups.setdefault((case.text("method"), case.pass_name), []).append(case)
    return [_fit_kernel(key, some, judge) for key, some in groups.items() if len({shape_of(one) for one in some}) >= 4]


Timed = Sequence[tuple[MeasuredCase, MappedCase]]


def _fit_kernel(key: tuple[str, str], cases: Sequence[MeasuredCase], judge: Judge) -> FittedKernel:
    timed = [(case, map_case(case, judge.stack)) for case in cases]
    fit = _fit(key, timed, judge)
    held_out = np.zeros(0)
    for fold in sorted({fold_of(case, FOLDS) for case in cases}):
        part = [one for one in timed if fold_of(one[0], FOLDS) != fold]
        rest = [one for one in timed if fold_of(one[0], FOLDS) == fold]
        held_out = np.concatenate([held_out, _log_ratios(key, rest, judge, _fit(key, part, judge).values)])
    surface = _surface(key, judge, fit.values)
    named = ("batch", "length", "heads", "kv_heads", "head_size")
    fields = ("batch", "sequence", "heads", "kv_heads", "head_size")
    domain = {
        field: (min(case.size(name) for case in cases), max(case.size(name) for case in cases))
        for field, name in zip(fields, named, strict=True)
    }
    return FittedKernel(*key, replace(surface, domain=domain), fit, held_out, tuple(case.case for case in cases))


def _start(key: tuple[str, str]) -> AttentionParameters:
    return replace(KERNEL_START, row_bytes=BACKWARD_ROW_BYTES if key[1] == "backward" else 0.0)


def _fit(key: tuple[str, str], timed: Timed, judge: Judge) -> RobustFit:
    start = asdict(_start(key))
    parameters = [Parameter(name, start[name], low, high) for name, (low, high) in KERNEL_RANGES.items()]

    def log_ratios(values: Values) -> FloatArray:
        return _log_ratios(key, timed, judge, values)

    return fit_robustly(parameters, log_ratios, num_cases=len(timed))


def _surface(key: tuple[str, str], judge: Judge, values: Values) -> AttentionTimeSurface:
    device = judge.device
    rates = device_rates(device)
    figures = (rates.peak_for("bf16"), rates.memory_bandwidth, rates.compute_units)
    parameters = replace(_start(key), **values)
    return AttentionTimeSurface(device.id, *figures, parameters, (), {}, np.zeros(0), np.zeros(1))


def _log_ratios(key: tuple[str, str], timed: Timed, judge: Judge, values: Values) -> FloatArray:
    kernels = {key: _surface(key, judge, values)}
    surfaces = replace(judge.surfaces, attention_kernels=kernels)
    hardware = replace(judge.alone, device=replace(judge.alone.device, surfaces=surfaces))
    times = operation_times_s([mapped for _, mapped in timed], replace(judge, surfaces=surfaces, alone=hardware))
    return np.log([time_s.sum() / case.median_s for time_s, (case, _) in zip(times, timed, strict=True)])


def half_widths_of_passes(kernels: Sequence[FittedKernel]) -> dict[str, float]:
    """Half width of the 90 % interval of each pass: errors of shapes left out, of all libraries together.

    A library has so few shapes that its own widths say little; split conformal, see ``half_widths_of_bins``.
    """
    names = dict.fromkeys(kernel.pass_name for kernel in kernels)
    pooled = {name: np.concatenate([one.held_out for one in kernels if one.pass_name == name]) for name in names}
    return {name: float(half_widths_of_bins(errors, np.ones_like(errors), [])[0]) for name, errors in pooled.items()}


def kernels_document(
    kernels: Sequence[FittedKernel], device: str, source: str, widths: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """JSON document of fitted kernels, as ``surfaces/flash_kernels_<device>.json`` holds it.

    Parameters
    ----------
    kernels : sequence of FittedKernel
        At least one.
    device : str
        Device id.
    source : str
        Where the cases come from.
    widths : mapping of str to float, optional
        Half width of the interval of each pass, where more is known than these kernels show.

    Returns
    -------
    dict
        The document.
    """
    surface, halves = kernels[0].surface, widths or half_widths_of_passes(kernels)
    return {
        "schema_version": 1,
        "operator": "flash_kernels",
        "device": device,
        "precision": "bf16",
        "provenance": {"kind": "fitted", "source": source},
        "figures": {
            "peak_flop_per_s": surface.peak_flop_per_s,
            "memory_bytes_per_s": surface.memory_bytes_per_s,
            "compute_units": surface.compute_units,
        },
        "grids": [],
        "kernels": [kernel.to_json(halves[kernel.pass_name]) for kernel in kernels],
    }


def elementwise_passes(cases: Sequence[MeasuredCase], judge: Judge) -> dict[str, dict[str, float]]:
    """Passes that a stack's kernels take as long as, by kernel and pass: medians over large cases.

    Parameters
    ----------
    cases : sequence of MeasuredCase
        Suites memory_bound, dispatch and router.
    judge : Judge
        The device with its fitted streaming rate and time per kernel.

    Returns
    -------
    dict
        Names of :class:`~moesim.describe.hardware.ElementwiseKernels` to pass to number; what no case shows is absent.
        A router's choice is what it takes beyond its product and cast.
    """
    rates = judge.alone.device
    rate = rates.memory_bandwidth * rates.traffic_fraction
    smallest = min(LARGE_BYTES, np.quantile([case.num_bytes for case in cases], 0.5)) if cases else 0.0
    found: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        rule = ELEMENTS.get(case.operation)
        if rule is None or case.num_bytes < smallest:
            continue
        name, elements = rule
        rest_s = case.median_s - rates.traffic_fixed_s - (_product_and_cast_s(case, judge) if name == CHOICE else 0.0)
        width = PRECISION_BYTES["fp32" if name == CHOICE else case.dtype]
        found.setdefault((name, case.pass_name), []).append(max(rest_s, 0.0) * rate / (width * elements(case)))
    result: dict[str, dict[str, float]] = {}
    for (name, pass_name), values in found.items():
        result.setdefault(name, {})[pass_name] = float(np.median(values))
    return result


def _product_and_cast_s(case: MeasuredCase, judge: Judge) -> float:
    """What a router's product and cast take."""
    mapped = map_case(case, judge.stack)
    parts = tuple(one for one in mapped.operations if one.name in ("router.gemm", "router.cast"))
    (times,) = operation_times_s([replace(mapped, operations=parts)], judge)
    return float(times.sum())


def sort_kernels(cases: Sequence[MeasuredCase], judge: Judge) -> int | None:
    """Short kernels in a row that sorting the choices takes as long as; None where no case shows it."""
    rates = judge.alone.device
    rate = rates.memory_bandwidth * rates.traffic_fraction
    found = [
        (case.median_s - case.num_bytes / rate) / rates.traffic_fixed_s for case in cases if case.operation == "sort"
    ]
    return max(round(float(np.median(found))), 0) if found else None


def scan_row_s(cases: Sequence[MeasuredCase], judge: Judge) -> float | None:
    """Seconds per row of the scan that one-hot masks find their slots by; None where no case shows it.

    What a case takes beyond its other kernels, over its rows. Kernels that are priced too low make it larger, never
    smaller: the least of the cases.
    """
    known = judge.stack.elementwise
    if known is None:
        return None
    without = judge.stack.model_copy(update={"elementwise": known.model_copy(update={"scan_row_s": 0.0})})
    masks = [case for case in cases if case.operation == "one_hot_masks"]
    times = operation_times_s([map_case(case, without) for case in masks], judge)
    found = [
        (case.median_s - float(time_s.sum())) / (case.size("group_tokens") * case.size("experts_per_token"))
        for case, time_s in zip(masks, times, strict=True)
    ]
    return max(min(found), 0.0) if found else None


def measured_elementwise(cases: Sequence[MeasuredCase], judge: Judge, *, source: str) -> ElementwiseKernels | None:
    """Element-wise kernels of a stack as cases show them, the others as the stack has them.

    None where the stack states none and the cases do not show all.
    """
    passes, known = elementwise_passes(cases, judge), judge.stack.elementwise
    fields: dict[str, Any] = known.model_dump() if known is not None else {"router_cast": dict(BOTH_CAST)}
    for name, by_pass in passes.items():
        forward = by_pass.get("forward", fields.get(name, {}).get("forward"))
        backward = by_pass.get("backward", fields.get(name, {}).get("backward", forward))
        fields[name] = {"forward": _rounded(forward), "backward": _rounded(backward)}
    kernels, widening = sort_kernels(cases, judge), widening_s(cases, judge)
    if kernels is not None:
        fields["sort_kernels"] = kernels
    if widening is not None:
        fields["widening_s"] = float(f"{widening:.3g}")
    if any(_has_separate_sum(case) for case in cases):
        fields["expert_gradient_bytes"] = SUM_BYTES
    elif any(case.suite == "grouped_gemm" and case.pass_name == "wgrad" for case in cases):
        fields["expert_gradient_bytes"] = None  # the product adds
    scan = scan_row_s(cases, judge)
    if scan is not None:
        fields["scan_row_s"] = float(f"{scan:.3g}")
    fields["source"] = source
    try:
        return ElementwiseKernels.model_validate(fields)
    except ValidationError:
        return None


BOTH_CAST = {"forward": 3.0, "backward": 3.0}


def _rounded(value: float) -> float:
    return float(f"{min(value, 100.0):.3g}")


def _rows(case: MeasuredCase) -> float:
    return case.size("rows") * case.size("columns")


def _routed(case: MeasuredCase) -> float:
    return case.size("tokens") * case.size("experts_per_token") * case.size("hidden")


def _scores(case: MeasuredCase) -> float:
    return case.size("tokens") * case.size("experts")


CHOICE = "router_choice"
ELEMENTS: Mapping[str, tuple[str, Callable[[MeasuredCase], float]]] = {
    "rms_norm": ("norm", _rows),
    "residual_add": ("residual", _rows),
    "gated_activation": ("activation", _rows),
    "permute": ("permute", _routed),
    "unpermute": ("unpermute", _routed),
    "router": (CHOICE, _scores),
}


SUM_BYTES = 10.0
"""A gradient in 16 bits is read, a sum in fp32 read and written."""


def widening_s(cases: Sequence[MeasuredCase], judge: Judge) -> float | None:
    """Seconds that compute units take to widen an element from 16 to 32 bits; None where no case shows it.

    Casts to fp32, sums of gradients, and what the experts' weight gradients take that are added by a kernel of their
    own, less their product: each holds its traffic at the streaming rate and, in the p-norm of GEMMs, the conversion.
    The median of the three kinds, large cases only.
    """
    rates = judge.alone.device
    rate = rates.memory_bandwidth * rates.traffic_fraction
    found: dict[str, list[float]] = {}
    for case in cases:
        if case.operation in WIDENING and case.num_bytes >= LARGE_BYTES:
            elements = _rows(case)
            each_s, moved_s = (case.median_s - rates.traffic_fixed_s) / elements, case.num_bytes / elements / rate
        elif _has_separate_sum(case):
            each_s, moved_s = _sum_s(case, judge), SUM_BYTES / rate
        else:
            continue
        found.setdefault(case.operation, []).append(_beside(max(each_s, moved_s), moved_s))
    return float(np.median([np.median(values) for values in found.values()])) if found else None


def _beside(both_s: float, one_s: float) -> float:
    """The other part of a p-norm."""
    return float((both_s**OVERLAP_EXPONENT - one_s**OVERLAP_EXPONENT) ** (1.0 / OVERLAP_EXPONENT))


def _has_separate_sum(case: MeasuredCase) -> bool:
    is_grouped = case.suite == "grouped_gemm" and case.text("method") != "loop"
    return is_grouped and case.pass_name == "wgrad" and "add_" in case.implementation


def _sum_s(case: MeasuredCase, judge: Judge) -> float:
    """Time per weight of a case beyond that of its product."""
    (operation,) = map_case(case, judge.stack.model_copy(update={"elementwise": None})).operations
    assert isinstance(operation.work, Gemm)
    product = replace(operation.work, output_bytes=2.0, accumulates=False)
    one = replace(map_case(case, judge.stack), operations=(replace(operation, work=product),))
    (time_s,) = operation_times_s([one], judge)
    weights = float((product.groups * product.rows * product.columns)[0])
    return (case.median_s - float(time_s.sum()) - judge.alone.device.traffic_fixed_s) / weights
