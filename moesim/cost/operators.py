"""Seconds and FLOPs of one operation: GEMMs, attention, memory traffic, collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np

from moesim.cost.collectives import collective_time
from moesim.cost.communication_libraries import FabricRates
from moesim.cost.efficiency_surfaces import DeviceRates, combined_time_s
from moesim.cost.kernel_times import attention_core_s, gemm_bytes, gemm_times_s
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import AttentionCore, Collective, Gemm, MemoryTraffic, Operation, Work


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
    return price_all([operation], hardware)[0]


def price_all(operations: Sequence[Operation], hardware: Hardware) -> list[OperationCost]:
    """Price operations as :func:`price`; GEMMs together, since the phases of layers repeat a few shapes."""
    works = [(operation, work) for operation in operations for work in _works(operation)]
    gemm_times = iter(gemm_times_s([work for _, work in works if isinstance(work, Gemm)], hardware.device))
    costs = iter([_work_cost(work, operation.kernels, hardware, gemm_times) for operation, work in works])
    priced = []
    for operation in operations:
        time_s, ideal_s, flops = next(costs)
        loaded_s = time_s if operation.load_factor is None else next(costs)[0]
        time_s, loaded_s = time_s * operation.slowdown, loaded_s * operation.slowdown
        priced.append(OperationCost(time_s, np.maximum(loaded_s - time_s, 0.0), ideal_s, flops))
    return priced


def _works(operation: Operation) -> list[Work]:
    """Work at mean load and, where there is a load factor, on the most loaded rank."""
    work, load = operation.work, operation.load_factor
    return [work] if load is None else [work, loaded_work(work, load)]


def loaded_work(work: Work, load: FloatArray) -> Work:
    """Work whose routed tokens are ``load`` times as many; attention cores have none."""
    match work:
        case Gemm():
            return loaded_gemm(work, load)
        case MemoryTraffic():
            return replace(work, num_bytes=work.num_bytes * load, compute_s=work.compute_s * load)
        case Collective():
            return replace(work, num_bytes=work.num_bytes * load)
        case AttentionCore():
            return work
        case _:
            assert_never(work)


def loaded_gemm(work: Gemm, load: FloatArray) -> Gemm:
    """A GEMM whose tokens are ``load`` times as many: rows, or the inner length of a weight gradient."""
    if work.sums_tokens:
        return replace(work, inner=work.inner * load)
    return replace(work, rows=work.rows * load)


def _work_cost(
    work: Work, kernels: int, hardware: Hardware, gemm_times: Iterator[FloatArray]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    match work:
        case Gemm():
            return _timed_gemm_cost(work, hardware.device, next(gemm_times))
        case AttentionCore():
            return attention_cost(work, hardware.device, kernels)
        case MemoryTraffic():
            return traffic_cost(work, hardware.device, kernels)
        case Collective():
            times = collective_time(work, hardware.fabric)
            return times.modelled_s, times.ideal_s, times.modelled_s * 0.0
        case _:
            assert_never(work)


def gemm_cost(work: Gemm, rates: DeviceRates) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Time (:func:`~moesim.cost.kernel_times.gemm_times_s`), ideal time and FLOPs of a (grouped) GEMM.

    Ideal is the roofline 2 g r c i / P and bytes / B, but never above the time: operands that a cache keeps need not
    come from memory.
    """
    (time_s,) = gemm_times_s([work], rates)
    return _timed_gemm_cost(work, rates, time_s)


def _timed_gemm_cost(work: Gemm, rates: DeviceRates, time_s: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    flops = 2.0 * work.groups * work.rows * work.columns * work.inner
    memory_s = gemm_bytes(work) / rates.memory_bandwidth * (flops > 0)
    return time_s, np.minimum(np.maximum(flops / rates.peak_for(work.precision), memory_s), time_s), flops


def attention_cost(work: AttentionCore, rates: DeviceRates, kernels: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Time (:func:`~moesim.cost.kernel_times.attention_core_s`), ideal time and FLOPs of an attention core.

    FLOPs = 2 * pairs * heads * width * visible; ideal as for :func:`gemm_cost`.
    """
    time_s = attention_core_s(work, rates, kernels)
    flops = 2.0 * work.pairs * work.heads * (work.matmul_width * work.visible_fraction)
    memory_s = work.io_elements * work.element_bytes / rates.memory_bandwidth
    return time_s, np.minimum(np.maximum(flops / rates.peak_for(work.precision), memory_s), time_s), flops


def traffic_cost(work: MemoryTraffic, rates: DeviceRates, kernels: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Time, ideal time and (zero) FLOPs of element-wise work.

    t0 per kernel + ||bytes / (B fraction), compute||_p + serial.
    """
    ideal_s = work.num_bytes / rates.memory_bandwidth
    moved_s = ideal_s / rates.traffic_fraction
    if np.any(work.compute_s):
        moved_s = combined_time_s(np.broadcast_to(work.compute_s, moved_s.shape), moved_s)
    time_s = (kernels * rates.traffic_fixed_s + moved_s + work.serial_s) * (work.num_bytes > 0)
    return time_s, ideal_s, work.num_bytes * 0.0
