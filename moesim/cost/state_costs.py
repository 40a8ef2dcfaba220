"""Seconds of what happens once per step or per pass on parameters: gradient reduction, ZeRO gathers, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.cost.collectives import collective_time
from moesim.cost.communication_libraries import CollectiveTime
from moesim.cost.efficiency_surfaces import DeviceRates
from moesim.cost.host_times import host_step_time_s, lead_s, replays_step, update_gap_s, wait_s
from moesim.cost.operators import Hardware
from moesim.cost.segment_times import reduction_loss
from moesim.describe.hardware import Device
from moesim.describe.quantities import PRECISION_BYTES
from moesim.describe.scenario import Optimizer, Precisions, Scenario
from moesim.structure.chunk_placement import placement_name
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import StageParameters, local_parameters, unfactored_moments
from moesim.structure.overlap_programs import bucket_count
from moesim.structure.placement import ProcessGroup, gradient_group, group_columns, process_group
from moesim.structure.step_graph import Collective, CollectiveKind

OPTIMIZER_KERNELS = 1

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StateCosts:
    """Seconds per stage, arrays (stages, n_cases); the ``ideal`` ones at nominal bandwidth.

    ``reduction_s`` gradients after the last micro-batch (hides under its backward), ``update_gather_s`` updated
    parameters (hides under the next forward), ``pass_gather_s`` ZeRO-3 parameters per pass and ``pass_scatter_s``
    ZeRO-2/3 gradients per micro-batch, ``optimizer_s`` the update itself and the
    zeros that gradients are added to, ``host_s`` what the host adds to it once per step, ``lead_s`` how far it is ahead
    after it where nothing is read at the end of a step. ``reduction_buckets`` that
    gradients are reduced in one by one, 0 where the stack decides; ``reduction_loss`` what computing loses of its speed
    meanwhile.
    """

    reduction_s: FloatArray
    update_gather_s: FloatArray
    pass_gather_s: FloatArray
    pass_scatter_s: FloatArray
    optimizer_s: FloatArray
    host_s: FloatArray
    lead_s: FloatArray
    ideal_communication_s: FloatArray
    ideal_optimizer_s: FloatArray
    reduction_buckets: FloatArray
    reduction_loss: float


def state_cost_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide these costs, stages apart."""
    order = scenario.parallelism.rank_order
    names: tuple[str, ...] = ("tensor", "context", "data", "expert", "expert_tensor", "expert_data", "zero_stage")
    is_mirrored = placement_name(scenario.parallelism.pipeline.schedule) == "both_ways"
    for dimension in ("data", "context", "expert_data", *(("pipeline",) if is_mirrored else ())):
        names += group_columns(order, dimension)
    return tuple(dict.fromkeys(names))


def state_costs(context: LoweringContext, stages: StageParameters, hardware: Hardware, device: Device) -> StateCosts:
    """Cost of gradients, parameters and optimizer under each case's ZeRO stage.

    Stage 0 reduces (all-reduce); 1 reduces and scatters, then gathers updated parameters; 2 scatters every
    micro-batch; 3 also gathers parameters for every forward and backward pass. Where a pipeline holds the model twice
    (DualPipe), the two stages with the same chunks also exchange their gradients.
    """
    columns, scenario = context.columns, context.scenario
    dense, expert = local_parameters(context, stages)
    zero = np.broadcast_to(columns["zero_stage"], dense.shape)
    held = state_collectives(context, stages)

    def both(kind: CollectiveKind, width: float, pieces: Sequence[FloatArray] | None = None) -> CollectiveTime:
        if pieces is None:
            times = [_time(kind, size * width, group, hardware) for size, group in held]
        else:
            counts = [np.maximum(count, 1.0) for count in pieces]
            times = [
                _time(kind, size * width / count, group, hardware, count)
                for (size, group), count in zip(held, counts, strict=True)
            ]
        return CollectiveTime(times[0].modelled_s + times[1].modelled_s, times[0].ideal_s + times[1].ideal_s)

    reduced = PRECISION_BYTES[scenario.precision.reduction]
    stored = PRECISION_BYTES[scenario.precision.parameters]
    bucket_bytes = scenario.overlap.gradient_bucket
    buckets = [_buckets(bucket_bytes, size * reduced, (zero < 2) & (group.size > 1)) for size, group in held]
    pieces = buckets if bucket_bytes is not None else None
    whole, scattered = both("all_reduce", reduced, pieces), both("reduce_scatter", reduced, pieces)
    gathered = both("all_gather", stored)
    reduction = whole.modelled_s * (zero == 0) + scattered.modelled_s * (zero == 1)
    ideal = whole.ideal_s * (zero == 0) + scattered.ideal_s * (zero == 1) + gathered.ideal_s * (zero == 1)
    if stages.copies > 1:
        mirrored = _mirror_exchange(context, dense, expert, hardware)
        reduction, ideal = reduction + mirrored.modelled_s, ideal + mirrored.ideal_s
    optimizer_s, ideal_optimizer_s = _optimizer(context, dense, expert, hardware, device)
    emptied_s, ideal_emptied_s = _emptied_sums(context, dense, expert, hardware)
    optimizer_s, ideal_optimizer_s = optimizer_s + emptied_s, ideal_optimizer_s + ideal_emptied_s
    host_s = host_step_time_s(
        stages.tensors[:, None] + stages.expert_tensors[:, None] / columns["expert"], context.stack.launch
    )
    launch = context.stack.launch
    gaps_s = update_gap_s(_updated(context, dense, expert), launch)
    ends_alone = "step" not in launch.synchronises and not replays_step(launch)
    return StateCosts(
        reduction_s=reduction,
        update_gather_s=gathered.modelled_s * ((zero == 1) | (zero == 2)),
        pass_gather_s=gathered.modelled_s * (zero == 3),
        pass_scatter_s=scattered.modelled_s * (zero >= 2),
        optimizer_s=optimizer_s,
        host_s=wait_s(host_s, optimizer_s) + gaps_s,
        lead_s=lead_s(host_s, optimizer_s, launch) * ends_alone,
        ideal_communication_s=ideal,
        ideal_optimizer_s=ideal_optimizer_s,
        reduction_buckets=buckets[0] + buckets[1],
        reduction_loss=reduction_loss(hardware, context.stack.communication_kernels),
    )


def _buckets(bucket_bytes: float | None, num_bytes: FloatArray, are_reduced: BoolArray) -> FloatArray:
    """Buckets of gradients where they are reduced once per step, (stages, n_cases); 0 where the stack decides."""
    if bucket_bytes is None:
        return np.zeros(num_bytes.shape)
    return bucket_count(num_bytes, bucket_bytes) * (are_reduced & (num_bytes > 0))


def state_collectives(
    context: LoweringContext, stages: StageParameters
) -> tuple[tuple[FloatArray, ProcessGroup], tuple[FloatArray, ProcessGroup]]:
    """What gradients and parameters are reduced and gathered over: of the experts last.

    Parameters
    ----------
    context : LoweringContext
        Scenario and columns.
    stages : StageParameters
        Parameters of each stage.

    Returns
    -------
    tuple
        For parameters that are no experts' and for experts': elements of one device, (stages, n_cases), and the group.
    """
    dense, expert = local_parameters(context, stages)
    order = context.scenario.parallelism.rank_order
    return (
        (dense, gradient_group(context.columns, order)),
        (expert, process_group(context.columns, order, "expert_data")),
    )


def _time(
    kind: CollectiveKind,
    num_bytes: FloatArray,
    group: ProcessGroup,
    hardware: Hardware,
    count: FloatArray | float = 1.0,
) -> CollectiveTime:
    """``count`` collectives, one after the other, over a (stages, n_cases) block of sizes."""
    shape = num_bytes.shape
    wide = ProcessGroup(
        np.broadcast_to(group.size, shape).ravel().astype(np.float64),
        np.broadcast_to(group.stride, shape).ravel().astype(np.float64),
    )
    times = collective_time(Collective(kind, num_bytes.ravel(), wide), hardware.fabric)
    return CollectiveTime(times.modelled_s.reshape(shape) * count, times.ideal_s.reshape(shape) * count)


def _mirror_exchange(
    context: LoweringContext, dense: FloatArray, expert: FloatArray, hardware: Hardware
) -> CollectiveTime:
    """Exchange of the gradients a device keeps with the stage of the same chunks, at the price of neighbours."""
    columns = context.columns
    is_sharded = columns["zero_stage"] >= 1
    kept = dense / np.where(is_sharded, columns["data"] * columns["context"], 1.0)
    kept = kept + expert / np.where(is_sharded, columns["expert_data"], 1.0)
    reduced = PRECISION_BYTES[context.scenario.precision.reduction]
    return _time("point_to_point", kept * reduced, context.group("pipeline"), hardware)


def _updated(context: LoweringContext, dense: FloatArray, expert: FloatArray) -> FloatArray:
    """Parameters that one device updates."""
    columns = context.columns
    sharded = columns["zero_stage"] >= 1
    local = dense / np.where(sharded, columns["data"] * columns["context"], 1.0)
    return np.asarray(local + expert / np.where(sharded, columns["expert_data"], 1.0))


def _optimizer(
    context: LoweringContext, dense: FloatArray, expert: FloatArray, hardware: Hardware, device: Device
) -> tuple[FloatArray, FloatArray]:
    """Time of the update: read gradient, read and write master copy and moments, write parameters.

    Offloaded, gradients and parameters cross the host link instead (the host's own arithmetic is not modelled).
    """
    scenario = context.scenario
    precision, optimizer = scenario.precision, scenario.optimizer
    local = _updated(context, dense, expert)
    gradient, stored = PRECISION_BYTES[precision.gradients], PRECISION_BYTES[precision.parameters]
    if optimizer.offload == "optimizer":
        seconds = local * max(gradient, stored) / device.host_link_bandwidth.value
        return seconds, seconds
    num_bytes = local * update_bytes(precision, optimizer)
    return update_time_s(num_bytes, hardware.device), num_bytes / hardware.device.memory_bandwidth


def _emptied_sums(
    context: LoweringContext, dense: FloatArray, expert: FloatArray, hardware: Hardware
) -> tuple[FloatArray, FloatArray]:
    """Time in which the sums that weight gradients are added to are set to zero before a step.

    A compiler writes the first micro-batch's gradients instead.
    """
    if context.stack.compiler is not None:
        return dense * 0.0, dense * 0.0
    columns = context.columns
    sharded = columns["zero_stage"] >= 2
    sums = dense / np.where(sharded, columns["data"] * columns["context"], 1.0)
    sums = sums + expert / np.where(sharded, columns["expert_data"], 1.0)
    rates = hardware.device
    ideal_s = sums * PRECISION_BYTES[context.scenario.precision.gradients] / rates.memory_bandwidth
    return rates.traffic_fixed_s + ideal_s / rates.traffic_fraction, ideal_s


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


def hop_message(columns: Columns, context: LoweringContext) -> Collective:
    """One micro-batch's activations between neighbouring stages, sharded over the tensor group."""
    tokens = context.tokens("decoder")
    if context.model.architecture == "encoder_decoder" and context.scenario.workload.kind != "decode":
        tokens = tokens + context.tokens("encoder")
    num_bytes = tokens / columns["tensor"] * (context.model.hidden_size * context.activation_bytes)
    return Collective("point_to_point", num_bytes, context.group("pipeline"))


def hop_time(columns: Columns, context: LoweringContext, hardware: Hardware) -> CollectiveTime:
    """Transfer of :func:`hop_message`."""
    return collective_time(hop_message(columns, context), hardware.fabric)
