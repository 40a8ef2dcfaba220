"""Predicted against measured times of one device, case by case: what ``moesim compare`` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.cost.attention_surface import attention_half_widths
from moesim.cost.collectives import fabric_rates
from moesim.cost.efficiency_surfaces import device_rates
from moesim.cost.fitted_surfaces import NORMAL_QUANTILE, FittedSurfaces
from moesim.cost.operators import Hardware
from moesim.cost.state_costs import update_time_s
from moesim.cost.surface_transfer import device_surfaces
from moesim.cost.uncertainty import LEVEL, MEASURED_PASSES_ERROR, figure_error
from moesim.describe.hardware import Device, Stack
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.quantities import PRECISION_BYTES
from moesim.errors import FormatError, Problem, ScenarioError
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import AttentionCore, Gemm, Operation
from moesim.study.compared_cases import ComparedCase, ErrorStatistics, MemoryCase, error_statistics
from moesim.study.kernel_pricing import operation_seconds
from moesim.study.measured_cases import MeasuredCase, Measurements
from moesim.study.measured_operations import MappedCase, UnmappableCaseError, map_case
from moesim.study.step_comparison import alone, step_comparison

DEFAULT_STACK = "pytorch_grouped_mm_nccl"
EXTRAPOLATION_FACTOR = 2.0
"""Times the half width of a surface where a pass is not the one it was fitted on; as ``moesim predict`` has it."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Comparison:
    """All cases of a file against one profile; ``unmapped`` are cases with the reason why the model has no price."""

    device: str
    stack: str
    device_names: tuple[str, ...]
    compared: Sequence[ComparedCase]
    unmapped: Sequence[tuple[MeasuredCase, str]]
    skipped: Sequence[tuple[str, str]] = ()
    memory: Sequence[MemoryCase] = ()

    def groups(self, key: Callable[[MeasuredCase], tuple[str, ...]]) -> dict[tuple[str, ...], list[ComparedCase]]:
        """Cases by a key, in the order in which the file has them."""
        found: dict[tuple[str, ...], list[ComparedCase]] = {}
        for one in self.compared:
            found.setdefault(key(one.case), []).append(one)
        return found

    def by_suite(self) -> dict[str, ErrorStatistics]:
        """Statistics of each suite."""
        return {key[0]: error_statistics(some) for key, some in self.groups(lambda case: (case.suite,)).items()}

    def by_operation(self) -> dict[tuple[str, ...], ErrorStatistics]:
        """Statistics by suite, operation and pass."""
        parts = self.groups(lambda case: (case.suite, case.operation, case.pass_name))
        return {key: error_statistics(some) for key, some in parts.items()}

    def worst(self) -> list[ComparedCase]:
        """All cases, the largest factor between predicted and measured first."""
        return sorted(self.compared, key=lambda one: -abs(one.log_ratio))

    def suites_beyond(self, tolerance: float) -> list[str]:
        """Suites whose median error is above a tolerance."""
        return [suite for suite, errors in self.by_suite().items() if errors.median > tolerance]

    def to_json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        operations = [
            {"suite": suite, "operation": operation, "pass": pass_name, **errors.to_json()}
            for (suite, operation, pass_name), errors in self.by_operation().items()
        ]
        return {
            "schema_version": 1,
            "device": self.device,
            "stack": self.stack,
            "measured_on": list(self.device_names),
            "interval_level": LEVEL,
            "suites": {suite: errors.to_json() for suite, errors in self.by_suite().items()},
            "operations": operations,
            "cases": [one.to_json() for one in self.worst()],
            "memory": [one.to_json() for one in self.memory],
            "unmapped": [{"case": case.case, "reason": reason} for case, reason in self.unmapped],
            "skipped": [{"case": case, "reason": reason} for case, reason in self.skipped],
        }


@dataclass(frozen=True)
class Judge:
    """A device and a stack with the rates that kernels alone and layers in a step are priced at."""

    device: Device
    stack: Stack
    surfaces: FittedSurfaces
    alone: Hardware
    in_step: Hardware


def judge(device_name: str, stack_name: str, library: HardwareLibrary) -> Judge:
    """Rates of a device and a stack.

    Parameters
    ----------
    device_name, stack_name : str
        Names of profiles.
    library : HardwareLibrary
        Where they come from.

    Raises
    ------
    ScenarioError
        If either is unknown; both are named.
    """
    wrong = []
    if library.path("devices", device_name) is None:
        wrong.append(library.unknown_name("devices", device_name, "device"))
    if library.path("stacks", stack_name) is None:
        wrong.append(library.unknown_name("stacks", stack_name, "stack"))
    if wrong:
        raise ScenarioError(wrong)
    device, stack = library.device(device_name), library.stack(stack_name)
    return judge_of(device, stack, device_surfaces(device, library))


def judge_of(device: Device, stack: Stack, surfaces: FittedSurfaces) -> Judge:
    """Rates of profiles that are at hand; one device alone has no fabric to price."""
    fabric = fabric_rates(alone(device), device, stack)
    kernels = device_rates(device, surfaces=surfaces, is_sustained=True)
    in_step = device_rates(device, stack, surfaces=surfaces)
    return Judge(device, stack, surfaces, Hardware(kernels, fabric), Hardware(in_step, fabric))


def compare_measurements(measurements: Measurements, judged_by: Judge, *, source: str = "") -> Comparison:
    """Predict every case of a file.

    Parameters
    ----------
    measurements : Measurements
        What was timed.
    judged_by : Judge
        The profile.
    source : str, optional
        The file, for error messages.

    Returns
    -------
    Comparison
        Cases with predictions, and those that the model has no price for.

    Raises
    ------
    FormatError
        If shapes lack sizes, or nothing can be compared.
    """
    compared: list[ComparedCase] = []
    unmapped: list[tuple[MeasuredCase, str]] = []
    held: list[MemoryCase] = []
    problems: list[Problem] = []
    mapped: list[tuple[MeasuredCase, MappedCase]] = []
    for case in measurements.cases:
        try:
            mapped.append((case, map_case(case, judged_by.stack)))
        except UnmappableCaseError as error:
            remedy = "remove the record, and measure the case again"
            problems.append(Problem("E-FMT-014", str(error), remedy, source or None, case.line, "shape"))
    if problems:
        raise FormatError(problems[:20])
    for (case, mapping), time_s in zip(mapped, operation_times_s([one for _, one in mapped], judged_by), strict=True):
        if mapping.reason:
            unmapped.append((case, mapping.reason))
        elif mapping.scenario is not None:
            one, memory_case = step_comparison(case, mapping, judged_by.device, judged_by.surfaces)
            compared.append(one)
            held += [memory_case] if memory_case is not None else []
        elif mapping.host_constant:
            compared.append(_host_case(case, mapping.host_constant, judged_by))
        else:
            compared.append(ComparedCase(case, float(time_s.sum()), _half_width(mapping, time_s, judged_by)))
    if not compared:
        message = "the model has a price for none of the cases"
        remedy = "compare single-device suites; collectives and links are fitted by moesim calibrate"
        raise FormatError([Problem("E-FMT-014", message, remedy, source or None)])
    names = (judged_by.device.id, judged_by.stack.id)
    return Comparison(
        *names, measurements.device_names, tuple(compared), tuple(unmapped), measurements.skipped, tuple(held)
    )


def operation_times_s(mapped: Sequence[MappedCase], judged_by: Judge) -> list[FloatArray]:
    """Seconds of each operation of each case, of shape (n_operations,); kernels of like rates priced together.

    A case that names its attention library is priced with that, whatever the stack has.
    """
    times = [np.zeros(len(one.operations)) for one in mapped]
    for index, one in enumerate(mapped):
        if one.updated_bytes:
            times[index] = update_time_s(np.array([one.updated_bytes]), judged_by.alone.device)
    for is_in_step, library in dict.fromkeys((one.is_in_step, one.attention_library) for one in mapped):
        hardware = judged_by.in_step if is_in_step else judged_by.alone
        if library:
            hardware = replace(hardware, device=replace(hardware.device, attention_library=library))
        places = [
            (case, index)
            for case, one in enumerate(mapped)
            if (one.is_in_step, one.attention_library) == (is_in_step, library)
            for index in range(len(one.operations))
        ]
        seconds = operation_seconds([mapped[case].operations[index] for case, index in places], hardware)
        for (case, index), time_s in zip(places, seconds.tolist(), strict=True):
            times[case][index] = time_s
    return times


def _host_case(case: MeasuredCase, name: str, judged_by: Judge) -> ComparedCase:
    """A constant against what was measured of it: of the stack's host side, or of the device."""
    launch, memory = judged_by.stack.launch, judged_by.device.kernels.memory_bound
    figures = {
        "kernel_launch_time": launch.kernel_launch_time,
        "host_synchronisation_time": launch.host_synchronisation_time,
        "traffic_fixed_s": memory.fixed_time,
        "host_link_bandwidth": judged_by.device.host_link_bandwidth,
    }
    figure = figures[name]
    value = case.num_bytes / figure.value if name == "host_link_bandwidth" else figure.value
    return ComparedCase(case, value, NORMAL_QUANTILE * figure_error(figure))


NARROW_ERROR = 0.15
"""Standard deviation of 8-bit products of a device that has no fraction of its own: they reach 0.76 to 1 times what
16-bit ones make one expect (best ones known of H100, H200, B200 and GB200)."""


def _half_width(mapping: MappedCase, time_s: FloatArray, judged_by: Judge) -> float:
    """Half width of the 90 % interval: errors of one class of kernels add up, those of different classes do not.

    A single GEMM or attention call has the width that its surface shows at its time, twice that in a pass on which
    the surface was not fitted; sums of kernels have the surfaces' overall errors, in a step with those of the clock.
    """
    if len(mapping.operations) == 1:
        width = _surface_width(mapping.operations[0], float(time_s[0]), judged_by, mapping.attention_library)
        if width > 0:
            return math.hypot(width, _narrow_width(mapping.operations[0], judged_by))
    classes = _class_errors(judged_by, is_in_step=mapping.is_in_step)
    if mapping.updated_bytes:
        return NORMAL_QUANTILE * classes["update"]
    parts: dict[str, float] = {}
    for operation, seconds in zip(mapping.operations, time_s.tolist(), strict=True):
        name = _kernel_class(operation)
        parts[name] = parts.get(name, 0.0) + seconds
    deviation_s = math.hypot(*(classes[name] * seconds for name, seconds in parts.items()))
    narrow = max(_narrow_width(operation, judged_by) for operation in mapping.operations)
    return math.hypot(NORMAL_QUANTILE * deviation_s / float(time_s.sum()), narrow)


def _narrow_width(operation: Operation, judged_by: Judge) -> float:
    """What 8-bit products add to a half width: errors of the device's numbers and, for experts, of the stack's."""
    work, numbers = operation.work, judged_by.device.kernels.gemm
    if not isinstance(work, Gemm) or work.input_bytes >= PRECISION_BYTES["bf16"]:
        return 0.0
    fraction = numbers.eight_bit_fraction
    errors = [figure_error(fraction) if fraction is not None else NARROW_ERROR]
    slowdown = {"row": numbers.row_scale_slowdown, "block": numbers.block_scale_slowdown}.get(work.scaling)
    if slowdown is not None:
        errors.append(figure_error(slowdown))
    if work.is_ragged and judged_by.stack.quantised_expert_slowdown is not None:
        errors.append(figure_error(judged_by.stack.quantised_expert_slowdown))
    return NORMAL_QUANTILE * math.hypot(*errors)


def _kernel_class(operation: Operation) -> str:
    match operation.work:
        case Gemm(is_ragged=is_ragged):
            return "moe" if is_ragged else "gemm"
        case AttentionCore():
            return "attention"
        case _:
            return "memory"


def _class_errors(judged_by: Judge, *, is_in_step: bool) -> dict[str, float]:
    """Relative standard deviations of GEMMs, grouped GEMMs, attention and memory traffic."""
    device = judged_by.device
    constant = figure_error(device.kernels.gemm.compute_fraction)
    errors: dict[str, float] = {"gemm": constant, "moe": constant, "attention": constant}
    errors |= {operator: record.error_fraction for operator, record in judged_by.surfaces.records}
    if is_in_step:
        clock = figure_error(device.sustained_clock_fraction)
        stack = figure_error(judged_by.stack.gemm_compute_fraction)
        errors = {name: math.hypot(error, clock, stack) for name, error in errors.items()}
    memory, elementwise = device.kernels.memory_bound, judged_by.stack.elementwise
    errors["memory"] = math.hypot(
        figure_error(memory.memory_fraction), MEASURED_PASSES_ERROR if elementwise is not None else 0.0
    )
    errors["update"] = figure_error(memory.update_fraction or memory.memory_fraction)
    return errors


def _surface_width(operation: Operation, time_s: float, judged_by: Judge, library: str) -> float:
    """Half width that a surface, or a kernel of an attention library, states at a time; 0 where none does."""
    surfaces, work = judged_by.surfaces, operation.work
    factor = 1.0 if operation.phase == "forward" else EXTRAPOLATION_FACTOR
    if isinstance(work, Gemm) and not work.is_ragged and surfaces.gemm is not None:
        columns, inner = work.columns[0], work.inner[0]
        is_aligned = columns % ALIGNMENT == 0 and inner % ALIGNMENT == 0
        inside = surfaces.gemm.is_inside_domain(work.rows[0], columns, inner)
        if not inside:
            factor = EXTRAPOLATION_FACTOR
        return factor * float(surfaces.gemm.half_width(time_s, is_aligned))
    if isinstance(work, AttentionCore):
        kernel = surfaces.attention_kernels.get((library, "backward" if work.is_backward else "forward"))
        if kernel is not None:
            return float(attention_half_widths(kernel, np.array(time_s)))
    if isinstance(work, AttentionCore) and surfaces.attention is not None:
        return factor * float(attention_half_widths(surfaces.attention, np.array(time_s)))
    return 0.0
