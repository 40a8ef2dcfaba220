"""Every term of a step with its formula and numbers: what ``--explain`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesim.cost.explanations import explain_operation
from moesim.cost.operators import price
from moesim.engine.analytical import PlanEvaluation, evaluate, stage_seconds
from moesim.engine.breakdowns import step_end
from moesim.estimation.loading import LoadedScenario
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_layers import dense_part, embedding_part, head_part, token_prediction_part
from moesim.structure.lowering_moe import moe_part
from moesim.structure.parameters import mtp_layer_kind
from moesim.structure.step_graph import OperationTable


@dataclass(frozen=True)
class ExplainedTerm:
    """One term: ``seconds_each`` without overlap, executed ``times`` per step on the critical stage."""

    category: str
    name: str
    phase: str
    times: float
    seconds_each: float
    formula: str
    substituted: str

    def to_json(self) -> dict[str, Any]:
        """The term as a dictionary."""
        return asdict(self)


def explain_step(loaded: LoadedScenario) -> list[ExplainedTerm]:
    """Explain every operation, the pipeline, the reduction of gradients and the update, and memory."""
    (evaluation,) = evaluate(loaded.system, loaded.columns)
    terms = [term for table, times in _tables(loaded, evaluation) for term in _table_terms(loaded, table, times)]
    return [*terms, *_step_terms(loaded, evaluation)]


def _tables(loaded: LoadedScenario, evaluation: PlanEvaluation) -> Iterator[tuple[OperationTable, float]]:
    """Operation tables and how often the critical stage executes each in a step."""
    system, plan, stage = loaded.system, evaluation.plan, int(evaluation.critical_stage[evaluation.pass_case[0]])
    context = LoweringContext(loaded.scenario, system.stack, loaded.columns)
    sequence = layer_sequence(loaded.scenario.model)
    micro_batches = float(loaded.columns["num_micro_batches"][0]) / plan.placed.directions
    is_last = stage in plan.placed.stages_of(-1)
    modules = sequence.mtp_layers if is_last and loaded.scenario.workload.kind == "training" else 0
    for index, kind in enumerate(sequence.kinds):
        layers = float(plan.stage_counts()[index, stage])
        layers += modules * (kind == mtp_layer_kind(sequence))
        if layers:
            yield dense_part(context, kind), micro_batches * layers
            if kind.is_moe:
                yield moe_part(context, kind, system.load_factor), micro_batches * layers
    if stage in plan.placed.stages_of(0):
        yield embedding_part(context), micro_batches
    if is_last:
        yield head_part(context), micro_batches * (1 + modules)
    if modules:
        yield token_prediction_part(context), micro_batches * modules


def _table_terms(loaded: LoadedScenario, table: OperationTable, times: float) -> Iterator[ExplainedTerm]:
    hardware = loaded.system.hardware
    for operation in table.operations:
        seconds = float(np.ravel(price(operation, hardware).time_s)[0])
        if seconds <= 0:
            continue
        words = explain_operation(operation, hardware)
        yield ExplainedTerm(
            operation.category,
            f"{table.name}.{operation.name}",
            operation.phase,
            times,
            seconds,
            words.formula,
            words.substituted,
        )


def _step_terms(loaded: LoadedScenario, evaluation: PlanEvaluation) -> Iterator[ExplainedTerm]:
    """The pipeline, the gradients' reduction, the update, and the memory balance."""
    case, stages = int(evaluation.pass_case[0]), evaluation.plan.stages
    stage = int(evaluation.critical_stage[case])
    end = step_end(evaluation, 0, stage)
    busy = float(stage_seconds(evaluation.times, evaluation.plan)[stage, case])
    micro_batches = float(loaded.columns["num_micro_batches"][0])
    waiting = float(evaluation.step_time_s[0]) - micro_batches * busy - end.exposed_s - end.optimizer_s
    schedule = loaded.scenario.parallelism.pipeline.schedule
    yield ExplainedTerm(
        "pipeline_bubble",
        f"stage {stage}, the critical one",
        "step",
        1.0,
        micro_batches * busy + waiting,
        f"micro-batches x stage time + waiting ({schedule} over {stages} stages by max-plus recursion)",
        f"{micro_batches:g} * {busy:.15g} + {waiting:.15g}",
    )
    yield ExplainedTerm(
        "data_parallel",
        "gradients and updated parameters",
        "step",
        1.0,
        end.exposed_s,
        "reduction + gather - what hides under the last backward and the next forward",
        f"{end.exposed_s + end.hidden_s:.15g} - {end.hidden_s:.15g}",
    )
    words = "t0 + bytes of states / (bandwidth fraction)"
    yield ExplainedTerm("optimizer", "update", "step", 1.0, end.optimizer_s, words, f"{end.optimizer_s:.15g}")
    memory = evaluation.memory.parts(0)
    parts = " + ".join(f"{value:.0f}" for value in memory.values())
    yield ExplainedTerm(
        "memory",
        f"bytes of stage {int(evaluation.memory.stage[0])}",
        "step",
        0.0,
        0.0,
        " + ".join(memory),
        f"{parts} = {float(evaluation.memory.peak[0]):.0f} bytes",
    )
