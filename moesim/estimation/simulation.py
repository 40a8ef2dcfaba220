"""Simulate the draws of a scenario, batch by batch, and sum them up; what is finished survives an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np

from moesim.describe.perturbations import Perturbations
from moesim.describe.scenario import Scenario
from moesim.engine.drawn_loads import drawn_loads
from moesim.engine.event_driven import run_step
from moesim.engine.memory_timeline import loaded_contents, memory_timeline
from moesim.engine.step_passes import PreparedStep, prepare_step
from moesim.engine.timelines import Timeline
from moesim.engine.uneven_steps import UnevenRun, UnevenSteps
from moesim.engine.uneven_world import LossAttribution, loss_attribution
from moesim.errors import Problem, ScenarioError
from moesim.estimation.advice import bottleneck_of_losses
from moesim.estimation.estimate import (
    NetworkModel,
    PricedStep,
    analytical_step,
    load_any,
    step_answer,
    with_network,
)
from moesim.estimation.loading import LoadedScenario
from moesim.estimation.simulated_step import (
    Agreement,
    RecordedRank,
    Recording,
    SimulatedStep,
    StageFractions,
)
from moesim.estimation.step_contention import Contention, find_contention
from moesim.estimation.step_estimate import AnswerWarning, RoutingAnswer
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CATEGORIES

SimulatedNetwork = NetworkModel | Literal["shared"]
ENGINE = "event_driven"
COMMUNICATION: tuple[str, ...] = ("all_to_all", "tensor_parallel", "context_parallel", "data_parallel")
WAITING: tuple[str, ...] = ("host", "imbalance", "pipeline_bubble", "pipeline_p2p")
"""Categories in which a rank computes nothing and moves nothing in line; all others but communication are busy time."""
BATCH_S = 1.0
"""Draws are run in batches of about this long, so that progress shows and an interruption loses little."""
MANY_EVENTS, MOST_EVENTS = 2_000_000, 10_000_000
"""Recorded operations above which viewers are slow, and above which they take more memory than a trace is worth."""

LARGEST_GROWTH = 16.0
ROUNDING = 1e-12

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class _Sums:
    """What was found of each draw run so far, and the sums of their seconds by category, (stages, columns) each.

    ``drawn_times_s`` are step times at the same loads with nothing slow.
    """

    step_times_s: tuple[float, ...] = ()
    drawn_times_s: tuple[float, ...] = ()
    max_over_mean: tuple[float, ...] = ()
    dropped: tuple[float, ...] = ()
    peak_bytes: tuple[float, ...] = ()
    exposed_s: Mapping[str, FloatArray] = field(default_factory=dict)
    hidden_s: Mapping[str, FloatArray] = field(default_factory=dict)

    def with_run(self, run: UnevenRun) -> _Sums:
        """Add the draws of a run."""

        def added(totals: Mapping[str, FloatArray], parts: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
            shape = run.run.finish_s.shape[1:]
            sums = {name: totals.get(name, np.zeros(shape)) for name in CATEGORIES}
            for name, seconds in parts.items():
                for of_draw in seconds:  # one by one: a sum must not round by how draws were batched
                    sums[name] = sums[name] + of_draw
            return sums

        return _Sums(
            (*self.step_times_s, *run.run.step_time_s.tolist()),
            (*self.drawn_times_s, *run.drawn_s.tolist()),
            (*self.max_over_mean, *run.max_over_mean.tolist()),
            (*self.dropped, *run.dropped_fraction.tolist()),
            (*self.peak_bytes, *run.peak_bytes.tolist()),
            added(self.exposed_s, run.run.exposed_s),
            added(self.hidden_s, run.run.hidden_s),
        )

    def means(self, parts: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Mean over draws by category, (stages, columns)."""
        return {name: seconds / len(self.step_times_s) for name, seconds in parts.items()}


def simulate(
    scenario: Scenario | str | Path,
    *,
    draws: int = 1,
    seed: int = 0,
    perturbations: Perturbations | None = None,
    ranks: Sequence[int] = (),
    records: bool = False,
    profiles: Sequence[Path] = (),
    network: SimulatedNetwork = "closed",
) -> SimulatedStep:
    """Simulate a step of a scenario on every rank.

    Parameters
    ----------
    scenario : Scenario, str or Path
        A loaded scenario, a scenario file, or the bare name of a shipped one.
    draws, seed : int
        As for :func:`simulate_loaded`, as the following.
    perturbations : Perturbations, optional
        What is slow or late.
    ranks : sequence of int
        Ranks to report on.
    records : bool
        Whether to record them.
    profiles : sequence of Path
        Directories of hardware profiles that go before the shipped ones.
    network : str
        As for ``estimate``, or ``shared``: as for :func:`simulate_loaded`.

    Returns
    -------
    SimulatedStep
        Its ``estimate`` has what ``moesim.estimate`` gives.

    Raises
    ------
    ScenarioError, FormatError
        If the scenario is wrong; see ``load_scenario``.
    """
    return simulate_loaded(
        with_network(load_any(scenario, profiles), "closed" if network == "shared" else network),
        draws=draws,
        seed=seed,
        perturbations=perturbations,
        ranks=ranks,
        records=records,
        shares_links=network == "shared",
    )


def simulate_loaded(
    loaded: LoadedScenario,
    *,
    draws: int = 1,
    seed: int = 0,
    perturbations: Perturbations | None = None,
    ranks: Sequence[int] = (),
    records: bool = False,
    shares_links: bool = False,
    advance: Advance | None = None,
) -> SimulatedStep:
    """Simulate a loaded, legal scenario.

    Parameters
    ----------
    loaded : LoadedScenario
        What to simulate.
    draws : int
        Steps to draw. The same seed and number gives the same step, however many are drawn.
    seed : int
        Of all draws.
    perturbations : Perturbations, optional
        What is slow or late.
    ranks : sequence of int
        Ranks to report on; with ``records`` and none given, the first of each stage.
    records : bool
        Whether to record the timeline and the memory of these ranks in the first draw.
    shares_links : bool
        Whether collectives and messages that run at once share ports. What that adds is found on the step at even load,
        with slow and flapping links as capacities over time there, and added to every draw.
    advance : callable, optional
        Called with draws done and draws in all after each batch.

    Returns
    -------
    SimulatedStep
        With fewer draws than asked for where the user interrupted after the first.

    Raises
    ------
    KeyboardInterrupt
        If no draw was finished before.
    ScenarioError
        If the ranks would record more than ``MOST_EVENTS`` operations, or two links flap on one shared port.
    """
    given = perturbations or Perturbations()
    apart = replace(given, slow_links=(), flapping_links=()) if shares_links else given
    world = UnevenSteps(loaded.system, loaded.columns, apart, seed=seed)
    shown = tuple(ranks) or (_first_ranks(world.step) if records else ())
    if records:
        _check_size(world, shown)
    contention = find_contention(world.step, given, seed=seed) if shares_links else None
    sums, timeline = _Sums(), None
    batch = 1
    try:
        while (done := len(sums.step_times_s)) < draws:
            began = perf_counter()
            run = world.run(range(done, min(done + batch, draws)), shown if records and not done else ())
            if not done:
                timeline = run.run.timeline
            sums = sums.with_run(run)
            if advance is not None:
                advance(len(sums.step_times_s), draws)
            batch = max(1, round(batch * min(BATCH_S / max(perf_counter() - began, 1e-9), LARGEST_GROWTH)))
    except KeyboardInterrupt:
        if not sums.step_times_s:
            raise
    return _answer(loaded, world, sums, _Asked(draws, seed, shown), _Found(timeline, contention))


def _check_size(world: UnevenSteps, ranks: Sequence[int]) -> None:
    per_rank = world.even.operations / world.step.stages
    if per_rank * len(ranks) > MOST_EVENTS:
        message = f"{len(ranks):,} ranks run about {per_rank * len(ranks):.2g} operations, too many for a trace"
        remedy = f"record at most {int(MOST_EVENTS / per_rank):,} ranks"
        raise ScenarioError([Problem("E-CLI-001", message, remedy, field="--ranks")])


def _first_ranks(step: PreparedStep) -> tuple[int, ...]:
    """First rank of each pipeline stage."""
    return tuple(int(step.ranks.global_ranks(stage)[0]) for stage in range(step.stages))


class _Asked(NamedTuple):
    draws: int
    seed: int
    ranks: tuple[int, ...]


class _Found(NamedTuple):
    timeline: Timeline | None
    contention: Contention | None


def _answer(loaded: LoadedScenario, world: UnevenSteps, sums: _Sums, asked: _Asked, found: _Found) -> SimulatedStep:
    as_priced = prepare_step(loaded.system, loaded.columns)
    step, evaluation = world.step, as_priced.evaluation
    exposed, hidden = sums.means(sums.exposed_s), sums.means(sums.hidden_s)
    step_times_s, (timeline, contention) = np.array(sums.step_times_s), found
    if contention is not None:
        exposed = contention.added_to(exposed)
        step_times_s = step_times_s + contention.contention_s
    critical = int(evaluation.critical_stage[evaluation.pass_case[0]])
    step_time_s = float(step_times_s.mean())
    analytical = analytical_step(loaded, evaluation)
    times = PricedStep(
        engine=ENGINE,
        step_time_s=step_time_s,
        lower_s=min(analytical.lower_s, step_time_s),
        upper_s=max(analytical.upper_s, step_time_s),
        exposed_s=_of_stage(exposed, critical, step_time_s),
        hidden_s=_of_stage(hidden, critical, step_time_s),
    )
    priced_s = float(run_step(as_priced).step_time_s[0])
    recording = None if timeline is None else _recording(world, timeline, asked.ranks)
    estimate = step_answer(loaded, evaluation, times)
    warnings = [*estimate.warnings, *_warnings(timeline, sums, estimate.memory.capacity)]
    network = estimate.network if contention is None else "shared"
    routing = _routing(loaded, estimate.routing, sums)
    losses = _losses(world, sums, critical, contention)
    bottleneck = bottleneck_of_losses(estimate.bottleneck, losses)
    return SimulatedStep(
        estimate=replace(estimate, network=network, routing=routing, warnings=warnings, bottleneck=bottleneck),
        draws_asked=asked.draws,
        seed=asked.seed,
        step_times_s=step_times_s,
        peak_memory_bytes=np.array(sums.peak_bytes),
        losses=losses,
        stages=tuple(_stage_fractions(exposed, stage, step.ranks.count) for stage in range(step.stages)),
        ranks=tuple(_recorded_ranks(step, exposed, asked.ranks, recording)),
        agreement=Agreement(analytical.step_time_s, priced_s, priced_s / analytical.step_time_s - 1.0),
        recording=recording,
        contention=contention,
    )


def _losses(world: UnevenSteps, sums: _Sums, critical: int, contention: Contention | None) -> LossAttribution:
    """Losses on private links; slow links that are shared are stragglers too."""
    waits = ("pipeline_bubble", "pipeline_p2p")
    losses = loss_attribution(
        float(world.even.step_time_s[0]),
        sum(float(world.even.exposed_s[name][0, critical].mean()) for name in waits),
        np.array(sums.drawn_times_s),
        np.array(sums.step_times_s),
    )
    if contention is None:
        return losses
    stragglers_s = losses.stragglers_s + contention.faults_s
    return replace(losses, stragglers_s=stragglers_s, contention_s=contention.sharing_s)


def _of_stage(parts: Mapping[str, FloatArray], stage: int, step_time_s: float) -> dict[str, float]:
    """Mean over the ranks of a stage by category; what differences of sums leave by rounding is nothing."""
    means = {name: float(seconds[stage].mean()) for name, seconds in parts.items()}
    return {name: mean if abs(mean) > ROUNDING * step_time_s else 0.0 for name, mean in means.items()}


def _routing(loaded: LoadedScenario, expected: RoutingAnswer, sums: _Sums) -> RoutingAnswer:
    """Mean of the draws; of uniform loads what is expected, without the scatter of sampling."""
    moe = loaded.scenario.model.moe
    if moe is None or moe.router.imbalance.kind == "uniform":
        return expected
    return RoutingAnswer(expected.slots_per_expert, float(np.mean(sums.dropped)), float(np.mean(sums.max_over_mean)))


def _shares(exposed_s: Mapping[str, FloatArray], stage: int) -> FloatArray:
    """Shares of the step in which each rank of a stage computes, moves data and waits: (3, columns)."""
    parts = np.zeros((3, exposed_s["host"].shape[1]))
    for name, seconds in exposed_s.items():
        parts[1 if name in COMMUNICATION else 2 if name in WAITING else 0] += seconds[stage]
    shares = parts / parts.sum(axis=0)
    return np.where(np.abs(shares) > ROUNDING, shares, 0.0)


def _stage_fractions(exposed_s: Mapping[str, FloatArray], stage: int, ranks: int) -> StageFractions:
    shares = _shares(exposed_s, stage)
    busy, exposed, idle = shares.mean(axis=1).tolist()
    return StageFractions(busy, exposed, idle, stage, ranks, float(shares[0].min()))


def _recorded_ranks(
    step: PreparedStep, exposed_s: Mapping[str, FloatArray], ranks: Sequence[int], recording: Recording | None
) -> Iterator[RecordedRank]:
    columns = exposed_s["host"].shape[1]
    peaks = {} if recording is None else recording.memory.peaks()
    for rank, stage, place in zip(ranks, *(part.tolist() for part in step.ranks.place(ranks)), strict=True):
        busy, exposed, idle = _shares(exposed_s, stage)[:, place if columns > 1 else 0].tolist()
        alike = (rank,) if columns > 1 else tuple(step.ranks.global_ranks(stage).tolist())
        peak = round(peaks[rank]) if rank in peaks else None
        yield RecordedRank(busy, exposed, idle, rank, stage, alike, peak)


def _recording(world: UnevenSteps, timeline: Timeline, ranks: Sequence[int]) -> Recording:
    """Timeline of the first draw with the memory of its ranks at their loads."""
    step = world.step
    loads = drawn_loads(
        step.system,
        step.columns,
        step.sequence,
        steps=[0],
        seed=world.seed,
        directions=step.evaluation.plan.placed.directions,
    )
    return Recording(timeline, memory_timeline(timeline, loaded_contents(step, loads, ranks)))


def _warnings(timeline: Timeline | None, sums: _Sums, capacity: int) -> Iterator[AnswerWarning]:
    over = int(np.sum(np.array(sums.peak_bytes) > capacity))
    if over:
        text = f"the fullest rank needs more than is usable in {over} of {len(sums.peak_bytes)} draws"
        yield AnswerWarning("W-MEM-002", text)
    if timeline is not None and len(timeline) > MANY_EVENTS:
        text = f"{len(timeline):,} operations were recorded; viewers are slow above {MANY_EVENTS:,}: give fewer --ranks"
        yield AnswerWarning("W-TRC-001", text)
