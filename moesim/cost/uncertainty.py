"""How far off a step time may be: relative errors of its constants, carried to an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moesim.cost.fitted_surfaces import NORMAL_QUANTILE, FittedSurfaces
from moesim.describe.hardware import Cluster, Device, Stack
from moesim.describe.quantities import Figure

__all__ = ["LEVEL", "NORMAL_QUANTILE", "class_errors", "figure_error", "standard_deviation_s"]

LEVEL = 0.9

DEFAULT_ERROR: dict[str, float] = {
    "datasheet": 0.10,
    "fitted": 0.15,
    "transferred": 0.20,
    "extrapolated": 0.30,
    "assumed": 0.30,
}
"""Relative standard deviation of a figure that states none.

A datasheet peak times a constant misses unseen GEMM shapes by 9-17 % in the median (NVIDIA aiconfigurator tables);
transfer between generations by 8-18 %; the rest is judgement until held-out errors replace it.
"""

MEASURED_PASSES_ERROR = 0.15
"""Standard deviation of single element-wise kernels about the passes that a stack states: medians over sizes, judged on
sizes left out (validation/measurements, norms, activations and moved rows of H200 and H100)."""

GEMM_CATEGORIES = ("attention", "dense_ffn", "router", "dispatch_combine", "expert_gemm", "embedding_head_loss")
COMPUTE_LIKE = (*GEMM_CATEGORIES, "recompute", "imbalance", "pipeline_bubble")
COMMUNICATION = ("all_to_all", "tensor_parallel", "context_parallel", "data_parallel", "pipeline_p2p")


def figure_error(figure: Figure) -> float:
    """One relative standard deviation of a figure."""
    return DEFAULT_ERROR[figure.kind] if figure.error_fraction is None else figure.error_fraction


def kernel_error(device: Device, surfaces: FittedSurfaces) -> float:
    """Relative standard deviation of kernel times: the largest of the surfaces', else of the constants."""
    if surfaces.records:
        return max(record.error_fraction for _, record in surfaces.records)
    gemm = figure_error(device.kernels.gemm.compute_fraction)
    return math.hypot(gemm, figure_error(device.sustained_clock_fraction))


def class_errors(device: Device, cluster: Cluster, stack: Stack, surfaces: FittedSurfaces) -> dict[str, float]:
    """Relative standard deviation of each class of work: compute, memory traffic, communication, host."""
    gemm = math.hypot(kernel_error(device, surfaces), figure_error(stack.gemm_compute_fraction))
    tiers = stack.collectives.values()
    wire = max(max(figure_error(tier.all_to_all_fraction), figure_error(tier.reduce_fraction)) for tier in tiers)
    memory = figure_error(device.kernels.memory_bound.memory_fraction)
    if stack.elementwise_fraction is not None:
        memory = math.hypot(memory, figure_error(stack.elementwise_fraction))
    if stack.elementwise is not None:
        memory = math.hypot(memory, MEASURED_PASSES_ERROR)
    latency = max(figure_error(tier.round_latency) for tier in tiers)
    return {
        "compute": gemm,
        "memory": memory,
        "communication": math.hypot(wire, latency),
        "host": figure_error(stack.launch.kernel_launch_time),
    }


def standard_deviation_s(exposed_s: Mapping[str, float], errors: Mapping[str, float]) -> float:
    """Standard deviation of a step: fully correlated inside a class, independent between classes."""
    members = {
        "compute": COMPUTE_LIKE,
        "memory": ("memory_bound", "optimizer"),
        "communication": COMMUNICATION,
        "host": ("host",),
    }
    parts = [errors[name] * sum(exposed_s.get(key, 0.0) for key in keys) for name, keys in members.items()]
    return math.hypot(*parts)
