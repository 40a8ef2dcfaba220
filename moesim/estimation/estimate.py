"""One estimate: the table of one row, read out in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from moesim.cost.uncertainty import LEVEL, NORMAL_QUANTILE, class_errors, standard_deviation_s
from moesim.describe.documents import Document
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.quantities import PRECISION_BYTES
from moesim.describe.scenario import Scenario
from moesim.engine.analytical import PlanEvaluation, System, evaluate, model_flops, stage_seconds
from moesim.engine.breakdowns import breakdown
from moesim.estimation.advice import find_bottleneck, routing_group_tokens, warnings_of
from moesim.estimation.loading import LoadedScenario, load, load_document, routed_shares
from moesim.estimation.provenance import sourced_figures
from moesim.estimation.step_estimate import (
    CostAnswer,
    Interval,
    MemoryAnswer,
    Parameters,
    PipelineAnswer,
    RoutingAnswer,
    StepEstimate,
)
from moesim.structure.columns import DROPLESS, Columns, FloatArray
from moesim.structure.lowering_moe import slots_per_expert
from moesim.structure.memory_footprint import CATEGORIES
from moesim.structure.parameters import count_parameters
from moesim.structure.token_routing import dropped_fraction

NetworkModel = Literal["closed", "flow"]


def estimate(
    scenario: Scenario | str | Path, *, profiles: Sequence[Path] = (), network: NetworkModel = "closed"
) -> StepEstimate:
    """Estimate one step of a scenario.

    Parameters
    ----------
    scenario : Scenario, str or Path
        A loaded scenario, a scenario file, or the bare name of a shipped one.
    profiles : sequence of Path
        Directories of hardware profiles that go before the shipped ones.
    network : str
        Collectives by ``closed`` form, or with the contention of ``flow`` simulations on the cluster's wires.

    Returns
    -------
    StepEstimate
        A step that does not fit in memory is an answer too: ``fits`` is False.

    Raises
    ------
    ScenarioError, FormatError
        If the scenario is wrong; see ``load_scenario``.
    """
    return estimate_loaded(with_network(load_any(scenario, profiles), network))


def load_any(scenario: Scenario | str | Path, profiles: Sequence[Path] = ()) -> LoadedScenario:
    """Load a scenario given in any of the forms that ``estimate`` takes; raises as it does."""
    library = HardwareLibrary(profiles)
    if isinstance(scenario, Scenario):
        return load_document(scenario_document(scenario), library)
    return load(scenario, library=library)


def with_network(loaded: LoadedScenario, network: NetworkModel) -> LoadedScenario:
    """Return the scenario with collectives priced by closed form, or with contention on the cluster's wires."""
    if network == "closed":
        return loaded
    from moesim.engine.flow_contention import FlowContention

    system = loaded.system
    fabric = system.hardware.fabric
    contention = FlowContention(system.cluster, system.device, fabric, system.scenario.devices)
    hardware = replace(system.hardware, fabric=replace(fabric, contention=contention))
    return replace(loaded, system=replace(system, hardware=hardware))


def scenario_document(scenario: Scenario) -> Document:
    """A scenario as a document without a file, so that it is checked like one."""
    return Document(scenario.name, scenario.model_dump(mode="json"), {})


@dataclass(frozen=True)
class PricedStep:
    """Times of a step as an engine found them: seconds, bounds, and parts by category; exposed ones sum to the step."""

    engine: str
    step_time_s: float
    lower_s: float
    upper_s: float
    exposed_s: dict[str, float]
    hidden_s: dict[str, float]


def estimate_loaded(loaded: LoadedScenario) -> StepEstimate:
    """Estimate a loaded, legal scenario."""
    (evaluation,) = evaluate(loaded.system, loaded.columns)
    return step_answer(loaded, evaluation, analytical_step(loaded, evaluation))


def analytical_step(loaded: LoadedScenario, evaluation: PlanEvaluation) -> PricedStep:
    """Times of a step by the analytical engine."""
    parts = breakdown(evaluation, loaded.columns, 0)
    return PricedStep(
        engine="analytical",
        step_time_s=float(evaluation.step_time_s[0]),
        lower_s=float(evaluation.lower_s[0]),
        upper_s=float(evaluation.upper_s[0]),
        exposed_s=parts["exposed"],
        hidden_s=parts["hidden"],
    )


def step_answer(loaded: LoadedScenario, evaluation: PlanEvaluation, step: PricedStep) -> StepEstimate:
    """Complete the times of a step to an answer.

    Parameters
    ----------
    loaded : LoadedScenario
        A legal scenario.
    evaluation : PlanEvaluation
        Its evaluation by the analytical engine, for memory, FLOPs and stage times, which both engines share.
    step : PricedStep
        Times of either engine.
    """
    system, columns = loaded.system, loaded.columns
    memory = _memory_answer(system, evaluation)
    routing = _routing_answer(system, columns)
    tokens = int(tokens_per_row(system.scenario, columns)[0])
    device = system.device
    return StepEstimate(
        scenario=system.scenario.name,
        engine=step.engine,
        network="closed" if system.hardware.fabric.contention is None else "flow",
        kind=system.scenario.workload.kind,
        num_devices=system.scenario.devices,
        num_chips=-(-system.scenario.devices // device.devices_per_chip),
        device=device.id,
        cluster=system.cluster.id,
        stack=system.stack.id,
        step_time_s=step.step_time_s,
        lower_s=step.lower_s,
        upper_s=step.upper_s,
        interval_s=_interval(system, step.exposed_s, step.step_time_s, step.lower_s),
        tokens_per_step=tokens,
        model_flops_per_step=float(model_flops(system, columns)[0]),
        hardware_flops_per_step=float(evaluation.hardware_flops[0]),
        peak_flops_per_s_per_device=device.peak_flop_rate[system.scenario.precision.compute].value,
        parameters=_parameters(system, evaluation),
        exposed_s=step.exposed_s,
        hidden_s=step.hidden_s,
        pipeline=_pipeline_answer(evaluation, step.exposed_s["pipeline_bubble"], columns),
        memory=memory,
        routing=routing,
        bottleneck=find_bottleneck(step.exposed_s, step.step_time_s),
        cost=_cost(system, tokens / step.step_time_s),
        provenance=sourced_figures(system),
        assumptions=dict(system.scenario.assumed),
        warnings=list(
            warnings_of(
                system,
                columns,
                routing.slots_per_expert,
                routing.dropped_fraction,
                memory.peak / memory.capacity,
            )
        ),
    )


def tokens_per_row(scenario: Scenario, columns: Columns) -> FloatArray:
    """Tokens counted in the throughput of a step: of the source, the target or both; one per sequence when decoding."""
    sequences = columns["step_sequences"]
    if scenario.workload.kind == "decode":
        return sequences
    source, target = columns["source_length"], columns["target_length"]
    if scenario.model.architecture == "decoder_only":
        return sequences * target
    return sequences * {"source": source, "target": target, "all": source + target}[scenario.workload.tokens_counted]


def _interval(system: System, exposed_s: dict[str, float], step_time_s: float, lower_s: float) -> Interval:
    """Interval of the step time, not below the lower bound.

    The wider, on each side, of 1.645 standard deviations of the figures and of what the stack's kind of published runs
    showed: measured over predicted, 5th to 95th percentile.
    """
    errors = class_errors(system.device, system.cluster, system.stack, system.hardware.device.surfaces)
    half_width = NORMAL_QUANTILE * standard_deviation_s(exposed_s, errors)
    low, high = step_time_s - half_width, step_time_s + half_width
    ratio = system.stack.step_ratio
    if ratio is not None:
        low, high = min(low, ratio.low * step_time_s), max(high, ratio.high * step_time_s)
    return Interval(max(low, lower_s), high, LEVEL)


def _parameters(system: System, evaluation: PlanEvaluation) -> Parameters:
    counts = count_parameters(system.scenario.model)
    stored = PRECISION_BYTES[system.scenario.precision.parameters]
    per_device = round(float(evaluation.memory.parts(0)["weights"]) / stored)
    return Parameters(counts.total, counts.active, counts.expert, per_device, counts.mtp)


def _pipeline_answer(evaluation: PlanEvaluation, bubble_s: float, columns: Columns) -> PipelineAnswer:
    case = int(evaluation.pass_case[0])
    per_stage = stage_seconds(evaluation.times, evaluation.plan)[:, case]
    critical = int(evaluation.critical_stage[case])
    busy = float(columns["num_micro_batches"][0]) * float(per_stage[critical])
    return PipelineAnswer([float(value) for value in per_stage], bubble_s / busy, critical)


def _memory_answer(system: System, evaluation: PlanEvaluation) -> MemoryAnswer:
    """Whole bytes, so that the categories sum to the peak exactly."""
    exact = evaluation.memory.parts(0)
    parts = {name: round(exact[name]) for name in CATEGORIES}
    peak, capacity = sum(parts.values()), int(system.device.usable_memory.value)
    return MemoryAnswer(
        **parts,
        peak=peak,
        capacity=capacity,
        deficit=max(peak - capacity, 0),
        peak_stage=int(evaluation.memory.stage[0]),
    )


def _routing_answer(system: System, columns: Columns) -> RoutingAnswer:
    moe = system.scenario.model.moe
    if moe is None:
        return RoutingAnswer(0.0, 0.0, 1.0)
    group = routing_group_tokens(system.scenario, columns)
    slots = float(slots_per_expert(moe, columns["capacity_factor"], np.array([group]))[0])
    degree = int(columns["expert"][0])
    load = float(system.load_factor(columns["expert"])[0])
    if float(columns["capacity_factor"][0]) == DROPLESS:
        return RoutingAnswer(slots, 0.0, load)
    shares = routed_shares(system.scenario, degree)
    dropped = dropped_fraction(shares, group * moe.router.experts_per_token, slots)
    return RoutingAnswer(slots, dropped, load)


def _cost(system: System, tokens_per_s: float) -> CostAnswer:
    price = system.cluster.price_per_device_hour or system.device.price
    if price is None:
        return CostAnswer(None, None)
    per_hour = price.value * system.scenario.devices
    return CostAnswer(per_hour, per_hour / 3600.0 / tokens_per_s * 1e9)
