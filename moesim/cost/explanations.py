"""Formulas in words, with an operation's numbers put in; the substituted text evaluates to the modelled seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.attention_surface import AttentionShapes, AttentionTimeSurface, attention_parts, attention_residual
from moesim.cost.collectives import collective_time
from moesim.cost.efficiency_surfaces import OVERLAP_EXPONENT, ROW_GRANULARITY, DeviceRates
from moesim.cost.gemm_surface import GemmSurface, are_same_figures, core_parts, grid_value
from moesim.cost.kernel_times import (
    WIDE_OUTPUT_EXPONENT,
    attention_kernel,
    attention_shapes,
    attention_surface_in_step,
    gemm_machine,
    gemm_surface_in_step,
    moe_machine,
    moe_parameters_in_step,
    output_rate,
    scale_slowdown,
    wide_output_bytes,
)
from moesim.cost.moe_surface import MoeTimeSurface, grouped_gemm_parts
from moesim.cost.operators import Hardware
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import AttentionCore, Collective, Gemm, MemoryTraffic, Operation

SURFACE_GEMM_FORMULA = (
    "launch + (compute^p + memory^p + latency^p + l2^p)^(1/p) + joining of splits, times residual and misalignment, "
    "plus output traffic beyond one 16-bit write"
)
GROUPED_GEMM_FORMULA = (
    "launch + (compute^p + memory^p + latency^p)^(1/p) + start of waves, plus output traffic beyond one 16-bit write"
)
SURFACE_ATTENTION_FORMULA = (
    "(fixed + (all tiles^p + longest row^p + memory^p)^(1/p) + around the kernel) residual, a causal forward call "
    "(memory at another exponent for kernels measured alone), "
    "times products over forward's and pairs over causal ones"
)
GEMM_FORMULA = (
    "t0 + (compute^p + memory^p)^(1/p); compute = max(2 groups rows columns / (peak fraction), smallest tile) "
    "(inner + prologue), memory = bytes / (bandwidth fraction)"
)
ATTENTION_FORMULA = (
    "t0 kernels + (compute^p + memory^p)^(1/p); compute = 2 pairs heads width visible / (peak fraction), "
    "memory = bytes / (bandwidth fraction)"
)
TRAFFIC_FORMULA = "t0 kernels + bytes / (bandwidth fraction) + serial steps"
CONVERSION_FORMULA = (
    f"t0 kernels + ||conversion, bytes / (bandwidth fraction)||_p + serial steps, p = {OVERLAP_EXPONENT}"
)
COLLECTIVE_FORMULAS = {
    "all_to_all": "L + t + c sqrt(L t), faster protocol; L = base and peer latencies of the levels crossed, "
    "t = max over levels of bytes across it / (fraction bandwidth)",
    "all_reduce": "L + t + c sqrt(L t) of ring, tree or switch, quick or bulk protocol; "
    "ring: 2 (n - 1) rounds, t = 2 (n - 1)/n bytes / (fraction bandwidth)",
    "all_gather": "L + t + c sqrt(L t), quick or bulk protocol; "
    "n - 1 rounds, t = (n - 1)/n bytes / (fraction bandwidth)",
    "reduce_scatter": "L + t + c sqrt(L t), quick or bulk protocol; "
    "n - 1 rounds, t = (n - 1)/n bytes / (fraction bandwidth)",
    "broadcast": "L + t + c sqrt(L t); ceil(log2 e) rounds per level, bytes / (fraction bandwidth) in each",
    "point_to_point": "L + t + c sqrt(L t) of the slowest level crossed",
}


@dataclass(frozen=True)
class Explanation:
    """A formula in words and with numbers; ``substituted`` is arithmetic that gives the seconds."""

    formula: str
    substituted: str


def explain_operation(operation: Operation, hardware: Hardware) -> Explanation:
    """Explain the first case of an operation at mean load."""
    explanation = _explain_work(operation, hardware)
    if operation.slowdown == 1.0:
        return explanation
    return Explanation(
        f"({explanation.formula}) slow-down of the stack's kernels",
        f"({explanation.substituted}) * {operation.slowdown!r}",
    )


def _explain_work(operation: Operation, hardware: Hardware) -> Explanation:
    match operation.work:
        case Gemm() as work:
            explanation, scaling = _gemm(work, hardware), scale_slowdown(work, hardware.device)
            if scaling == 1.0:
                return explanation
            return Explanation(
                f"({explanation.formula}) slow-down of the scales of rows or blocks",
                f"({explanation.substituted}) * {scaling!r}",
            )
        case AttentionCore() as work:
            return _attention(work, hardware, operation.kernels)
        case MemoryTraffic() as work:
            return _traffic(work, hardware, operation.kernels)
        case Collective() as work:
            return _collective(work, hardware)


def _norm(fixed: str, compute: str, memory: str) -> str:
    p = OVERLAP_EXPONENT
    return f"{fixed} + (({compute})**{p} + ({memory})**{p})**(1/{p})"


def _gemm(work: Gemm, hardware: Hardware) -> Explanation:
    surfaces = hardware.device.surfaces
    if work.is_ragged and surfaces.moe is not None:
        return _grouped_gemm(work, hardware.device, surfaces.moe)
    if surfaces.gemm is not None:
        return _surface_gemm(work, hardware.device, surfaces.gemm)
    return _four_constant_gemm(work, hardware.device)


def _first(*values: FloatArray) -> tuple[FloatArray, ...]:
    return tuple(np.asarray(np.ravel(value)[0]) for value in values)


def _surface_gemm(work: Gemm, rates: DeviceRates, surface: GemmSurface) -> Explanation:
    rows, columns, inner, groups = _first(work.rows, work.columns, work.inner, work.groups)
    machine = gemm_machine(rates, surface, work.precision)
    sizes = (np.maximum(rows, 1.0), np.maximum(columns, 1.0), np.maximum(inner, 1.0))
    core = gemm_surface_in_step(surface, rates, work.input_bytes).core
    parts = core_parts(core, machine, sizes, groups=groups, operand_bytes=work.input_bytes)
    terms = (parts.compute_s, parts.memory_s, parts.latency_s, parts.l2_s)
    norm = _power_norm(terms, surface.core.overlap_exponent)
    residual = grid_value(surface.grid, *sizes) if are_same_figures(machine, surface.machine) else 0.0
    factor = float(np.exp(residual) * surface.misalignment(columns, inner))
    kernel = f"({surface.core.launch_s:.15g} + {norm} + {parts.joining_s:.15g}) * {factor:.15g}"
    floor = f"{_flops(work)} / {machine.peak_flop_rate:.15g}"
    words = f"{SURFACE_GEMM_FORMULA} [tile {parts.tile[0]} x {parts.tile[1]}, split {parts.split}]"
    return Explanation(words, _with_output(f"max({kernel}, {floor})", work, rates))


def _grouped_gemm(work: Gemm, rates: DeviceRates, surface: MoeTimeSurface) -> Explanation:
    rows, columns, inner, groups = _first(work.rows, work.columns, work.inner, work.groups)
    numbers = moe_parameters_in_step(surface, rates, work.input_bytes)
    machine = moe_machine(rates, surface, work.precision)
    shape = (rows, columns, inner)
    (dispersion,) = _first(np.asarray(work.row_dispersion))
    parts = grouped_gemm_parts(
        numbers, machine, shape, groups=groups, operand_bytes=work.input_bytes, row_dispersion=dispersion
    )
    norm = _power_norm((parts.compute_s, parts.stream_s, parts.latency_s), numbers.overlap_exponent)
    kernel = f"{rates.gemm_launch_s:.15g} + {norm} + {parts.waves_s:.15g}"
    words = f"{GROUPED_GEMM_FORMULA} [{float(groups):g} groups, tile {parts.tile[0]} x {parts.tile[1]}]"
    return Explanation(words, _with_output(kernel, work, rates))


def _power_norm(terms: tuple[float, ...], power: float) -> str:
    return "(" + " + ".join(f"{term:.15g}**{power:.15g}" for term in terms) + f")**(1/{power:.15g})"


def _flops(work: Gemm) -> str:
    extents = _first(work.groups, work.rows, work.columns, work.inner)
    return "2 * " + " * ".join(f"{float(extent):.15g}" for extent in extents)


def _at_peak(work: Gemm, rates: DeviceRates) -> str:
    return f"{_flops(work)} / {rates.peak_for(work.precision):.15g}"


def _with_output(kernel: str, work: Gemm, rates: DeviceRates) -> str:
    """A kernel's time joined by its wide output's, not below that of the peak."""
    num_bytes, power = wide_output_bytes(work), WIDE_OUTPUT_EXPONENT
    if num_bytes:
        extents = " * ".join(f"{float(extent):.15g}" for extent in _first(work.groups, work.rows, work.columns))
        output = f"{extents} * {num_bytes:g} / {output_rate(work, rates):.15g}"
        kernel = f"(({kernel})**{power} + ({output})**{power})**(1/{power})"
    return f"max({kernel}, {_at_peak(work, rates)})"


def _four_constant_gemm(work: Gemm, rates: DeviceRates) -> Explanation:
    rows, columns, inner, groups = (float(np.ravel(x)[0]) for x in (work.rows, work.columns, work.inner, work.groups))
    padded = float(np.ceil(rows / ROW_GRANULARITY - 1e-9) * ROW_GRANULARITY) if groups > 1 else rows
    peak = f"({rates.peak_for(work.precision):.12g} * {rates.gemm_fraction:.12g})"
    output = work.output_bytes * (2 if work.accumulates else 1)
    num_bytes = (
        f"{groups:.12g} * (({rows:.12g} + {columns:.12g}) * {inner:.12g} * {work.input_bytes:g}"
        f" + {rows:.12g} * {columns:.12g} * {output:g})"
    )
    rate = f"2 * {groups:.12g} * {padded:.12g} * {columns:.12g} / {peak}"
    compute = f"max({rate}, {rates.smallest_tile_s:.12g}) * ({inner:.12g} + {rates.prologue_length:g})"
    memory = f"{num_bytes} / ({rates.memory_bandwidth:.12g} * {rates.gemm_memory_fraction:.12g})"
    return Explanation(GEMM_FORMULA, _norm(f"{rates.gemm_fixed_s:.12g}", compute, memory))


def _surface_attention(
    work: AttentionCore, rates: DeviceRates, surface: AttentionTimeSurface, calls: float
) -> Explanation:
    at_device = attention_surface_in_step(surface, rates, work.precision)
    every = attention_shapes(work)
    shapes = AttentionShapes(*_first(every.batch, every.sequence, every.heads, every.kv_heads, every.head_size))
    numbers = at_device.parameters
    parts = attention_parts(
        numbers,
        shapes,
        peak_flop_per_s=at_device.peak_flop_per_s,
        memory_bytes_per_s=at_device.memory_bytes_per_s,
        compute_units=at_device.compute_units,
    )
    tiles, stream_s = (float(parts.full_s), float(parts.lone_s)), float(parts.stream_s)
    norm = _power_norm((*tiles, stream_s), numbers.overlap_exponent)
    if numbers.stream_exponent:
        power = f"{numbers.stream_exponent:.15g}"
        inner = _power_norm(tiles, numbers.overlap_exponent)
        norm = f"(({inner})**{power} + {stream_s:.15g}**{power})**(1/{power})"
    residual = float(np.exp(attention_residual(at_device, shapes)))
    moved = max(float(shapes.operand_bytes) - numbers.cache_bytes, 0.0)
    kernel = f"({numbers.fixed_s:.15g} + {norm} + {float(parts.around_s):.15g}) * {residual:.15g}"
    at_peak = f"{float(shapes.flops):.15g} / {at_device.peak_flop_per_s:.15g}"
    floors = f"{at_peak}, {moved:.15g} / {at_device.memory_bytes_per_s:.15g}"
    return Explanation(SURFACE_ATTENTION_FORMULA, f"max({kernel}, {floors}) * {calls:.15g}")


def _attention(work: AttentionCore, hardware: Hardware, kernels: int) -> Explanation:
    rates = hardware.device
    if work.prefill is not None:
        surface, calls = attention_kernel(work, rates)
        if surface is not None:
            return _surface_attention(work, rates, surface, calls)
    pairs, heads, elements = (float(np.ravel(x)[0]) for x in (work.pairs, work.heads, work.io_elements))
    flops = f"2 * {pairs:.12g} * {heads:.12g} * {work.matmul_width:.12g} * {work.visible_fraction:g}"
    compute = f"{flops} / ({rates.peak_for(work.precision):.12g} * {rates.attention_fraction:.12g})"
    memory = (
        f"{elements:.12g} * {work.element_bytes:g} / ({rates.memory_bandwidth:.12g} * {rates.traffic_fraction:.12g})"
    )
    return Explanation(ATTENTION_FORMULA, _norm(f"{rates.gemm_fixed_s:.12g} * {kernels}", compute, memory))


def _traffic(work: MemoryTraffic, hardware: Hardware, kernels: int) -> Explanation:
    rates = hardware.device
    num_bytes = float(np.ravel(work.num_bytes)[0])
    wire = f"{num_bytes:.12g} / ({rates.memory_bandwidth:.12g} * {rates.traffic_fraction:.12g})"
    fixed, serial_s = f"{kernels} * {rates.traffic_fixed_s:.12g}", float(np.ravel(work.serial_s)[0])
    serial = f" + {serial_s:.12g}" if serial_s else ""
    if np.any(work.compute_s):
        compute = f"{float(np.ravel(work.compute_s)[0]):.12g}"
        return Explanation(CONVERSION_FORMULA, _norm(fixed, compute, wire) + serial)
    return Explanation(TRAFFIC_FORMULA, f"{fixed} + {wire}{serial}")


def _collective(work: Collective, hardware: Hardware) -> Explanation:
    """Latency is what an empty message takes; the rest is wire time and what chunks cost, as an effective rate."""
    first = Collective(work.kind, work.num_bytes[:1], work.group, work.copies)
    tiny = Collective(work.kind, work.num_bytes[:1] * 0 + 1e-9, work.group, work.copies)
    whole = float(np.ravel(collective_time(first, hardware.fabric).modelled_s)[0])
    latency = float(np.ravel(collective_time(tiny, hardware.fabric).modelled_s)[0])
    num_bytes, size = float(np.ravel(work.num_bytes)[0]), float(np.ravel(work.group.size)[0])
    if whole <= 0:
        return Explanation(COLLECTIVE_FORMULAS[work.kind], "0")
    rate = num_bytes / max(whole - latency, 1e-30)
    words = f"{COLLECTIVE_FORMULAS[work.kind]} [{size:g} ranks, {num_bytes:.6g} bytes]"
    return Explanation(words, f"{latency:.12g} + {num_bytes:.12g} / {rate:.12g}")
