"""Where the time of one row goes, read from what the analytical engine kept of its evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.engine.analytical import PlanEvaluation
from moesim.engine.layer_cases import PHASES
from moesim.engine.overlaps import hidden_reduction_s
from moesim.structure.columns import Columns


@dataclass(frozen=True)
class StepEnd:
    """What one stage of one row does after its last backward: seconds.

    The reduction hides only under the last micro-batch's backward, the gather of updated parameters under the first
    forward of the next step.
    """

    reduction_s: float = 0.0
    hidden_reduction_s: float = 0.0
    gather_s: float = 0.0
    hidden_gather_s: float = 0.0
    optimizer_s: float = 0.0
    host_s: float = 0.0

    @property
    def hidden_s(self) -> float:
        """Communication that hides."""
        return self.hidden_reduction_s + self.hidden_gather_s

    @property
    def exposed_s(self) -> float:
        """Communication that does not."""
        return self.reduction_s + self.gather_s - self.hidden_s


def step_end(evaluation: PlanEvaluation, row: int, stage: int) -> StepEnd:
    """End of a step on one stage of one row: the terms that ``analytical._step_end`` sums for all stages and rows."""
    times, costs = evaluation.times, evaluation.costs
    if costs is None:
        return StepEnd()
    placed, pass_case = evaluation.plan.placed, int(evaluation.pass_case[row])
    chunks = placed.held[stage]
    at = (stage, int(evaluation.state_case[row]))
    reduction, gather = float(costs.reduction_s[at]), float(costs.update_gather_s[at])
    eta = evaluation.data_parallel_overlap
    hidden_s = hidden_reduction_s(
        np.array(reduction),
        times.backward_s[chunks, pass_case].sum() / placed.directions,
        eta,
        costs.reduction_buckets[at],
        costs.reduction_loss,
    )
    return StepEnd(
        reduction_s=reduction,
        hidden_reduction_s=float(hidden_s),
        gather_s=gather,
        hidden_gather_s=min(gather * eta, float(times.forward_s[chunks, pass_case].sum()) / placed.directions),
        optimizer_s=float(costs.optimizer_s[at]),
        host_s=float(costs.host_s[at] + times.start_s[pass_case]),
    )


def breakdown(evaluation: PlanEvaluation, columns: Columns, row: int) -> dict[str, dict[str, float]]:
    """Exposed and hidden seconds by category for one row of an evaluation; exposed parts sum to the step time.

    Parts are those of the critical stage, times its micro-batches, and what it does after them; all else is waiting:
    transfer (at most one round trip through the stages) and bubble.
    """
    plan, placed = evaluation.plan, evaluation.plan.placed
    layers, times = evaluation.layers, evaluation.times
    case, pass_case = int(evaluation.layer_case[row]), int(evaluation.pass_case[row])
    stage = int(evaluation.critical_stage[pass_case])
    micro_batches = float(columns["num_micro_batches"][row]) / placed.directions  # that pass each chunk held
    exposed: dict[str, float] = {}
    hidden: dict[str, float] = {}
    blocks = [(block, float(plan.stage_counts()[index, stage])) for index, block in enumerate(layers.layers)]
    blocks += [(layers.first, float(stage in placed.stages_of(0))), (layers.last, float(stage in placed.stages_of(-1)))]
    for block, count in blocks:
        for phase in PHASES:
            for totals, parts in ((exposed, block.phase(phase).exposed_s), (hidden, block.phase(phase).hidden_s)):
                for key, values in parts.items():
                    seconds = float(np.broadcast_to(values, layers.rows.shape)[case])
                    totals[key] = totals.get(key, 0.0) + micro_batches * count * seconds
    chunks, end = placed.held[stage], step_end(evaluation, row, stage)
    exposed["host"] = micro_batches * float(times.chunk.waits.waiting_s[:, chunks, times.chunk_case[pass_case]].sum())
    exposed["host"] += end.host_s - micro_batches * float(evaluation.update_lead_s[row])
    exposed["data_parallel"] = end.exposed_s + micro_batches * float(times.zero_exposed_s[chunks, pass_case].sum())
    hidden["data_parallel"] = end.hidden_s + micro_batches * float(times.zero_hidden_s[chunks, pass_case].sum())
    exposed["optimizer"] = end.optimizer_s
    waiting = max(float(evaluation.step_time_s[row]) - sum(exposed.values()), 0.0)
    trips = 2.0 * placed.transfers
    transfer = min(trips * float(times.exposed_hop_s[pass_case]), waiting)
    exposed["pipeline_p2p"], exposed["pipeline_bubble"] = transfer, waiting - transfer
    hidden["pipeline_p2p"] = trips * float(times.hop_s[pass_case] - times.exposed_hop_s[pass_case])
    return {"exposed": exposed, "hidden": hidden}
