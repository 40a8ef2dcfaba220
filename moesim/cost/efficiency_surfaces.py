"""How much of a device's peak an operator reaches: explicit, monotone forms with few constants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.fitted_surfaces import NO_SURFACES, FittedSurfaces
from moesim.describe.hardware import Device, Stack
from moesim.structure.columns import FloatArray

OVERLAP_EXPONENT = 2.5
"""p-norm in which compute and memory time of one GEMM combine: 2.4-2.8 on Hopper and Blackwell (kernel-table fits)."""

MINIMUM_TILE_CELLS = 32.0 * 64.0
"""Output cells per compute unit below which a smaller GEMM is no faster: the smallest tile that keeps its rate."""

ROW_GRANULARITY = 16.0
"""Rows of one matrix instruction: rows of each expert are padded to it (m16n8k16 and its successors)."""


@dataclass(frozen=True)
class DeviceRates:
    """Rates of one device under one stack, SI; built once per estimate.

    ``peak`` by precision is the datasheet's. ``surfaces`` price GEMMs and attention where there are any, at
    ``clock_in_step`` of the clock they were measured at and at ``gemm_in_step``, which is that times what a stack
    reaches in a step of a GEMM's rate alone; else ``gemm`` and ``attention`` fractions do, which include both.
    ``eight_bit_fraction`` is what products of 8 bits and narrower reach of the surfaces' rate at their own peak;
    ``row_scale_slowdown`` and ``block_scale_slowdown`` how much longer those with finer scales take.
    ``accumulation_fraction`` of the bandwidth serves outputs that are added to, None as any other.
    ``attention_library`` chooses among the surfaces' attention kernels. ``update_fraction`` of the bandwidth serves
    optimizers, None as other traffic.
    """

    peak: dict[str, float]
    gemm_fraction: float
    gemm_memory_fraction: float
    prologue_length: float
    gemm_fixed_s: float
    attention_fraction: float
    memory_bandwidth: float
    traffic_fraction: float
    traffic_fixed_s: float
    compute_units: float
    clock_in_step: float = 1.0
    gemm_in_step: float = 1.0
    eight_bit_fraction: float = 1.0
    row_scale_slowdown: float = 1.0
    block_scale_slowdown: float = 1.0
    accumulation_fraction: float | None = None
    attention_library: str | None = None
    update_fraction: float | None = None
    surfaces: FittedSurfaces = NO_SURFACES

    @property
    def gemm_launch_s(self) -> float:
        """Fixed time of one GEMM kernel."""
        return self.surfaces.gemm.core.launch_s if self.surfaces.gemm else self.gemm_fixed_s

    def peak_for(self, precision: str) -> float:
        """Peak FLOP/s of a precision; one the device lacks runs at its fp32 rate, else at its slowest.

        Where a device has only one of the 16-bit formats, it serves for the other.
        """
        for format_ in (precision, {"bf16": "fp16", "fp16": "bf16"}.get(precision)):
            if format_ in self.peak:
                return self.peak[format_]
        return self.peak.get("fp32", min(self.peak.values()))

    @property
    def smallest_tile_s(self) -> float:
        """Time per unit of main-loop length of one smallest tile on every compute unit.

        It is a latency, alike for all precisions, and is taken at the 16-bit rate.
        """
        peak = self.peak.get("bf16", self.peak.get("fp16", max(self.peak.values())))
        return 2.0 * self.compute_units * MINIMUM_TILE_CELLS / (peak * self.gemm_fraction)


def device_rates(
    device: Device,
    stack: Stack | None = None,
    *,
    surfaces: FittedSurfaces | None = None,
    is_sustained: bool = False,
) -> DeviceRates:
    """Gather a device's figures; a stack scales the GEMM rate, without one the device alone is meant.

    ``is_sustained``: kernels alone, but one after another without a pause, at the clock that heat and power leave.
    """
    clock = device.sustained_clock_fraction.value if stack or is_sustained else 1.0
    gemm, memory = device.kernels.gemm, device.kernels.memory_bound
    in_step = stack.gemm_compute_fraction.value if stack else 1.0
    elementwise = stack.elementwise_fraction.value if stack and stack.elementwise_fraction else 1.0
    return DeviceRates(
        peak={precision: figure.value for precision, figure in device.peak_flop_rate.items()},
        gemm_fraction=min(gemm.compute_fraction.value * clock * in_step, 1.0),
        gemm_memory_fraction=gemm.memory_fraction.value,
        prologue_length=gemm.prologue_length.value,
        gemm_fixed_s=gemm.fixed_time.value,
        attention_fraction=min(device.kernels.attention.compute_fraction.value * clock, 1.0),
        memory_bandwidth=device.memory_bandwidth.value,
        traffic_fraction=memory.memory_fraction.value * elementwise,
        traffic_fixed_s=memory.fixed_time.value,
        compute_units=device.compute_units.value,
        gemm_in_step=in_step * clock,
        clock_in_step=clock,
        eight_bit_fraction=gemm.eight_bit_fraction.value if gemm.eight_bit_fraction else 1.0,
        row_scale_slowdown=gemm.row_scale_slowdown.value if gemm.row_scale_slowdown else 1.0,
        block_scale_slowdown=gemm.block_scale_slowdown.value if gemm.block_scale_slowdown else 1.0,
        accumulation_fraction=gemm.accumulation_fraction.value if gemm.accumulation_fraction else None,
        attention_library=stack.attention_library if stack else None,
        update_fraction=memory.update_fraction.value if memory.update_fraction else None,
        surfaces=surfaces or NO_SURFACES,
    )


def combined_time_s(compute_s: FloatArray, memory_s: FloatArray) -> FloatArray:
    """Compute and memory time of one kernel, partly overlapped: their p-norm, between their maximum and their sum."""
    larger = np.maximum(compute_s, memory_s)
    smaller = np.minimum(compute_s, memory_s)
    ratio = np.divide(smaller, larger, out=np.zeros_like(larger), where=larger > 0)
    return np.asarray(larger * (1.0 + ratio**OVERLAP_EXPONENT) ** (1.0 / OVERLAP_EXPONENT))
