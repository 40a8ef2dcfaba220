"""The analytical engine: step times of many scenarios at once, from priced cases by gathering and max-plus.

Quantities are priced over the distinct cases of the columns they read, then gathered to rows; rows with the same stage
plan are treated together. One scenario is a table of one row: there is no other path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.operators import Hardware
from moesim.cost.state_costs import StateCosts, hop_time, state_cost_columns, state_costs
from moesim.describe.hardware import Cluster, Device, Stack
from moesim.describe.scenario import Scenario
from moesim.engine.host_waits import HostPipeline, HostWaits, PassSeconds, host_waits
from moesim.engine.layer_cases import PHASES, LayerCases, PhaseName, layer_case_columns, layer_cases
from moesim.engine.max_plus import forward_finish_s, pipeline_finish_s
from moesim.engine.overlaps import hidden_reduction_s, prefetched_s
from moesim.structure.chunk_placement import placement_name
from moesim.structure.columns import Columns, Distinct, FloatArray, IntArray, distinct_codes
from moesim.structure.layers import LayerSequence, StagePlan, layer_sequence, stage_plan
from moesim.structure.lowering import LoweringContext, token_columns
from moesim.structure.lowering_moe import LoadFactor
from moesim.structure.memory_footprint import (
    StageParameters,
    StateBytes,
    WorkingBytes,
    memory_columns,
    stage_parameters,
    state_bytes,
    working_bytes,
)
from moesim.structure.model_flops import model_flops_per_step
from moesim.structure.pipeline_schedules import CLASSIC_SCHEDULES
from moesim.structure.placement import group_columns


@dataclass(frozen=True)
class System:
    """Everything rows of one group share: scenario, profiles, rates and the load of the fullest rank."""

    scenario: Scenario
    device: Device
    cluster: Cluster
    stack: Stack
    hardware: Hardware
    load_factor: LoadFactor


@dataclass(frozen=True)
class ChunkTimes:
    """Times of one micro-batch on every chunk without ZeRO's passes, arrays (chunks, n_layer_cases of the plan).

    ``forward_s`` and ``backward_s`` contain what the host makes the device wait, ``waits``; the
    ``serial`` ones overlap nothing; ``ideal_s`` is forward and backward at peak rates; ``weight_gradient_s`` is the
    compute in ``backward_s`` that schedules may run apart; ``flops`` (n_layer_cases,) are those of all stages.
    """

    forward_s: FloatArray
    backward_s: FloatArray
    serial_forward_s: FloatArray
    serial_backward_s: FloatArray
    ideal_s: FloatArray
    waits: HostWaits
    weight_gradient_s: FloatArray
    flops: FloatArray


@dataclass(frozen=True)
class StageTimes:
    """Times of one micro-batch per pass case.

    ``forward_s`` and ``backward_s`` (chunks, n_cases) include ZeRO's passes; ``zero_pass_s`` are these forward and
    backward, ``zero_pass_hidden_s`` what hides of each, and their exposed and hidden parts have the same shape; hops
    between stages are (n_cases,), and so is ``start_s``, what the device waits for the host at the start of a step.
    ``chunk`` are the times behind them, ``chunk_case`` each pass's case there.
    """

    chunk: ChunkTimes
    chunk_case: IntArray
    forward_s: FloatArray
    backward_s: FloatArray
    has_zero_passes: bool
    zero_pass_s: tuple[FloatArray, FloatArray]
    zero_pass_hidden_s: tuple[FloatArray, FloatArray]
    zero_exposed_s: FloatArray
    zero_hidden_s: FloatArray
    hop_s: FloatArray
    exposed_hop_s: FloatArray
    start_s: FloatArray


@dataclass(frozen=True)
class PlanEvaluation:
    """Rows with one stage plan: results per row, and the cases behind them for the breakdown.

    Arrays are (n_rows,) unless said otherwise; ``rows`` are positions in the table; ``stage_memory`` holds (stages,
    n_rows) by category; ``case`` is each row's pass case; ``update_lead_s`` is what each micro-batch waits less
    since the host ran ahead during the update before.
    """

    rows: IntArray
    plan: StagePlan
    step_time_s: FloatArray
    lower_s: FloatArray
    upper_s: FloatArray
    hardware_flops: FloatArray
    critical_stage: IntArray
    finish_s: FloatArray
    costs: StateCosts | None
    data_parallel_overlap: float
    state_case: IntArray
    memory: MemoryBalance
    layer_case: IntArray
    pass_case: IntArray
    times: StageTimes
    layers: LayerCases
    update_lead_s: FloatArray


def evaluate(system: System, columns: Columns) -> Iterator[PlanEvaluation]:
    """Evaluate resolved, legal rows, one stage plan after the other."""
    sequence = layer_sequence(system.scenario.model)
    placement = placement_name(system.scenario.parallelism.pipeline.schedule)
    layers = layer_cases(system.scenario, system.stack, sequence, columns, system.hardware, system.load_factor)
    is_training = system.scenario.workload.kind == "training"
    planned = sequence if is_training else replace(sequence, mtp_layers=0)  # inference predicts one token at a time
    joint, size = columns.joint_code(("stages", "virtual_stages"))
    shapes = distinct_codes(joint, size)
    for index, first in enumerate(shapes.rows):
        rows = np.flatnonzero(shapes.inverse == index)
        stages, virtual = int(columns["stages"][first]), int(columns["virtual_stages"][first])
        given = system.scenario.parallelism.pipeline.layers_per_stage
        plan = stage_plan(planned, stages, virtual, tuple(given) if given else None, placement)
        part = columns if len(rows) == len(columns) else columns.take(rows)
        yield _evaluate_plan(system, sequence, plan, part, rows, layers)


def _evaluate_plan(
    system: System, sequence: LayerSequence, plan: StagePlan, columns: Columns, rows: IntArray, layers: LayerCases
) -> PlanEvaluation:
    scenario = system.scenario
    parameters = stage_parameters(scenario, sequence, plan)
    states = columns.distinct(state_cost_columns(scenario))
    context = LoweringContext(scenario, system.stack, columns.take(states.rows))
    costs = state_costs(context, parameters, system.hardware, system.device)
    columns = columns.with_derived("zero_in_pass", ("zero_stage",), _zero_in_pass)
    passes = columns.distinct(_pass_columns(scenario))
    layer_case = layers.inverse[rows]
    times = _stage_times(
        system,
        sequence,
        plan,
        layers,
        layer_case[passes.rows],
        costs,
        states.inverse[passes.rows],
        _hops(system, columns)[passes.rows],
    )
    finish, pipe_lower, pipe_upper = _pipeline(system, plan, columns["num_micro_batches"][passes.rows], times)
    is_training = scenario.workload.kind == "training"
    lead_s = _update_lead_s(times, costs, states.inverse, passes.inverse, columns["num_micro_batches"])
    step_time_s = _step_end(system, plan, times, finish, costs, states.inverse, passes.inverse)
    if is_training and lead_s.any():
        step_time_s = step_time_s - lead_s * columns["num_micro_batches"]
    memory = _memory(system, sequence, plan, parameters, columns, states)
    after = (costs.reduction_s + costs.update_gather_s + costs.optimizer_s + costs.host_s).max(axis=0)
    flops = times.chunk.flops[times.chunk_case][passes.inverse] * columns["num_micro_batches"]
    return PlanEvaluation(
        rows=rows,
        plan=plan,
        step_time_s=step_time_s,
        lower_s=_lower_bound(pipe_lower, passes.inverse, costs if is_training else None, states.inverse),
        upper_s=np.maximum(pipe_upper[passes.inverse] + is_training * after[states.inverse], step_time_s),
        hardware_flops=flops * columns["devices"] / columns["stages"],
        critical_stage=stage_seconds(times, plan).argmax(axis=0),
        finish_s=finish,
        costs=costs if is_training else None,
        data_parallel_overlap=system.stack.overlap.data_parallel,
        state_case=states.inverse,
        memory=memory,
        layer_case=layer_case,
        pass_case=passes.inverse,
        times=times,
        layers=layers,
        update_lead_s=lead_s,
    )


def _lower_bound(
    pipeline: tuple[FloatArray, FloatArray], pass_case: IntArray, costs: StateCosts | None, state_case: IntArray
) -> FloatArray:
    """Lower bound of the step (n_rows,) from a pipeline's (with the stages around it, own work alone) bounds.

    Updates end with the slowest stage's work and at least the fastest update, and each stage's gradients and parameters
    take their wire time before its own update.
    """
    around, own = pipeline
    if costs is None:
        return np.asarray(around[pass_case])
    update = costs.ideal_optimizer_s
    moved = (costs.ideal_communication_s + update).max(axis=0)[state_case]
    worked = own[pass_case] + update.min(axis=0)[state_case]
    return np.asarray(np.maximum(np.maximum(around[pass_case], worked), moved))


def _zero_in_pass(columns: Columns) -> FloatArray:
    """ZeRO stage as far as a micro-batch notices it: 0 and 1 are alike."""
    return np.where(columns["zero_stage"] < 2, 0.0, columns["zero_stage"])


def _pass_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide the pipeline's time: layers, degrees that place its hops, micro-batches, ZeRO passes."""
    order = scenario.parallelism.rank_order
    names = (*layer_case_columns(scenario), "num_micro_batches", "zero_in_pass", *group_columns(order, "pipeline"))
    return tuple(dict.fromkeys((*names, "expert", "expert_tensor", "expert_data")))


def _chunk_times(
    system: System, sequence: LayerSequence, plan: StagePlan, layers: LayerCases, cases: IntArray
) -> ChunkTimes:
    """Sum blocks over chunks for some layer cases; the device or the host, whichever is slower."""

    def total(phase: PhaseName, attribute: str) -> FloatArray:
        return _chunk_sum(layers, plan, phase, attribute, cases)

    device = {phase: total(phase, "device_s") for phase in PHASES}
    launch = system.stack.launch
    gap_s = np.stack([total(phase, "gap_s") for phase in PHASES]) if launch.kernel_gap else np.zeros((2, 1, 1))
    seconds = PassSeconds(
        host_s=np.stack([total(phase, "host_s") for phase in PHASES]),
        device_s=np.stack([device[phase] for phase in PHASES]),
        gap_s=gap_s,
        waiting_by_block_s=total("forward", "waiting_s") if layers.reads_counts.any() else np.zeros((1, 1)),
    )
    pipeline = HostPipeline(
        launch,
        sequence,
        plan,
        system.scenario.parallelism.pipeline.schedule,
        is_training=system.scenario.workload.kind == "training",
    )
    waits = host_waits(pipeline, layers, cases, seconds)
    waiting = dict(zip(PHASES, waits.waiting_s, strict=True))
    return ChunkTimes(
        forward_s=device["forward"] + waiting["forward"],
        backward_s=device["backward"] + waiting["backward"],
        serial_forward_s=total("forward", "serial_s") + waiting["forward"],
        serial_backward_s=total("backward", "serial_s") + waiting["backward"],
        ideal_s=total("forward", "ideal_s") + total("backward", "ideal_s"),
        waits=waits,
        weight_gradient_s=total("backward", "weight_gradient_s"),
        flops=(total("forward", "flops") + total("backward", "flops")).sum(axis=0),
    )


def _chunk_sum(layers: LayerCases, plan: StagePlan, phase: PhaseName, attribute: str, cases: IntArray) -> FloatArray:
    """Sum a block quantity over the layers of each chunk and the ends of the model: (chunks, n_cases)."""
    total = np.zeros((plan.counts.shape[1], len(cases)))
    shape = layers.rows.shape
    for index, block in enumerate(layers.layers):
        value = np.broadcast_to(getattr(block.phase(phase), attribute), shape)[cases]
        total += plan.counts[index][:, None] * value
    total[0] += np.broadcast_to(getattr(layers.first.phase(phase), attribute), shape)[cases]
    total[-1] += np.broadcast_to(getattr(layers.last.phase(phase), attribute), shape)[cases]
    return total


def _stage_times(
    system: System,
    sequence: LayerSequence,
    plan: StagePlan,
    layers: LayerCases,
    layer_case: IntArray,
    costs: StateCosts,
    state_case: IntArray,
    hop_s: FloatArray,
) -> StageTimes:
    """Times of a micro-batch per pass case: chunks gathered, ZeRO's passes added, hidden as the stack achieves."""
    used = distinct_codes(layer_case, len(layers.rows))
    chunk = _chunk_times(system, sequence, plan, layers, layer_case[used.rows])
    forward_s, backward_s = chunk.forward_s[:, used.inverse], chunk.backward_s[:, used.inverse]
    exposed = hidden = gather = scatter = np.broadcast_to(np.zeros(1), forward_s.shape)
    hidden_forward = hidden_backward = hidden
    has_zero_passes = bool(costs.pass_scatter_s.any() or costs.pass_gather_s.any())
    if has_zero_passes:
        is_training = system.scenario.workload.kind == "training"
        gather = plan.per_chunk(costs.pass_gather_s)[:, state_case]
        reduced = plan.per_chunk(costs.pass_scatter_s)[:, state_case] * is_training
        scatter = gather * is_training + reduced
        hidden_forward = _hidden_of_passes(system, plan, costs, forward_s, gather)
        hidden_backward = _hidden_of_passes(system, plan, costs, backward_s, gather * is_training, reduced)
        forward_s = forward_s + gather - hidden_forward
        backward_s = backward_s + scatter - hidden_backward
        hidden = hidden_forward + hidden_backward
        exposed = gather + scatter - hidden
    return StageTimes(
        chunk=chunk,
        chunk_case=used.inverse,
        forward_s=forward_s,
        backward_s=backward_s,
        has_zero_passes=has_zero_passes,
        zero_pass_s=(gather, scatter),
        zero_pass_hidden_s=(hidden_forward, hidden_backward),
        zero_exposed_s=exposed,
        zero_hidden_s=hidden,
        hop_s=hop_s,
        exposed_hop_s=hop_s * (1.0 - system.stack.overlap.pipeline_p2p),
        start_s=chunk.waits.start_s[used.inverse] if chunk.waits.start_s.any() else np.broadcast_to(0.0, hop_s.shape),
    )


def _hidden_of_passes(
    system: System,
    plan: StagePlan,
    costs: StateCosts,
    pass_s: FloatArray,
    gather_s: FloatArray,
    reduced_s: FloatArray | float = 0.0,
) -> FloatArray:
    """What hides of ZeRO's collectives of a pass: gathered layer by layer beforehand, or as the stack achieves."""
    if not system.scenario.overlap.prefetch:
        return np.minimum((gather_s + reduced_s) * system.stack.overlap.data_parallel, pass_s)
    layers = np.maximum(plan.counts.sum(axis=0), 1.0)[:, None]
    together_s = prefetched_s(pass_s, gather_s, layers, reduced_s, loss=costs.reduction_loss)
    return np.maximum(gather_s + reduced_s - (together_s - pass_s), 0.0)


def _hops(system: System, columns: Columns) -> FloatArray:
    order = system.scenario.parallelism.rank_order
    cases = columns.distinct(tuple(dict.fromkeys((*token_columns(system.scenario), *group_columns(order, "pipeline")))))
    at_cases = columns.take(cases.rows)
    context = LoweringContext(system.scenario, system.stack, at_cases)
    return hop_time(at_cases, context, system.hardware).modelled_s[cases.inverse]


def stage_seconds(times: StageTimes, plan: StagePlan) -> FloatArray:
    """Forward and backward of one micro-batch on each stage: (stages, n_cases)."""
    return plan.stage_sums(times.forward_s + times.backward_s)


def _pipeline(
    system: System, plan: StagePlan, micro_batches: FloatArray, times: StageTimes
) -> tuple[FloatArray, tuple[FloatArray, FloatArray], FloatArray]:
    """Finish of every stage (stages, n_cases), and lower and upper bounds of the pipeline's time (n_cases,).

    Lower: a stage's own work at peak rates, after the first micro-batch passed the stages before it and before the last
    returns; and the own work alone. Upper: m + p - 1 rounds of the slowest chunks with their hops, nothing overlapped;
    schedules with weight gradients apart are run once more so, with a lower bound of the own work alone.
    """
    is_training = system.scenario.workload.kind == "training"
    schedule = system.scenario.parallelism.pipeline.schedule
    counts = np.rint(micro_batches).astype(np.int64)
    virtual = plan.virtual_stages
    chunk, case = times.chunk, times.chunk_case
    weights_s = chunk.weight_gradient_s[:, case]
    if is_training:
        finish = pipeline_finish_s(
            schedule, virtual, counts, times.forward_s, times.backward_s, times.exposed_hop_s, weights_s
        )
    else:
        finish = forward_finish_s(counts, times.forward_s, times.exposed_hop_s)
    is_classic = schedule in CLASSIC_SCHEDULES
    ideal = plan.stage_sums(chunk.ideal_s)
    before = np.cumsum(ideal, axis=0) - ideal if virtual == 1 and is_classic else ideal * 0.0
    own = ideal[:, case] * micro_batches
    lower = ((own + before[:, case]).max(axis=0), own.max(axis=0))
    if not is_classic:
        passes = times.zero_exposed_s + times.zero_hidden_s
        forward_s, backward_s = chunk.serial_forward_s[:, case] + passes, chunk.serial_backward_s[:, case] + passes
        latest = pipeline_finish_s(schedule, virtual, counts, forward_s, backward_s, times.hop_s, weights_s)
        return finish, lower, latest.max(axis=0)
    rounds = micro_batches + plan.stages - 1
    slowest = (chunk.serial_forward_s.max(axis=0) + chunk.serial_backward_s.max(axis=0))[case]
    if times.has_zero_passes:
        slowest = slowest + (times.zero_exposed_s + times.zero_hidden_s).max(axis=0)
    hop = 2.0 * times.hop_s * (plan.stages > 1)
    return finish, lower, rounds * virtual * (slowest + hop)


def _update_lead_s(
    times: StageTimes, costs: StateCosts, state_case: IntArray, pass_case: IntArray, micro_batches: FloatArray
) -> FloatArray:
    """What each micro-batch waits less since the host issued work during the update, (n_rows,).

    A step of one stage then takes max(host, device) of all it has. With several stages, whose waiting would end the
    step is not known beforehand: none of it is taken off.
    """
    if len(times.forward_s) > 1 or not costs.lead_s.any():
        return np.broadcast_to(0.0, pass_case.shape)
    late_s = times.chunk.waits.late_s.sum(axis=0)[0, times.chunk_case[pass_case]]
    return np.asarray(np.minimum(costs.lead_s[0, state_case] / micro_batches, late_s))


def _step_end(
    system: System,
    plan: StagePlan,
    times: StageTimes,
    finish: FloatArray,
    costs: StateCosts,
    state_case: IntArray,
    pass_case: IntArray,
) -> FloatArray:
    """Step times (n_rows,): the last stage to end its schedule, gradient reduction, update and gather."""
    if system.scenario.workload.kind != "training":
        return np.asarray(finish.max(axis=0)[pass_case])
    forward, backward = plan.stage_sums(times.forward_s), plan.stage_sums(times.backward_s)
    end = finish[:, pass_case]
    end += (costs.reduction_s + costs.update_gather_s + costs.optimizer_s + costs.host_s)[:, state_case]
    eta = system.stack.overlap.data_parallel
    at_rows = (costs.reduction_s[:, state_case], backward[:, pass_case])
    if times.start_s.any():
        end += times.start_s[pass_case]
    end -= hidden_reduction_s(*at_rows, eta, costs.reduction_buckets[:, state_case], costs.reduction_loss)
    if costs.update_gather_s.any():
        end -= np.minimum((costs.update_gather_s * eta)[:, state_case], forward[:, pass_case])
    return np.asarray(end.max(axis=0))


@dataclass(frozen=True)
class MemoryBalance:
    """Bytes at the fullest stage of each row: the peak, that stage, and the cases behind the categories."""

    peak: FloatArray
    stage: IntArray
    states: StateBytes
    state_case: IntArray
    work: WorkingBytes
    work_case: IntArray
    fixed: float
    fragmentation_fraction: float

    def parts(self, row: int) -> dict[str, float]:
        """Bytes by category for one row."""
        stage = int(self.stage[row])
        of_state, of_work = (stage, int(self.state_case[row])), (stage, int(self.work_case[row]))
        parts = {
            "weights": float(self.states.weights[of_state]),
            "gradients": float(self.states.gradients[of_state]),
            "optimizer": float(self.states.optimizer[of_state]),
            "activations": float(self.work.activations[of_work]),
            "buffers": float(self.work.buffers[of_work]),
        }
        return {**parts, "other": self.fixed + sum(parts.values()) * self.fragmentation_fraction}

    def stage_bytes(self, row: int) -> FloatArray:
        """Bytes of one row on each stage, (stages,), without what is fixed and fragmentation."""
        of_states, of_work = int(self.state_case[row]), int(self.work_case[row])
        states = (self.states.weights + self.states.gradients + self.states.optimizer)[:, of_states]
        return np.asarray(states + (self.work.activations + self.work.buffers)[:, of_work])


def _memory(
    system: System,
    sequence: LayerSequence,
    plan: StagePlan,
    parameters: StageParameters,
    columns: Columns,
    states: Distinct,
) -> MemoryBalance:
    """Bytes of every row's fullest stage."""
    scenario, memory = system.scenario, system.stack.memory
    held = state_bytes(LoweringContext(scenario, system.stack, columns.take(states.rows)), parameters)
    work_cases = columns.distinct(memory_columns(scenario))
    work_context = LoweringContext(scenario, system.stack, columns.take(work_cases.rows))
    work = working_bytes(work_context, sequence, plan, parameters, system.load_factor)
    total = (held.weights + held.gradients + held.optimizer)[:, states.inverse]
    total += (work.activations + work.buffers)[:, work_cases.inverse]
    fixed = memory.context.value + memory.communication_buffers.value
    return MemoryBalance(
        peak=fixed + total.max(axis=0) * (1.0 + memory.fragmentation_fraction),
        stage=total.argmax(axis=0),
        states=held,
        state_case=states.inverse,
        work=work,
        work_case=work_cases.inverse,
        fixed=fixed,
        fragmentation_fraction=memory.fragmentation_fraction,
    )


def model_flops(system: System, columns: Columns) -> FloatArray:
    """Model FLOPs of a step over all devices, priced per distinct sequence length; shape (n_rows,)."""
    cases = columns.distinct(("source_length", "target_length", "step_sequences"))
    return model_flops_per_step(system.scenario, columns.take(cases.rows))[cases.inverse]
