"""The analytical engine: step times of many scenarios at once, from priced cases by gathering and max-plus.

Quantities are priced over the distinct cases of the columns they read, then gathered to rows; rows with the same stage
plan are treated together. One scenario is a table of one row: there is no other path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from moesim.cost.layer_times import COMMUNICATION_STREAMS
from moesim.cost.operators import Hardware
from moesim.cost.state_costs import StateCosts, hop_time, state_cost_columns, state_costs
from moesim.describe.hardware import Cluster, Device, Stack
from moesim.describe.scenario import Scenario
from moesim.engine.layer_cases import PHASES, LayerCases, PhaseName, layer_case_columns, layer_cases
from moesim.engine.max_plus import pipeline_finish_s
from moesim.structure.columns import Columns, FloatArray, IntArray, distinct_codes
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
from moesim.structure.placement import group_columns

Arrays = TypeVar("Arrays", StateCosts, StateBytes, WorkingBytes)


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
class StageTimes:
    """Times of one micro-batch per chunk and phase, arrays (chunks, n_cases), and the hop between stages (n_cases,)."""

    forward_s: FloatArray
    backward_s: FloatArray
    serial_forward_s: FloatArray
    serial_backward_s: FloatArray
    ideal_s: FloatArray
    host_s: FloatArray
    zero_exposed_s: FloatArray
    zero_hidden_s: FloatArray
    flops: FloatArray
    hop_s: FloatArray
    exposed_hop_s: FloatArray


@dataclass(frozen=True)
class PlanEvaluation:
    """Rows with one stage plan: results per row, and the cases behind them for the breakdown.

    Arrays are (n_rows,) unless said otherwise; ``rows`` are positions in the table; ``stage_memory`` holds (stages,
    n_rows) by category; ``case`` is each row's pass case.
    """

    rows: IntArray
    plan: StagePlan
    step_time_s: FloatArray
    lower_s: FloatArray
    upper_s: FloatArray
    hardware_flops: FloatArray
    ending_stage: IntArray
    finish_s: FloatArray
    data_parallel_exposed_s: FloatArray
    data_parallel_hidden_s: FloatArray
    optimizer_s: FloatArray
    memory: dict[str, FloatArray]
    memory_peak: FloatArray
    peak_stage: IntArray
    layer_case: IntArray
    pass_case: IntArray
    times: StageTimes
    layers: LayerCases


def evaluate(system: System, columns: Columns) -> Iterator[PlanEvaluation]:
    """Evaluate resolved, legal rows, one stage plan after the other."""
    sequence = layer_sequence(system.scenario.model)
    layers = layer_cases(system.scenario, system.stack, sequence, columns, system.hardware, system.load_factor)
    joint, size = columns.joint_code(("stages", "virtual_stages"))
    shapes = distinct_codes(joint, size)
    for index, first in enumerate(shapes.rows):
        rows = np.flatnonzero(shapes.inverse == index)
        stages, virtual = int(columns["stages"][first]), int(columns["virtual_stages"][first])
        given = system.scenario.parallelism.pipeline.layers_per_stage
        plan = stage_plan(sequence, stages, virtual, tuple(given) if given else None)
        part = columns if len(rows) == len(columns) else columns.take(rows)
        yield _evaluate_plan(system, sequence, plan, part, rows, layers)


def _evaluate_plan(
    system: System, sequence: LayerSequence, plan: StagePlan, columns: Columns, rows: IntArray, layers: LayerCases
) -> PlanEvaluation:
    scenario = system.scenario
    parameters = stage_parameters(scenario, sequence, plan)
    state_cases = columns.distinct(state_cost_columns(scenario))
    context = LoweringContext(scenario, system.stack, columns.take(state_cases.rows))
    costs = state_costs(context, parameters, system.hardware, system.device)
    columns = columns.with_derived("zero_in_pass", ("zero_stage",), _zero_in_pass)
    passes = columns.distinct(_pass_columns(scenario))
    times = _stage_times(
        system,
        plan,
        columns.take(passes.rows),
        layers,
        layers.inverse[rows[passes.rows]],
        _at(costs, state_cases.inverse[passes.rows]),
    )
    finish, pipe_lower, pipe_upper = _pipeline(system, plan, columns["num_micro_batches"][passes.rows], times)
    ends = _step_end(system, times, finish, _at(costs, state_cases.inverse), passes.inverse)
    memory, peak, peak_stage = _memory(system, sequence, plan, parameters, columns)
    at_rows = _at(costs, state_cases.inverse)
    lower = np.maximum(pipe_lower[passes.inverse], at_rows.ideal_communication_s.max(axis=0))
    upper = pipe_upper[passes.inverse] + (at_rows.reduction_s + at_rows.update_gather_s + at_rows.optimizer_s).max(
        axis=0
    )
    flops = times.flops.sum(axis=0)[passes.inverse] * columns["num_micro_batches"]
    return PlanEvaluation(
        rows=rows,
        plan=plan,
        step_time_s=ends.step_time_s,
        lower_s=lower + at_rows.ideal_optimizer_s.max(axis=0) * ends.is_training,
        upper_s=np.maximum(upper, ends.step_time_s),
        hardware_flops=flops * columns["devices"] / columns["stages"],
        ending_stage=ends.stage,
        finish_s=finish[:, passes.inverse],
        data_parallel_exposed_s=ends.exposed_s,
        data_parallel_hidden_s=ends.hidden_s,
        optimizer_s=ends.optimizer_s,
        memory=memory,
        memory_peak=peak,
        peak_stage=peak_stage,
        layer_case=layers.inverse[rows],
        pass_case=passes.inverse,
        times=times,
        layers=layers,
    )


def _zero_in_pass(columns: Columns) -> FloatArray:
    """ZeRO stage as far as a micro-batch notices it: 0 and 1 are alike."""
    return np.where(columns["zero_stage"] < 2, 0.0, columns["zero_stage"])


def _pass_columns(scenario: Scenario) -> tuple[str, ...]:
    """Columns that decide the pipeline's time: layers, degrees that place its hops, micro-batches, ZeRO passes."""
    order = scenario.parallelism.rank_order
    names = (*layer_case_columns(scenario), "num_micro_batches", "zero_in_pass", *group_columns(order, "pipeline"))
    return tuple(dict.fromkeys((*names, "expert", "expert_tensor", "expert_data")))


def _at(arrays: Arrays, cases: IntArray) -> Arrays:
    """Gather every array of a record along its last axis."""
    return type(arrays)(*(getattr(arrays, field.name)[..., cases] for field in fields(arrays)))


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
    plan: StagePlan,
    columns: Columns,
    layers: LayerCases,
    layer_case: IntArray,
    costs: StateCosts,
) -> StageTimes:
    """Times of a micro-batch on every chunk: device or host, whichever is slower, ZeRO passes, hops."""
    launch, eta = system.stack.launch, system.stack.overlap
    moe_layers = sum(plan.counts[index] for index, block in enumerate(layers.layers) if block.is_moe) + np.zeros(
        plan.counts.shape[1]
    )
    sync_s = launch.host_synchronisations_per_moe_layer * launch.host_synchronisation_time.value
    host_rate = 0.0 if launch.uses_cuda_graphs else launch.kernel_launch_time.value
    by_phase: dict[str, FloatArray] = {}
    host_total = zero_exposed = zero_hidden = np.zeros((plan.counts.shape[1], len(layer_case)))
    for phase in PHASES:
        device_s = _chunk_sum(layers, plan, phase, "device_s", layer_case)
        serial_s = _chunk_sum(layers, plan, phase, "serial_s", layer_case)
        host_s = _chunk_sum(layers, plan, phase, "kernels", layer_case) * host_rate
        synchronised_s = (moe_layers * sync_s)[:, None] if phase == "forward" else 0.0
        waiting_s = np.maximum(host_s - device_s, 0.0) + synchronised_s
        moved_s = _per_chunk(costs.pass_gather_s + (costs.pass_scatter_s if phase == "backward" else 0.0), plan)
        hidden_s = np.minimum(moved_s * eta.data_parallel, device_s)
        by_phase[phase] = device_s + waiting_s + moved_s - hidden_s
        by_phase[f"serial_{phase}"] = serial_s + waiting_s + moved_s
        host_total = host_total + waiting_s
        zero_exposed, zero_hidden = zero_exposed + moved_s - hidden_s, zero_hidden + hidden_s
    hops = _hops(system, columns)
    ideal = sum(_chunk_sum(layers, plan, phase, "ideal_s", layer_case) for phase in PHASES)
    flops = sum(_chunk_sum(layers, plan, phase, "flops", layer_case) for phase in PHASES)
    return StageTimes(
        forward_s=by_phase["forward"],
        backward_s=by_phase["backward"],
        serial_forward_s=by_phase["serial_forward"],
        serial_backward_s=by_phase["serial_backward"],
        ideal_s=np.asarray(ideal),
        host_s=host_total,
        zero_exposed_s=zero_exposed,
        zero_hidden_s=zero_hidden,
        flops=np.asarray(flops),
        hop_s=hops,
        exposed_hop_s=hops * (1.0 - eta.pipeline_p2p),
    )


def _per_chunk(per_stage: FloatArray, plan: StagePlan) -> FloatArray:
    """Spread a stage's seconds evenly over its chunks."""
    return np.tile(per_stage / plan.virtual_stages, (plan.virtual_stages, 1))


def _hops(system: System, columns: Columns) -> FloatArray:
    order = system.scenario.parallelism.rank_order
    cases = columns.distinct(tuple(dict.fromkeys((*token_columns(system.scenario), *group_columns(order, "pipeline")))))
    at_cases = columns.take(cases.rows)
    context = LoweringContext(system.scenario, system.stack, at_cases)
    return hop_time(at_cases, context, system.hardware).modelled_s[cases.inverse]


def _pipeline(
    system: System, plan: StagePlan, micro_batches: FloatArray, times: StageTimes
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Finish of every stage (stages, n_cases), and lower and upper bounds of the pipeline's time (n_cases,).

    Lower: a stage's own work at peak rates, after the first micro-batch passed the stages before it and before the last
    returns. Upper: m + p - 1 rounds of the slowest chunks with their hops, nothing overlapped.
    """
    schedule = system.scenario.parallelism.pipeline.schedule
    counts = np.rint(micro_batches).astype(np.int64)
    virtual = plan.virtual_stages
    finish = pipeline_finish_s(schedule, virtual, counts, times.forward_s, times.backward_s, times.exposed_hop_s)
    ideal = times.ideal_s.reshape(virtual, plan.stages, -1).sum(axis=0)
    before = np.cumsum(times.ideal_s[: plan.stages], axis=0) - times.ideal_s[: plan.stages]
    lower = (ideal * micro_batches + (before if virtual == 1 else 0.0)).max(axis=0)
    rounds = micro_batches + plan.stages - 1
    slowest = times.serial_forward_s.max(axis=0) + times.serial_backward_s.max(axis=0)
    hop = 2.0 * times.hop_s * (plan.stages > 1)
    return finish, lower, rounds * virtual * (slowest + hop)


@dataclass(frozen=True)
class _StepEnd:
    """How a step ends, arrays (n_rows,), on the stage that ends last."""

    step_time_s: FloatArray
    stage: IntArray
    exposed_s: FloatArray
    hidden_s: FloatArray
    optimizer_s: FloatArray
    is_training: float


def _step_end(
    system: System, times: StageTimes, finish: FloatArray, costs: StateCosts, pass_case: IntArray
) -> _StepEnd:
    """Gradient reduction, update and gather after each stage's last backward; the last stage to finish ends the step.

    The reduction hides only under the last micro-batch's backward, the gather of updated parameters under the next
    step's first forward.
    """
    n_rows = len(pass_case)
    if system.scenario.workload.kind != "training":
        stage = finish.argmax(axis=0)[pass_case]
        none = np.zeros(n_rows)
        return _StepEnd(finish.max(axis=0)[pass_case], stage, none, none, none, 0.0)
    eta = system.stack.overlap.data_parallel
    stages = len(finish)
    backward = times.backward_s.reshape(-1, stages, times.backward_s.shape[1]).sum(axis=0)
    forward = times.forward_s.reshape(-1, stages, times.forward_s.shape[1]).sum(axis=0)
    hidden = np.minimum(costs.reduction_s * eta, backward[:, pass_case])
    hidden = hidden + np.minimum(costs.update_gather_s * eta, forward[:, pass_case])
    exposed = costs.reduction_s + costs.update_gather_s - hidden
    end = finish[:, pass_case] + exposed + costs.optimizer_s
    stage = end.argmax(axis=0)
    pick = (stage, np.arange(n_rows))
    return _StepEnd(end[pick], stage, exposed[pick], hidden[pick], costs.optimizer_s[pick], 1.0)


def _memory(
    system: System, sequence: LayerSequence, plan: StagePlan, parameters: StageParameters, columns: Columns
) -> tuple[dict[str, FloatArray], FloatArray, IntArray]:
    """Bytes by category at the fullest stage, the peak and that stage, arrays (n_rows,)."""
    scenario, memory = system.scenario, system.stack.memory
    state_cases = columns.distinct(state_cost_columns(scenario))
    state_context = LoweringContext(scenario, system.stack, columns.take(state_cases.rows))
    states = state_bytes(state_context, parameters)
    work_cases = columns.distinct(memory_columns(scenario))
    work_context = LoweringContext(scenario, system.stack, columns.take(work_cases.rows))
    work = working_bytes(work_context, sequence, plan, parameters, system.load_factor)
    state_total = states.weights + states.gradients + states.optimizer
    work_total = work.activations + work.buffers
    total = state_total[:, state_cases.inverse] + work_total[:, work_cases.inverse]
    stage = total.argmax(axis=0)
    pick_state, pick_work = (stage, state_cases.inverse), (stage, work_cases.inverse)
    parts = {
        "weights": states.weights[pick_state],
        "gradients": states.gradients[pick_state],
        "optimizer": states.optimizer[pick_state],
        "activations": work.activations[pick_work],
        "buffers": work.buffers[pick_work],
    }
    tensors = total[stage, np.arange(len(stage))]
    fixed = memory.context.value + memory.communication_buffers.value
    parts["other"] = fixed + tensors * memory.fragmentation_fraction
    return parts, tensors + parts["other"], stage


def breakdown(evaluation: PlanEvaluation, columns: Columns, row: int) -> dict[str, dict[str, float]]:
    """Exposed and hidden seconds by category for one row of an evaluation; exposed parts sum to the step time.

    Parts are those of the stage that ends the step, times its micro-batches; what its pipeline waits is transfer (one
    round trip through the stages) and bubble.
    """
    plan, layers = evaluation.plan, evaluation.layers
    stage, case = int(evaluation.ending_stage[row]), int(evaluation.layer_case[row])
    pass_case = int(evaluation.pass_case[row])
    micro_batches = float(columns["num_micro_batches"][row])
    exposed: dict[str, float] = {}
    hidden: dict[str, float] = {}
    blocks = [(block, float(plan.stage_counts()[index, stage])) for index, block in enumerate(layers.layers)]
    blocks += [(layers.first, float(stage == 0)), (layers.last, float(stage == plan.stages - 1))]
    for block, count in blocks:
        for phase in PHASES:
            for totals, parts in ((exposed, block.phase(phase).exposed_s), (hidden, block.phase(phase).hidden_s)):
                for key, values in parts.items():
                    seconds = float(np.broadcast_to(values, layers.rows.shape)[case])
                    totals[key] = totals.get(key, 0.0) + micro_batches * count * seconds
    chunks = slice(stage, None, plan.stages)
    times = evaluation.times
    exposed["host"] = micro_batches * float(times.host_s[chunks, pass_case].sum())
    zero = micro_batches * float(times.zero_exposed_s[chunks, pass_case].sum())
    exposed["data_parallel"] = float(evaluation.data_parallel_exposed_s[row]) + zero
    hidden["data_parallel"] = float(evaluation.data_parallel_hidden_s[row]) + micro_batches * float(
        times.zero_hidden_s[chunks, pass_case].sum()
    )
    exposed["optimizer"] = float(evaluation.optimizer_s[row])
    waiting = max(float(evaluation.step_time_s[row]) - sum(exposed.values()), 0.0)
    trips = 2.0 * (plan.stages * plan.virtual_stages - 1)
    transfer = min(trips * float(times.exposed_hop_s[pass_case]), waiting)
    exposed["pipeline_p2p"], exposed["pipeline_bubble"] = transfer, waiting - transfer
    hidden["pipeline_p2p"] = trips * float(times.hop_s[pass_case] - times.exposed_hop_s[pass_case])
    return {"exposed": exposed, "hidden": hidden}


def model_flops(system: System, columns: Columns) -> FloatArray:
    """Model FLOPs of a step over all devices, priced per distinct sequence length; shape (n_rows,)."""
    cases = columns.distinct(("source_length", "target_length", "step_sequences"))
    return model_flops_per_step(system.scenario, columns.take(cases.rows))[cases.inverse]


__all__ = ["COMMUNICATION_STREAMS", "PlanEvaluation", "System", "breakdown", "evaluate", "model_flops"]
