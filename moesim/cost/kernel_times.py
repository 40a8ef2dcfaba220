"""Seconds of GEMMs and attention cores: through a device's fitted surfaces, else through four-constant forms.

A surface is asked at the device's own figures and the precision's peak; its latencies stay. A stack's slow-down of
GEMMs in a step scales the fraction of that peak, so what a GEMM waits for (launch, main-loop latency, memory) does not
grow with it, and kernels stay the ones measured (the residual grid).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.cost.attention_surface import AttentionShapes, AttentionTimeSurface, attention_time_s
from moesim.cost.efficiency_surfaces import ROW_GRANULARITY, DeviceRates, combined_time_s
from moesim.cost.gemm_surface import ELEMENT_BYTES, GemmMachine, GemmSurface
from moesim.cost.moe_surface import MoeMachine, MoeParameters, MoeTimeSurface, grouped_gemm_time_s
from moesim.cost.surface_transfer import attention_surface_at
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import AttentionCore, Gemm

CAUSAL_SHARE = 0.5
"""Visible share of query-key pairs under a causal mask, which the attention surface has; without a mask, twice."""


def gemm_bytes(work: Gemm) -> FloatArray:
    """Bytes a (grouped) GEMM reads and writes once; an accumulating output is read as well."""
    output_bytes = work.output_bytes * (2.0 if work.accumulates else 1.0)
    operands = (work.rows + work.columns) * work.inner * work.input_bytes
    return np.asarray(work.groups * (operands + work.rows * work.columns * output_bytes))


def gemm_times_s(works: Sequence[Gemm], rates: DeviceRates) -> list[FloatArray]:
    """Times of GEMMs, of batches of equal ones, or of the experts' grouped ones.

    Parameters
    ----------
    works : sequence of Gemm
        Extents, arrays (n_cases,).
    rates : DeviceRates
        The device and its surfaces.

    Returns
    -------
    list of ndarray of shape (n_cases,)
        Seconds; no work takes none. Never below FLOPs over peak.

    Notes
    -----
    Ragged groups (experts): the grouped formula of the MoE surface, see
    :func:`~moesim.cost.moe_surface.grouped_gemm_time_s`, after one launch of the GEMM surface. Anything else: the GEMM
    surface at (rows, columns, inner), which is its (m, n, k); equal groups of a batched kernel fill its waves together.
    What an output moves that is wider than one 16-bit write (fp32, or read and added to) at its rate joins the kernel's
    time in a norm of :data:`WIDE_OUTPUT_EXPONENT`: an epilogue overlaps with main loops of other tiles.
    Without a surface, :func:`four_constant_gemm_s`. Scales of rows or blocks slow all of it, :func:`scale_slowdown`.
    """
    times: list[FloatArray] = [np.zeros(0)] * len(works)
    members: dict[tuple[bool, str, float], list[int]] = {}
    for index, work in enumerate(works):
        is_ragged = work.is_ragged and rates.surfaces.moe is not None
        if not is_ragged and rates.surfaces.gemm is None:
            times[index] = four_constant_gemm_s(work, rates)
        else:
            members.setdefault((is_ragged, work.precision, work.input_bytes), []).append(index)
    for indices in members.values():
        alike = [works[index] for index in indices]
        for index, kernel_s in zip(indices, _kernel_times_s(alike, rates), strict=True):
            times[index] = _with_output_s(works[index], kernel_s, rates)
    slowdowns = [scale_slowdown(work, rates) for work in works]
    return [time_s if factor == 1.0 else time_s * factor for time_s, factor in zip(times, slowdowns, strict=True)]


def scale_slowdown(work: Gemm, rates: DeviceRates) -> float:
    """Time of a product with scales finer than a tensor's over that with one per tensor."""
    return {"row": rates.row_scale_slowdown, "block": rates.block_scale_slowdown}.get(work.scaling, 1.0)


Sizes = tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]


def _kernel_times_s(works: Sequence[Gemm], rates: DeviceRates) -> list[FloatArray]:
    """Times with 16-bit outputs of GEMMs of one kind and precision, each distinct shape priced once."""
    extents = [
        np.broadcast_arrays(work.rows, work.columns, work.inner, work.groups, work.row_dispersion) for work in works
    ]
    sizes = np.concatenate([np.stack(np.atleast_1d(*part)) for part in extents], axis=1)
    varying = sizes[(sizes != sizes[:, :1]).any(axis=1)]
    order = np.lexsort(varying) if len(varying) else np.arange(sizes.shape[1])
    at_order = sizes[:, order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (at_order[:, 1:] != at_order[:, :-1]).any(axis=0)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(is_new) - 1
    rows, columns, inner, groups, dispersion = at_order[:, is_new]
    time_s = _kernel_time_s(works[0], rates, (rows, columns, inner, groups, dispersion))[number]
    return np.split(time_s, np.cumsum([part[0].size for part in extents])[:-1])


def _kernel_time_s(kind: Gemm, rates: DeviceRates, sizes: Sizes) -> FloatArray:
    """Times at some rows, columns, inner lengths, groups and dispersions, otherwise as ``kind``."""
    rows, columns, inner, groups, dispersion = sizes
    moe, gemm = rates.surfaces.moe, rates.surfaces.gemm
    if kind.is_ragged and moe is not None:
        parameters = moe_parameters_in_step(moe, rates, kind.input_bytes)
        machine = moe_machine(rates, moe, kind.precision)
        grouped_s = grouped_gemm_time_s(
            parameters,
            machine,
            (rows, columns, inner),
            groups=groups,
            operand_bytes=kind.input_bytes,
            row_dispersion=dispersion,
        )
        return rates.gemm_launch_s + grouped_s
    assert gemm is not None
    figures, surface = gemm_machine(rates, gemm, kind.precision), gemm_surface_in_step(gemm, rates, kind.input_bytes)
    return surface.time_s(rows, columns, inner, figures, groups=groups, operand_bytes=kind.input_bytes)


def _with_output_s(work: Gemm, kernel_s: FloatArray, rates: DeviceRates) -> FloatArray:
    """Join the traffic of an output wider than surfaces were fitted with; hold the time to the peak."""
    written = work.groups * work.rows * work.columns
    flops = 2.0 * written * work.inner
    time_s, num_bytes = kernel_s, wide_output_bytes(work)
    if num_bytes:
        output_s = written * num_bytes / output_rate(work, rates)
        time_s = (kernel_s**WIDE_OUTPUT_EXPONENT + output_s**WIDE_OUTPUT_EXPONENT) ** (1.0 / WIDE_OUTPUT_EXPONENT)
    return np.asarray(np.maximum(time_s, flops / rates.peak_for(work.precision)) * (flops > 0))


WIDE_OUTPUT_EXPONENT = 1.4
"""How far wide outputs hide beside products, whose last tiles write alone: of eight from 1.0 to 4.0 the best on weight
gradients of the fit half measured on an H200, where the sum is 12 % too fast with few tokens and 10 % too slow with
many (validation/measurements)."""


def wide_output_bytes(work: Gemm) -> float:
    """Bytes per element that an output moves if those are more than the one 16-bit write of surfaces, else 0."""
    moved = work.output_bytes * (2.0 if work.accumulates else 1.0)
    return moved if moved > ELEMENT_BYTES else 0.0


def output_rate(work: Gemm, rates: DeviceRates) -> float:
    """Bytes per second of those: the memory bandwidth times the fraction of sums, or of the surface that prices it."""
    moe, gemm = rates.surfaces.moe, rates.surfaces.gemm
    if work.accumulates and rates.accumulation_fraction is not None:
        return rates.memory_bandwidth * rates.accumulation_fraction
    if work.is_ragged and moe is not None:
        return rates.memory_bandwidth * moe.parameters.memory_fraction
    assert gemm is not None
    return rates.memory_bandwidth * gemm.core.memory_fraction


def gemm_surface_in_step(surface: GemmSurface, rates: DeviceRates, operand_bytes: float) -> GemmSurface:
    """A GEMM surface with its compute rate in a step; the machine and with it the residual grid stay.

    Operands narrower than the surface's 16 bits fill an iteration of the main loop with more elements, and what
    begins and ends the loop takes as long as before: as many more of them.
    """
    narrow, core = _narrow(operand_bytes), surface.core
    in_step = replace(
        core,
        compute_fraction=core.compute_fraction * _compute_share(rates, operand_bytes),
        prologue_length=core.prologue_length / narrow,
        chunk_latency_s=core.chunk_latency_s * narrow,
    )
    return replace(surface, core=in_step)


def _narrow(operand_bytes: float) -> float:
    """Bytes of an element over those of the surfaces' 16 bits; 1 for wider ones, whose kernels are other ones."""
    return min(operand_bytes / ELEMENT_BYTES, 1.0)


def _compute_share(rates: DeviceRates, operand_bytes: float) -> float:
    """Compute rate in a step over that of a surface at the peak of the precision."""
    return rates.gemm_in_step * (rates.eight_bit_fraction if operand_bytes < ELEMENT_BYTES else 1.0)


def gemm_machine(rates: DeviceRates, surface: GemmSurface, precision: str) -> GemmMachine:
    """Figures a GEMM surface is asked at: the device's, at the peak of a precision; units as the surface counts."""
    return replace(surface.machine, peak_flop_rate=rates.peak_for(precision), memory_bandwidth=rates.memory_bandwidth)


def moe_parameters_in_step(surface: MoeTimeSurface, rates: DeviceRates, operand_bytes: float) -> MoeParameters:
    """Numbers of the grouped GEMM with its compute rate in a step, narrow operands as in a GEMM."""
    numbers = surface.parameters
    return replace(
        numbers,
        compute_fraction=numbers.compute_fraction * _compute_share(rates, operand_bytes),
        chunk_s=numbers.chunk_s * _narrow(operand_bytes),
    )


def moe_machine(rates: DeviceRates, surface: MoeTimeSurface, precision: str) -> MoeMachine:
    """Figures the grouped GEMM is asked at, as :func:`gemm_machine`."""
    return MoeMachine(rates.peak_for(precision), rates.memory_bandwidth, surface.machine.compute_units)


def four_constant_gemm_s(work: Gemm, rates: DeviceRates) -> FloatArray:
    """Time of a (grouped) GEMM on a device without a surface.

    Parameters
    ----------
    work : Gemm
        Extents, arrays (n_cases,).
    rates : DeviceRates
        The device's constants.

    Returns
    -------
    ndarray of shape (n_cases,)
        Seconds; no work takes none.

    Notes
    -----
    t = t0 + ||compute, memory||_p with
    compute = max(2 g r c / (P * fraction), smallest tile) (i + prologue), rows r padded to a matrix instruction in
    groups, memory = (g (r i + i c) input_bytes + g r c output_bytes) / (B * fraction); accumulating outputs are read
    as well. Never below the roofline 2 g r c i / P and bytes / B. Ignores wave quantisation and split-k.
    """
    padded = np.where(work.groups > 1, np.ceil(work.rows / ROW_GRANULARITY - 1e-9) * ROW_GRANULARITY, work.rows)
    per_length_s = 2.0 * work.groups * padded * work.columns / (rates.peak_for(work.precision) * rates.gemm_fraction)
    compute_s = np.maximum(per_length_s, rates.smallest_tile_s) * (work.inner + rates.prologue_length)
    memory_s = gemm_bytes(work) / (rates.memory_bandwidth * rates.gemm_memory_fraction)
    has_work = work.groups * work.rows * work.columns * work.inner > 0
    return (rates.gemm_fixed_s + combined_time_s(compute_s, memory_s)) * has_work


def attention_shapes(work: AttentionCore) -> AttentionShapes:
    """Causal self-attention calls whose time an attention core is given in.

    Latent attention has query-key heads wider than its value heads: the head of equal FLOPs is their mean.
    """
    prefill = work.prefill
    assert prefill is not None
    has_work = work.pairs > 0
    return AttentionShapes(
        batch=np.where(has_work, prefill.sequences, 1.0),
        sequence=np.where(has_work, prefill.length, 1.0),
        heads=work.heads * 1.0,
        kv_heads=prefill.kv_heads * 1.0,
        head_size=np.asarray(prefill.head_size),
    )


def attention_surface_in_step(
    surface: AttentionTimeSurface, rates: DeviceRates, precision: str
) -> AttentionTimeSurface:
    """The surface at the peak of a precision and the clock in a step; grids as for :meth:`GemmSurface.time_s`."""
    figures = GemmMachine(rates.peak_for(precision), rates.memory_bandwidth, surface.compute_units, 1.0)
    fraction = surface.parameters.compute_fraction * rates.clock_in_step
    slowed = replace(surface, parameters=replace(surface.parameters, compute_fraction=fraction))
    return attention_surface_at(slowed, figures)


def attention_kernel(work: AttentionCore, rates: DeviceRates) -> tuple[AttentionTimeSurface | None, float]:
    """Surface that prices a prefill core, and how many of its calls the core takes as long as.

    A kernel of the stack's library, of the pass itself, where the device has one; else the surface of the forward
    pass, at :data:`~moesim.structure.lowering_layers.FLASH_BACKWARD_MATMULS_OVER_FORWARD` calls backward. Without a
    mask there are twice as many pairs.
    """
    prefill = work.prefill
    assert prefill is not None
    unmasked = work.visible_fraction / CAUSAL_SHARE
    key = (rates.attention_library or "", "backward" if work.is_backward else "forward")
    kernel = rates.surfaces.attention_kernels.get(key)
    if kernel is not None:
        return kernel, unmasked
    return rates.surfaces.attention, work.matmul_width / (2.0 * prefill.head_size) * unmasked


def attention_core_s(work: AttentionCore, rates: DeviceRates, kernels: int) -> FloatArray:
    """Time of an attention core.

    Parameters
    ----------
    work : AttentionCore
        Shapes over cases.
    rates : DeviceRates
        The device and its surface.
    kernels : int
        Launches, of the form without a surface.

    Returns
    -------
    ndarray of shape (n_cases,)
        Seconds; no work takes none.

    Notes
    -----
    Prefill and training by a flash kernel: :func:`attention_kernel`; 2.5 forward calls of the surface for a backward
    pass without a kernel of its own, whose products are five to the forward pass's two. Decoding, stored scores, and
    devices without a surface: t0 kernels + ||FLOPs / (P fraction), bytes / (B fraction)||_p.
    """
    has_work = work.pairs * work.heads > 0
    if rates.surfaces.attention is not None and work.prefill is not None:
        surface, calls = attention_kernel(work, rates)
        assert surface is not None
        at_device = attention_surface_in_step(surface, rates, work.precision)
        return attention_time_s(at_device, attention_shapes(work)) * calls * has_work
    flops = 2.0 * work.pairs * work.heads * (work.matmul_width * work.visible_fraction)
    compute_s = flops / (rates.peak_for(work.precision) * rates.attention_fraction)
    memory_s = work.io_elements * work.element_bytes / (rates.memory_bandwidth * rates.traffic_fraction)
    return (rates.gemm_fixed_s * kernels + combined_time_s(compute_s, memory_s)) * has_work
