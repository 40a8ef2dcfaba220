"""What ranks do after their last pass: reduce gradients, update, gather parameters; and whom they wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.engine.breakdowns import StepEnd
from moesim.engine.rank_max_plus import Groups, largest_of_gradient_groups
from moesim.engine.step_passes import PreparedStep
from moesim.structure.columns import FloatArray


@dataclass(frozen=True)
class StepEndTimes:
    """Moments of every rank, arrays (n_draws, stages, n_ranks); ``parts`` are each stage's seconds.

    ``finish_s`` ends the last pass, ``reduce_s`` begins the exposed reduction, ``gather_s`` the exposed gather of
    parameters; ``end_s`` is the end, ``waiting_s`` what of it was waiting for others.
    """

    parts: Sequence[StepEnd]
    finish_s: FloatArray
    reduce_s: FloatArray
    gather_s: FloatArray
    end_s: FloatArray
    waiting_s: FloatArray


def step_end_times(step: PreparedStep, finish_s: FloatArray, groups: Groups) -> StepEndTimes:
    """When each rank does what ends its step.

    Parameters
    ----------
    step : PreparedStep
        Scenario.
    finish_s : ndarray of shape (n_draws, stages, n_ranks)
        End of the last pass.
    groups : mapping of str to RankGroups
        Who waits for whom; none where ranks cannot be told apart.
    """
    parts = step.step_ends()

    def seconds(attribute: str) -> FloatArray:
        return np.array([getattr(part, attribute) for part in parts])[None, :, None]

    reduction_s, parameters_s = seconds("reduction_s"), seconds("gather_s")
    reduce_s = np.where(reduction_s > 0, largest_of_gradient_groups(_mirrored(step, finish_s), groups), finish_s)
    updated_s = reduce_s + (reduction_s - seconds("hidden_reduction_s")) + seconds("optimizer_s") + seconds("host_s")
    gather_s = np.where(parameters_s > 0, largest_of_gradient_groups(updated_s, groups), updated_s)
    return StepEndTimes(
        parts=parts,
        finish_s=finish_s,
        reduce_s=reduce_s,
        gather_s=gather_s,
        end_s=gather_s + (parameters_s - seconds("hidden_gather_s")),
        waiting_s=(reduce_s - finish_s) + (gather_s - updated_s),
    )


def _mirrored(step: PreparedStep, moments_s: FloatArray) -> FloatArray:
    """Stages that hold the same chunks, one for each direction, exchange their gradients: the later one counts."""
    return moments_s if step.evaluation.plan.placed.directions == 1 else np.maximum(moments_s, moments_s[:, ::-1])
