"""Seconds and FLOPs of one operation: GEMMs, attention, memory traffic, collectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np

from moesim.cost.collectives import collective_time
from moesim.cost.communication_libraries import FabricRates
from moesim.cost.efficiency_surfaces import (
    ROW_GRANULARITY,
    DeviceRates,
    combined_time_s,
)
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import AttentionCore, Collective, Gemm, MemoryTraffic, Operation


@dataclass(frozen=True)
class OperationCost:
    """Cost of one operation, arrays (n_cases,).

    ``time_s`` modelled at mean load; ``extra_s`` what the most loaded rank takes longer; ``ideal_s`` at peak rates;
    ``flops`` executed on one device.
    """

    time_s: FloatArray
    extra_s: FloatArray
    ideal_s: FloatArray
    flops: FloatArray


@dataclass(frozen=True)
class Hardware:
    """Rates of device and fabric under a stack."""

    device: DeviceRates
    fabric: FabricRates


def price(operation: Operation, hardware: Hardware) -> OperationCost:
    """Price an operation at mean load and, where it grows with routed load, at that of the most loaded rank."""
    time_s, ideal_s, flops = _work_cost(operation, hardware, None)
    if operation.load_factor is None:
        return OperationCost(time_s, time_s * 0.0, ideal_s, flops)
    loaded_s, _, _ = _work_cost(operation, hardware, operation.load_factor)
    return OperationCost(time_s, np.maximum(loaded_s - time_s, 0.0), ideal_s, flops)


def _work_cost(
    operation: Operation, hardware: Hardware, load: FloatArray | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    match operation.work:
        case Gemm() as work:
            return gemm_cost(work, hardware.device, load)
        case AttentionCore() as work:
            return attention_cost(work, hardware.device, operation.kernels)
        case MemoryTraffic() as work:
            return traffic_cost(work, hardware.device, operation.kernels, load)
        case Collective() as work:
            scaled = work if load is None else replace(work, num_bytes=work.num_bytes * load)
            times = collective_time(scaled, hardware.fabric)
            return times.modelled_s, times.ideal_s, times.modelled_s * 0.0
        case _:
            assert_never(operation.work)


def gemm_cost(
    work: Gemm, rates: DeviceRates, load: FloatArray | None = None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Time, ideal time and FLOPs of a (grouped) GEMM.

    Notes
    -----
    t = t0 + ||compute, memory||_p with
    compute = max(2 g r c / (P * fraction), smallest tile) (i + prologue), rows r padded to a matrix instruction in
    groups, memory = (g (r i + i c) input_bytes + g r c output_bytes) / (B * fraction); accumulating outputs are read
    as well. Never below the roofline 2 g r c i / P and bytes / B. Ignores wave quantisation and split-k.
    No work (a factor 0) takes no time.
    """
    rows = work.rows if load is None else work.rows * load
    flops = 2.0 * work.groups * rows * work.columns * work.inner
    padded = np.where(work.groups > 1, np.ceil(rows / ROW_GRANULARITY - 1e-9) * ROW_GRANULARITY, rows)
    peak = rates.peak_for(work.precision)
    per_length_s = 2.0 * work.groups * padded * work.columns / (peak * rates.gemm_fraction)
    compute_s = np.maximum(per_length_s, rates.smallest_tile_s) * (work.inner + rates.prologue_length)
    output_bytes = work.output_bytes * (2.0 if work.accumulates else 1.0)
    num_bytes = work.groups * (
        (rows + work.columns) * work.inner * work.input_bytes + rows * work.columns * output_bytes
    )
    memory_s = num_bytes / (rates.memory_bandwidth * rates.gemm_memory_fraction)
    time_s = (rates.gemm_fixed_s + combined_time_s(compute_s, memory_s)) * (flops > 0)
    ideal_s = np.maximum(flops / peak, num_bytes / rates.memory_bandwidth * (flops > 0))
    return time_s, ideal_s, flops


def attention_cost(work: AttentionCore, rates: DeviceRates, kernels: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Time, ideal time and FLOPs of an attention core.

    Notes
    -----
    FLOPs = 2 * pairs * heads * width * visible; t = t0 kernels + ||FLOPs / (P fraction), bytes / (B fraction)||_p.
    """
    flops = 2.0 * work.pairs * work.heads * (work.matmul_width * work.visible_fraction)
    peak = rates.peak_for(work.precision)
    num_bytes = work.io_elements * work.element_bytes
    compute_s = flops / (peak * rates.attention_fraction)
    memory_s = num_bytes / (rates.memory_bandwidth * rates.traffic_fraction)
    time_s = (rates.gemm_fixed_s * kernels + combined_time_s(compute_s, memory_s)) * (flops > 0)
    ideal_s = np.maximum(flops / peak, num_bytes / rates.memory_bandwidth)
    return time_s, ideal_s, flops


def traffic_cost(
    work: MemoryTraffic, rates: DeviceRates, kernels: int, load: FloatArray | None = None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Time, ideal time and (zero) FLOPs of element-wise work: t0 per kernel + bytes / (B fraction)."""
    num_bytes = work.num_bytes if load is None else work.num_bytes * load
    ideal_s = num_bytes / rates.memory_bandwidth
    time_s = (kernels * rates.traffic_fixed_s + ideal_s / rates.traffic_fraction) * (num_bytes > 0)
    return time_s, ideal_s, num_bytes * 0.0
