"""The event-driven engine: one scenario's step on every rank, with what each waits for.

It prices the operations that the analytical engine prices and runs them rank by rank: a pass starts when what it needs
is there, a collective when its last member is. Where loads are even and all ranks alike, both engines agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.engine.analytical import System
from moesim.engine.breakdowns import StepEnd
from moesim.engine.rank_max_plus import (
    FoldedPass,
    Groups,
    NodeTimes,
    PassKey,
    folded,
    meet_for_gradients,
    node_times,
    sums_by_category,
)
from moesim.engine.step_passes import PreparedStep, StageDelays, prepare_step
from moesim.engine.stream_times import RankSeconds
from moesim.engine.timeline_recording import StepRecord, recorded_timeline
from moesim.engine.timelines import Timeline
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.rank_programs import StageRanks

CELLS_AT_ONCE = 16_000_000
"""Passes x draws x ranks that are run together: 128 MB for each array over them."""


@dataclass(frozen=True)
class Perturbations:
    """What makes ranks differ beside their load; arrays over all ranks of the step, (n_ranks,) or (n_draws, n_ranks).

    A slower link is a slower fabric of the system that is simulated.

    Attributes
    ----------
    compute_factor : ndarray or None
        How many times longer each rank computes.
    host_delay_s : ndarray or None
        Seconds that each rank's host takes longer for every stretch it issues (a chunk's pass, or a layer's where the
        stack waits for counts).
    """

    compute_factor: FloatArray | None = None
    host_delay_s: FloatArray | None = None

    def of_stage(self, ranks: StageRanks, stage: int, draws: slice) -> StageDelays:
        """Those of a stage's ranks in some draws."""

        def part(values: FloatArray | None, default: float) -> FloatArray:
            if values is None:
                return np.full((1, 1), default)
            return draws_of(values, draws)[:, ranks.global_ranks(stage)]

        return StageDelays(part(self.compute_factor, 1.0), part(self.host_delay_s, 0.0))

    def arrays(self) -> list[FloatArray]:
        """Those that are given."""
        return [values for values in (self.compute_factor, self.host_delay_s) if values is not None]


def draws_of(values: FloatArray, draws: slice) -> FloatArray:
    """Some draws of an array of one or all draws, shape (n_draws or 1, n_ranks)."""
    rows = np.atleast_2d(values)
    return rows if len(rows) == 1 else rows[draws]


@dataclass(frozen=True)
class SimulatedRun:
    """A simulated step; ranks are columns of each stage, one for all where they cannot be told apart.

    Attributes
    ----------
    ranks : StageRanks
        Ranks of the stages.
    step_time_s : ndarray of shape (n_draws,)
        When the last rank has finished.
    pipeline_finish_s, finish_s : ndarray of shape (n_draws, stages, columns)
        When each has run its last pass, and when its update is done.
    exposed_s, hidden_s : dict of str to ndarray of shape (n_draws, stages, columns)
        By category of ``structure.step_graph.CATEGORIES``; exposed parts sum to the step time on every rank, where
        ``imbalance`` has what a rank waits for others in collectives and ``pipeline_bubble`` what it waits for passes.
    operations : int
        Operations that all columns ran in all draws.
    timeline : Timeline or None
        Of the ranks asked for, in the first draw.
    """

    ranks: StageRanks
    step_time_s: FloatArray
    pipeline_finish_s: FloatArray
    finish_s: FloatArray
    exposed_s: dict[str, FloatArray]
    hidden_s: dict[str, FloatArray]
    operations: int
    timeline: Timeline | None = None

    @property
    def columns(self) -> int:
        """Ranks of a stage that were simulated."""
        return int(self.finish_s.shape[2])

    @property
    def idle_s(self) -> FloatArray:
        """Waiting for passes and for other ranks, shape (n_draws, stages, columns)."""
        return self.exposed_s["pipeline_bubble"] + self.exposed_s["pipeline_p2p"] + self.exposed_s["imbalance"]


def simulate_step(
    system: System,
    columns: Columns,
    *,
    loads: RankSeconds | None = None,
    perturbations: Perturbations | None = None,
    timeline_ranks: Sequence[int] = (),
) -> SimulatedRun:
    """Simulate a step of one scenario.

    Parameters
    ----------
    system : System
        Scenario, profiles and rates.
    columns : Columns
        Resolved and legal, one row.
    loads : mapping of (layer, phase, position in the MoE table) to ndarray, optional
        Seconds of operations that grow with load, broadcastable to (n_draws, ranks of a stage), ranks numbered as
        ``StageRanks`` numbers them. Operations it lacks take what they take on the fullest rank under the scenario's
        imbalance, on all ranks alike.
    perturbations : Perturbations, optional
        What else makes ranks differ.
    timeline_ranks : sequence of int
        Global ranks to record in the first draw.

    Returns
    -------
    SimulatedRun
        Times of all ranks and draws.

    Raises
    ------
    ValueError
        If there is more than one row.
    """
    return run_step(
        prepare_step(system, columns), loads=loads, perturbations=perturbations, timeline_ranks=timeline_ranks
    )


def run_step(
    step: PreparedStep,
    *,
    loads: RankSeconds | None = None,
    perturbations: Perturbations | None = None,
    timeline_ranks: Sequence[int] = (),
) -> SimulatedRun:
    """Simulate a prepared step; arguments as :func:`simulate_step`."""
    seconds, delays = loads or {}, perturbations or Perturbations()
    runs = [
        _run_draws(step, seconds, delays, draws, timeline_ranks if draws.start == 0 else ())
        for draws in draw_batches(step, seconds, delays)
    ]
    return runs[0] if len(runs) == 1 else joined_runs(runs)


def draw_batches(step: PreparedStep, loads: RankSeconds, perturbations: Perturbations) -> Iterator[slice]:
    """Draws that are run together."""
    given = [np.atleast_2d(values) for values in (*loads.values(), *perturbations.arrays())]
    n_draws = max((len(values) for values in given), default=1)
    width = step.ranks.count if given else 1
    at_once = max(CELLS_AT_ONCE // (len(step.nodes) * width), 1)
    for first in range(0, n_draws, at_once):
        yield slice(first, min(first + at_once, n_draws))


def joined_runs(runs: Sequence[SimulatedRun]) -> SimulatedRun:
    """Runs of some draws each as one; the timeline is the first one's."""

    def joined(attribute: str) -> FloatArray:
        return np.concatenate([getattr(run, attribute) for run in runs])

    def by_category(attribute: str) -> dict[str, FloatArray]:
        parts = [getattr(run, attribute) for run in runs]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return replace(
        runs[0],
        step_time_s=joined("step_time_s"),
        pipeline_finish_s=joined("pipeline_finish_s"),
        finish_s=joined("finish_s"),
        exposed_s=by_category("exposed_s"),
        hidden_s=by_category("hidden_s"),
        operations=sum(run.operations for run in runs),
    )


def _run_draws(
    step: PreparedStep, loads: RankSeconds, perturbations: Perturbations, draws: slice, timeline_ranks: Sequence[int]
) -> SimulatedRun:
    """Run some draws at once and record the first."""
    are_alike = not loads and not perturbations.arrays()
    groups: Groups = {} if are_alike else step.ranks.groups
    shape = (draws.stop - draws.start, 1 if are_alike else step.ranks.count)
    passes = step.passes(
        {key: draws_of(seconds, draws) for key, seconds in loads.items()},
        {stage: perturbations.of_stage(step.ranks, stage, draws) for stage in range(step.stages)},
    )
    parts = {key: folded(part, groups) for key, part in passes.items()}
    times = node_times(step.nodes, parts, np.full((1, 1), step.exposed_hop_s), shape, step.stages)
    finish = pipeline_finish_s(step, times)
    ends = step.step_ends()
    end_s, waits = step_end_s(finish, ends, groups)
    exposed, hidden = _totals(step, parts, times, end_s, waits)
    timeline = None
    if len(timeline_ranks):
        record = StepRecord(step, passes, times, groups, finish, ends)
        timeline = recorded_timeline(record, timeline_ranks)
    return SimulatedRun(
        ranks=step.ranks,
        step_time_s=end_s.max(axis=(1, 2)),
        pipeline_finish_s=finish,
        finish_s=end_s,
        exposed_s=exposed,
        hidden_s=hidden,
        operations=shape[0] * shape[1] * sum(count * parts[key].operations for key, count in step.counts.items()),
        timeline=timeline,
    )


def pipeline_finish_s(step: PreparedStep, times: NodeTimes) -> FloatArray:
    """When each rank has run its last pass, shape (n_draws, stages, n_ranks); inference ends with its last stage."""
    finish = np.zeros((times.end_s.shape[1], step.stages, times.end_s.shape[2]))
    for stage in range(step.stages):
        finish[:, stage] = times.end_s[step.nodes.stage == stage].max(axis=0)
    return finish


def step_end_s(finish_s: FloatArray, ends: Sequence[StepEnd], groups: Groups) -> tuple[FloatArray, FloatArray]:
    """When each rank has reduced its gradients, updated and gathered its parameters; and what it waited in between.

    Parameters
    ----------
    finish_s : ndarray of shape (n_draws, stages, n_ranks)
        End of the last pass.
    ends : sequence of StepEnd
        By stage.
    groups : mapping of str to RankGroups
        Who waits for whom.

    Returns
    -------
    tuple of ndarray of shape (n_draws, stages, n_ranks)
        End, and waiting for others.
    """
    now, waits = finish_s.copy(), np.zeros_like(finish_s)

    def meet(stage: int) -> None:
        before = now[:, stage].copy()

        def in_dimension(dimension: str) -> None:
            if dimension in groups:
                now[:, stage] = groups[dimension].maximum(now[:, stage])

        meet_for_gradients(in_dimension)
        waits[:, stage] += now[:, stage] - before

    for stage, end in enumerate(ends):
        if end.reduction_s:
            meet(stage)
        now[:, stage] += end.reduction_s - end.hidden_reduction_s + end.optimizer_s + end.host_s
        if end.gather_s:
            meet(stage)
        now[:, stage] += end.gather_s - end.hidden_gather_s
    return now, waits


def _totals(
    step: PreparedStep, parts: dict[PassKey, FoldedPass], times: NodeTimes, end_s: FloatArray, end_waits: FloatArray
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Exposed and hidden seconds by category, arrays (n_draws, stages, n_ranks); exposed ones sum to the step time."""
    shape, stages = (end_s.shape[0], end_s.shape[2]), step.stages
    exposed = sums_by_category(step.counts, {key: part.own_s for key, part in parts.items()}, shape, stages)
    hidden = sums_by_category(step.counts, {key: part.hidden_s for key, part in parts.items()}, shape, stages)
    waits = {key: {"host": part.host_wait_s} for key, part in parts.items()}
    host_s = sums_by_category(step.counts, waits, shape, stages)["host"] + times.host_s.swapaxes(0, 1)

    def add(category: str, seconds: FloatArray) -> None:
        exposed[category] = exposed.get(category, np.zeros_like(end_s)) + seconds

    in_passes = sum(exposed.values(), np.zeros_like(end_s))
    add("imbalance", times.running_s.swapaxes(0, 1) - in_passes - host_s + end_waits)
    add("host", host_s)
    ends = step.step_ends()
    for category, seconds in (
        ("data_parallel", [end.exposed_s for end in ends]),
        ("optimizer", [end.optimizer_s for end in ends]),
        ("host", [end.host_s for end in ends]),
    ):
        add(category, np.array(seconds)[None, :, None])
    add("pipeline_p2p", times.transfer_s.swapaxes(0, 1))
    step_time_s = end_s.max(axis=(1, 2))[:, None, None]
    add("pipeline_bubble", step_time_s - sum(exposed.values(), np.zeros_like(end_s)))
    hidden["data_parallel"] = (
        hidden.get("data_parallel", np.zeros_like(end_s)) + np.array([end.hidden_s for end in ends])[None, :, None]
    )
    return exposed, hidden
