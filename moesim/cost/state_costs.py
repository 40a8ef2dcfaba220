"""Seconds of what happens once per step or per pass on parameters: gradient reduction, ZeRO gathers, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cost.collectives import collective_time
from moesim.cost.communication_libraries import CollectiveTime
from moesim.cost.efficiency_surfaces import DeviceRates
from moesim.cost.host_times import host_step_time_s
from moesim.cost.operators import Hardware
from moesim.describe.hardware import Device
from moesim.describe.quantities import PRECISION_BYTES
from moesim.describe.scenario import Optimizer, Precisions, Scenario
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import StageParameters, local_parameters, unfactored_moments
from moesim.structure.placement import ProcessGroup, gradient_group, group_columns, process_group
from moesim.structure.step_graph import Collective, CollectiveKind

OPTIMIZER_KERNELS = 1


@dataclass(frozen=True)
class StateCosts:
    """Seconds per stage, arrays (stages, n_cases); the ``ideal`` ones at nominal bandwidth.

    ``reduction_s`` gradients after the last micro-batch (hides under its backward), ``update_gather_s`` updated
    parameters (hides under the next forward), ``pass_gather_s`` ZeRO-3 parameters per pass and ``pass_scatter_s``
    ZeRO-2/3 gradients per micro-batch, ``optimizer_s`` the update itself, ``host_s``
    what the host adds to it once per step.
    """

    reduction_s: FloatArray
    update_gather_s: FloatArray
    pass_gather_s: FloatArray
    pass_scatter_s: FloatArray
    optimizer_s: FloatArray
    host_s: FloatArray
    ideal_communication_s: FloatArray
    ideal_optimizer_s: FloatArray


def state_cost_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide these costs, stages apart."""
    order = scenario.parallelism.rank_order
    names: tuple[str, ...] = ("tensor", "context", "data", "expert", "expert_tensor", "expert_data", "zero_stage")
    for dimension in ("data", "context", "expert_data"):
        names += group_columns(order, dimension)
    return tuple(dict.fromkeys(names))


def state_costs(context: LoweringContext, stages: StageParameters, hardware: Hardware, device: Device) -> StateCosts:
    """Cost of gradients, parameters and optimizer under each case's ZeRO stage.

    Stage 0 reduces (all-reduce); 1 reduces and scatters, then gathers updated parameters; 2 scatters every
    micro-batch; 3 also gathers parameters for every forward and backward pass.
    """
    columns, scenario = context.columns, context.scenario
    dense, expert = local_parameters(context, stages)
    zero = np.broadcast_to(columns["zero_stage"], dense.shape)
    order = scenario.parallelism.rank_order
    groups = (gradient_group(columns, order), process_group(columns, order, "expert_data"))
    sizes = (dense, expert)

    def both(kind: CollectiveKind, width: float) -> CollectiveTime:
        times = [_time(kind, size * width, group, hardware) for size, group in zip(sizes, groups, strict=True)]
        return CollectiveTime(times[0].modelled_s + times[1].modelled_s, times[0].ideal_s + times[1].ideal_s)

    reduced = PRECISION_BYTES[scenario.precision.reduction]
    stored = PRECISION_BYTES[scenario.precision.parameters]
    whole, scattered = both("all_reduce", reduced), both("reduce_scatter", reduced)
    gathered = both("all_gather", stored)
    reduction = whole.modelled_s * (zero == 0) + scattered.modelled_s * (zero == 1)
    ideal = whole.ideal_s * (zero == 0) + scattered.ideal_s * (zero == 1) + gathered.ideal_s * (zero == 1)
    optimizer_s, ideal_optimizer_s = _optimizer(context, dense, expert, hardware, device)
    host_s = host_step_time_s(
        stages.tensors[:, None] + stages.expert_tensors[:, None] / columns["expert"], context.stack.launch
    )
    return StateCosts(
        reduction_s=reduction,
        update_gather_s=gathered.modelled_s * ((zero == 1) | (zero == 2)),
        pass_gather_s=gathered.modelled_s * (zero == 3),
        pass_scatter_s=scattered.modelled_s * (zero >= 2),
        optimizer_s=optimizer_s,
        host_s=np.maximum(host_s - optimizer_s, 0.0),
        ideal_communication_s=ideal,
        ideal_optimizer_s=ideal_optimizer_s,
    )


def _time(kind: CollectiveKind, num_bytes: FloatArray, group: ProcessGroup, hardware: Hardware) -> CollectiveTime:
    """Collective over a (stages, n_cases) block of sizes."""
    shape = num_bytes.shape
    wide = ProcessGroup(
        np.broadcast_to(group.size, shape).ravel().astype(np.float64),
        np.broadcast_to(group.stride, shape).ravel().astype(np.float64),
    )
    times = collective_time(Collective(kind, num_bytes.ravel(), wide), hardware.fabric)
    return CollectiveTime(times.modelled_s.reshape(shape), times.ideal_s.reshape(shape))


def _optimizer(
    context: LoweringContext, dense: FloatArray, expert: FloatArray, hardware: Hardware, device: Device
) -> tuple[FloatArray, FloatArray]:
    """Time of the update: read gradient, read and write master copy and moments, write parameters.

    Offloaded, gradients and parameters cross the host link instead (the host's own arithmetic is not modelled).
    """
    columns, scenario = context.columns, context.scenario
    precision, optimizer = scenario.precision, scenario.optimizer
    sharded = columns["zero_stage"] >= 1
    local = dense / np.where(sharded, columns["data"] * columns["context"], 1.0)
    local = local + expert / np.where(sharded, columns["expert_data"], 1.0)
    gradient, stored = PRECISION_BYTES[precision.gradients], PRECISION_BYTES[precision.parameters]
    if optimizer.offload == "optimizer":
        seconds = local * max(gradient, stored) / device.host_link_bandwidth.value
        return seconds, seconds
    num_bytes = local * update_bytes(precision, optimizer)
    return update_time_s(num_bytes, hardware.device), num_bytes / hardware.device.memory_bandwidth


def update_time_s(num_bytes: FloatArray, rates: DeviceRates) -> FloatArray:
    """Time of an update in one kernel: t0 + bytes / (bandwidth fraction)."""
    fraction = rates.update_fraction or rates.traffic_fraction
    return OPTIMIZER_KERNELS * rates.traffic_fixed_s + num_bytes / (rates.memory_bandwidth * fraction)


def update_bytes(precision: Precisions, optimizer: Optimizer) -> float:
    """Bytes that the update of one parameter reads and writes on the device.

    Examples
    --------
    >>> update_bytes(Precisions(compute="bf16", parameters="bf16"), Optimizer(kind="adam"))  # 4 + 2 + 8 + 16
    30.0
    """
    gradient, stored = PRECISION_BYTES[precision.gradients], PRECISION_BYTES[precision.parameters]
    state = 2.0 * unfactored_moments(optimizer) * PRECISION_BYTES[optimizer.state]
    master = 2.0 * PRECISION_BYTES[precision.master]
    extra_reads = gradient if optimizer.kind == "adafactor" else 0.0
    return gradient + extra_reads + stored + master + state


def hop_time(columns: Columns, context: LoweringContext, hardware: Hardware) -> CollectiveTime:
    """Transfer of one micro-batch's activations between neighbouring stages, sharded over the tensor group."""
    tokens = context.tokens("decoder")
    if context.model.architecture == "encoder_decoder" and context.scenario.workload.kind != "decode":
        tokens = tokens + context.tokens("encoder")
    num_bytes = tokens / columns["tensor"] * (context.model.hidden_size * context.activation_bytes)
    return collective_time(Collective("point_to_point", num_bytes, context.group("pipeline")), hardware.fabric)
