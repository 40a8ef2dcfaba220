"""Every term of a step with its formula and numbers: what ``--explain`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesim.cost.explanations import explain_operation
from moesim.cost.operators import price
from moesim.engine.analytical import PlanEvaluation, evaluate
from moesim.estimation.loading import LoadedScenario
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_layers import dense_part, embedding_part, head_part, token_prediction_part
from moesim.structure.lowering_moe import moe_part
from moesim.structure.parameters import mtp_layer_kind
from moesim.structure.step_graph import OperationTable


@dataclass(frozen=True)
class ExplainedTerm:
    """One term: ``seconds_each`` without overlap, executed ``times`` per step on the stage that ends it."""

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
    """Operation tables and how often the ending stage executes each in a step."""
    system, plan, stage = loaded.system, evaluation.plan, int(evaluation.ending_stage[0])
    context = LoweringContext(loaded.scenario, system.stack, loaded.columns)
    sequence = layer_sequence(loaded.scenario.model)
    micro_batches = float(loaded.columns["num_micro_batches"][0])
    is_last = stage == plan.stages - 1
    modules = sequence.mtp_layers if is_last and loaded.scenario.workload.kind == "training" else 0
    for index, kind in enumerate(sequence.kinds):
        layers = float(plan.stage_counts()[index, stage])
        layers += modules * (kind == mtp_layer_kind(sequence))
        if layers:
            yield dense_part(context, kind), micro_batches * layers
            if kind.is_moe:
                yield moe_part(context, kind, system.load_factor), micro_batches * layers
    if stage == 0:
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
    stage, case = int(evaluation.ending_stage[0]), int(evaluation.pass_case[0])
    times, stages = evaluation.times, evaluation.plan.stages
    micro_batches = float(loaded.columns["num_micro_batches"][0])
    per_stage = (times.forward_s + times.backward_s)[:, case].reshape(-1, stages).sum(axis=0)
    finish = float(evaluation.finish_s[stage, case])
    rest = finish - micro_batches * float(per_stage[stage])
    schedule = loaded.scenario.parallelism.pipeline.schedule
    yield ExplainedTerm(
        "pipeline_bubble",
        "pipeline.finish",
        "step",
        1.0,
        finish,
        f"micro-batches x stage time + waiting ({schedule} over {stages} stages by max-plus recursion)",
        f"{micro_batches:g} * {float(per_stage[stage]):.12g} + {rest:.12g}",
    )
    exposed, hidden = float(evaluation.data_parallel_exposed_s[0]), float(evaluation.data_parallel_hidden_s[0])
    yield ExplainedTerm(
        "data_parallel",
        "gradients and updated parameters",
        "step",
        1.0,
        exposed,
        "reduction + gather - what hides under the last backward and the next forward",
        f"{exposed + hidden:.12g} - {hidden:.12g}",
    )
    update = float(evaluation.optimizer_s[0])
    yield ExplainedTerm(
        "optimizer", "update", "step", 1.0, update, "t0 + bytes of states / (bandwidth fraction)", f"{update:.12g}"
    )
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
