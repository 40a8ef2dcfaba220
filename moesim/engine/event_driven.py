"""The event-driven engine: one scenario's step on every rank, with what each waits for.

It prices the operations that the analytical engine prices and runs them rank by rank: a pass starts when what it needs
is there, a collective when its last member is. Where loads are even and all ranks alike, both engines agree.

The share of a communication that a stack hides is hidden from time, not from order: its collective still waits for the
last member where it stands in line, and what is hidden is drawn beside the compute of its block, under which it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    node_times,
    sums_by_category,
)
from moesim.engine.step_ends import StepEndTimes, step_end_times
from moesim.engine.step_passes import LinkPrices, PreparedStep, prepare_step
from moesim.engine.stream_times import RankSeconds
from moesim.engine.timeline_recording import StepRecord, recorded_timeline
from moesim.engine.timelines import Timeline
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.rank_programs import StageRanks
from moesim.structure.step_graph import Operation

Loads = RankSeconds | Sequence[RankSeconds]
CELLS_AT_ONCE = 16_000_000
"""Passes x draws x ranks that are run together: 128 MB for each array over them."""


@dataclass(frozen=True)
class RankDelays:
    """What makes ranks differ beside their load; the first axis, draws, may be left out where all are alike.

    Attributes
    ----------
    compute_factor : ndarray of shape (n_draws, all ranks) or None
        How many times longer each rank computes.
    host_late_s : ndarray of shape (n_draws, all ranks, passes) or None
        What each rank's host takes longer to issue each of its passes, in the order in which its stage runs them.
    links : LinkPrices or None
        What collectives and transfers take where links differ; the same in all draws but for loads.
    """

    compute_factor: FloatArray | None = None
    host_late_s: FloatArray | None = None
    links: LinkPrices | None = None

    @property
    def draws(self) -> int:
        """Draws there are; 0 where nothing is given."""
        given = [(self.compute_factor, 2), (self.host_late_s, 3)]
        return max(
            (values.shape[0] if values.ndim == full else 1 for values, full in given if values is not None),
            default=0 if self.links is None else 1,
        )

    def compute_factor_of(self, ranks: StageRanks, stage: int, draws: slice) -> FloatArray:
        """Factors of a stage's ranks in some draws."""
        if self.compute_factor is None:
            return np.ones((1, 1))
        return draws_of(self.compute_factor, draws)[:, ranks.global_ranks(stage)]

    def host_late_of(self, step: PreparedStep, draws: slice) -> Callable[[int], FloatArray | None]:
        """What hosts are late with a node in some draws."""
        late_s = self.host_late_s
        if late_s is None:
            return lambda _: None
        part = (late_s if late_s.ndim == 3 else late_s[None])[
            draws if late_s.ndim == 3 and len(late_s) > 1 else slice(1)
        ]
        of_stage = [part[:, step.ranks.global_ranks(stage)] for stage in range(step.stages)]
        stages, numbers = step.nodes.stage.tolist(), step.pass_number.tolist()
        return lambda node: of_stage[stages[node]][:, :, min(numbers[node], part.shape[2] - 1)]


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
        ``imbalance`` has what a rank waits for others of its stage and ``pipeline_bubble`` what it waits for passes.
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
    loads: Loads = (),
    delays: RankDelays | None = None,
    timeline_ranks: Sequence[int] = (),
) -> SimulatedRun:
    """Simulate a step of one scenario.

    Parameters
    ----------
    system : System
        Scenario, profiles and rates.
    columns : Columns
        Resolved and legal, one row.
    loads : mapping of (layer, phase, position in the MoE table) to ndarray, or a sequence of such
        Seconds of operations that grow with load, broadcastable to (n_draws, ranks of a stage), ranks numbered as
        ``StageRanks`` numbers them; of several, one for each direction of the pipeline. Operations it lacks take what
        they take on the fullest rank under the scenario's imbalance, on all ranks alike.
    delays : RankDelays, optional
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
    return run_step(prepare_step(system, columns), loads=loads, delays=delays, timeline_ranks=timeline_ranks)


def run_step(
    step: PreparedStep,
    *,
    loads: Loads = (),
    delays: RankDelays | None = None,
    timeline_ranks: Sequence[int] = (),
) -> SimulatedRun:
    """Simulate a prepared step; arguments as :func:`simulate_step`."""
    seconds, given = _by_direction(loads), delays or RankDelays()
    runs = [
        _run_draws(step, seconds, given, draws, timeline_ranks if draws.start == 0 else ())
        for draws in draw_batches(step, seconds, given)
    ]
    return runs[0] if len(runs) == 1 else joined_runs(runs)


def _by_direction(loads: Loads) -> tuple[RankSeconds, ...]:
    return (loads,) if isinstance(loads, Mapping) else tuple(loads) or ({},)


def draw_batches(step: PreparedStep, loads: Sequence[RankSeconds], delays: RankDelays) -> Iterator[slice]:
    """Draws that are run together."""
    given = [len(np.atleast_2d(values)) for seconds in loads for values in seconds.values()]
    n_draws = max((*given, delays.draws), default=0)
    at_once = max(CELLS_AT_ONCE // (len(step.nodes) * (step.ranks.count if n_draws else 1)), 1)
    for first in range(0, max(n_draws, 1), at_once):
        yield slice(first, min(first + at_once, max(n_draws, 1)))


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
    step: PreparedStep, loads: Sequence[RankSeconds], delays: RankDelays, draws: slice, timeline_ranks: Sequence[int]
) -> SimulatedRun:
    """Run some draws at once and record the first."""
    are_alike = not any(loads) and not delays.draws
    groups: Groups = {} if are_alike else step.ranks.groups
    shape = (draws.stop - draws.start, 1 if are_alike else step.ranks.count)
    passes = step.passes(
        [{key: draws_of(values, draws) for key, values in seconds.items()} for seconds in loads],
        lambda stage: delays.compute_factor_of(step.ranks, stage, draws),
        None if delays.links is None else _LinksOfDraws(delays.links, draws),
    )
    late_s = delays.host_late_of(step, draws)
    parts = {key: folded(part, groups) for key, part in passes.items()}
    hop_s = np.full((1, 1), step.exposed_hop_s)
    hop_to = (lambda _: hop_s) if delays.links is None else delays.links.hop_s
    times = node_times(step.nodes, parts, hop_to, shape, step.stages, late_s)
    finish = pipeline_finish_s(step, times)
    ends = step.step_ends() if delays.links is None else delays.links.step_ends()
    factor = np.stack([delays.compute_factor_of(step.ranks, stage, draws) for stage in range(step.stages)], axis=1)
    end = step_end_times(step, ends, finish, factor, groups)
    exposed, hidden = _totals(step, parts, times, end)
    timeline = None
    if len(timeline_ranks):
        timeline = recorded_timeline(StepRecord(step, passes, times, groups, end, late_s), timeline_ranks)
    return SimulatedRun(
        ranks=step.ranks,
        step_time_s=end.end_s.max(axis=(1, 2)),
        pipeline_finish_s=finish,
        finish_s=end.end_s,
        exposed_s=exposed,
        hidden_s=hidden,
        operations=shape[0] * shape[1] * sum(count * parts[key].operations for key, count in step.counts.items()),
        timeline=timeline,
    )


@dataclass(frozen=True)
class _LinksOfDraws:
    """Links whose collectives carry the loads of some draws."""

    links: LinkPrices
    draws: slice

    def collective_s(self, at: tuple[int, int], operation: Operation, key: tuple[int, str, int]) -> FloatArray:
        return draws_of(self.links.collective_s(at, operation, key), self.draws)

    def zero_s(self, stage: int, chunk: int) -> Mapping[int, float]:
        return self.links.zero_s(stage, chunk)

    def hop_s(self, node: int) -> FloatArray:
        return self.links.hop_s(node)

    def step_ends(self) -> list[StepEnd]:
        return self.links.step_ends()


def pipeline_finish_s(step: PreparedStep, times: NodeTimes) -> FloatArray:
    """When each rank has run its last pass, shape (n_draws, stages, n_ranks); inference ends with its last stage."""
    finish = np.zeros((times.end_s.shape[1], step.stages, times.end_s.shape[2]))
    for stage in range(step.stages):
        finish[:, stage] = times.end_s[step.nodes.stage == stage].max(axis=0)
    return finish


def _totals(
    step: PreparedStep, parts: dict[PassKey, FoldedPass], times: NodeTimes, end: StepEndTimes
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Exposed and hidden seconds by category, arrays (n_draws, stages, n_ranks); exposed ones sum to the step time."""
    end_s, stages = end.end_s, step.stages
    shape = (end_s.shape[0], end_s.shape[2])
    exposed = sums_by_category(step.counts, {key: part.own_s for key, part in parts.items()}, shape, stages)
    hidden = sums_by_category(step.counts, {key: part.hidden_s for key, part in parts.items()}, shape, stages)
    waits = {key: {"host": part.host_wait_s} for key, part in parts.items()}
    host_s = sums_by_category(step.counts, waits, shape, stages)["host"] + times.host_s.swapaxes(0, 1)

    def add(category: str, seconds: FloatArray) -> None:
        exposed[category] = exposed.get(category, np.zeros_like(end_s)) + seconds

    in_passes = sum(exposed.values(), np.zeros_like(end_s))
    add("imbalance", times.running_s.swapaxes(0, 1) - in_passes - host_s + end.waiting_s)
    add("host", host_s)
    ends = end.parts
    for category, seconds in (
        ("data_parallel", [part.exposed_s for part in ends]),
        ("host", [part.host_s for part in ends]),
    ):
        add(category, np.array(seconds)[None, :, None])
    add("optimizer", end.optimizer_s)
    add("pipeline_p2p", times.transfer_s.swapaxes(0, 1))
    add("imbalance", end_s.max(axis=2, keepdims=True) - end_s)  # for the slowest update of the stage
    step_time_s = end_s.max(axis=(1, 2))[:, None, None]
    add("pipeline_bubble", step_time_s - sum(exposed.values(), np.zeros_like(end_s)))
    hidden["data_parallel"] = (
        hidden.get("data_parallel", np.zeros_like(end_s)) + np.array([part.hidden_s for part in ends])[None, :, None]
    )
    return exposed, hidden
