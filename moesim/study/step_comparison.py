"""Whole training steps on one device, as the estimate of their scenario has them."""

from __future__ import annotations

import math

from moesim.cost.fitted_surfaces import FittedSurfaces
from moesim.describe.hardware import Cluster, Device
from moesim.estimation.estimate import estimate_loaded, scenario_document
from moesim.estimation.loading import LoadedScenario, build_system
from moesim.structure.group_tables import group_columns_table
from moesim.structure.legality import resolve_columns
from moesim.study.compared_cases import ComparedCase, MemoryCase
from moesim.study.measured_cases import MeasuredCase
from moesim.study.measured_operations import MappedCase


def step_comparison(
    case: MeasuredCase, mapping: MappedCase, device: Device, surfaces: FittedSurfaces
) -> tuple[ComparedCase, MemoryCase | None]:
    """Estimate the scenario of a case.

    Parameters
    ----------
    case : MeasuredCase
        A timed step, maybe with the bytes that it held at most.
    mapping : MappedCase
        Its scenario and stack.
    device : Device
        What it ran on, alone.
    surfaces : FittedSurfaces
        Those of the device.

    Returns
    -------
    compared : ComparedCase
        Step time with half of its interval.
    memory : MemoryCase or None
        Weights, gradients, optimizer and activations at the peak, where they were measured.
    """
    scenario, stack = mapping.scenario, mapping.stack
    assert scenario is not None
    assert stack is not None
    system = build_system(scenario, device, alone(device), stack, surfaces=surfaces)
    columns = resolve_columns(group_columns_table(scenario, {}, 1))
    answer = estimate_loaded(LoadedScenario(scenario, system, columns, scenario_document(scenario)))
    half = math.log(answer.interval_s.high / answer.step_time_s)
    compared = ComparedCase(case, answer.step_time_s, half)
    if case.peak_bytes is None:
        return compared, None
    memory = answer.memory
    tensors = memory.weights + memory.gradients + memory.optimizer + memory.activations
    return compared, MemoryCase(case, float(tensors), case.peak_bytes)


def alone(device: Device) -> Cluster:
    """A cluster of one device."""
    return Cluster.model_validate(
        {
            "schema_version": 1,
            "id": "alone",
            "name": device.name,
            "device": device.id,
            "device_count": 1,
            "devices_per_node": 1,
            "fabric": {
                "kind": "hierarchical",
                "levels": [
                    {
                        "name": "self",
                        "tier": "scale_up",
                        "medium": "none",
                        "size": 1,
                        "bandwidth_per_device": {"value": "1 GB/s", "kind": "assumed", "source": "never used"},
                        "latency": {"value": "1 us", "kind": "assumed", "source": "never used"},
                    }
                ],
            },
        }
    )
