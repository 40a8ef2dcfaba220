"""Run the cases on the emulated networks: probes, collectives, training steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import FloatArray
from validation.netlab.cases import STEP_SHAPE, CollectiveCase, StepCase, arrivals
from validation.netlab.jobs import time_collective
from validation.netlab.moe_steps import time_compute, time_step
from validation.netlab.probes import Probe, assert_rates
from validation.netlab.topologies import LabTopology, emulated
from validation.netlab.workers import Workers, workers

Progress = Callable[[str], None]
LATENCY_REPEATS = 6
"""Repetitions in each round of what is all latency."""


@dataclass(frozen=True)
class MeasuredCollective:
    """Seconds of the slowest rank, (n_repeats,), and when each rank called, (n_repeats, n_ranks)."""

    case: CollectiveCase
    seconds: FloatArray
    arrival_s: FloatArray

    @property
    def typical_s(self) -> float:
        """Median of the repetitions; of messages that are all latency the lower quartile, for others only add to it."""
        return float(np.quantile(self.seconds, 0.25 if self.case.is_latency else 0.5))


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of whole steps, slowest rank, (n_repeats,); compute measured alone, (n_ranks, n_segments)."""

    case: StepCase
    seconds: FloatArray
    compute_s: FloatArray

    @property
    def typical_s(self) -> float:
        """Median of the repetitions."""
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured in one run; probes by name of the network."""

    probes: dict[str, list[Probe]]
    collectives: list[MeasuredCollective]
    steps: list[MeasuredStep]


def measure_all(
    collectives: Sequence[CollectiveCase], steps: Sequence[StepCase], repeats: int, progress: Progress
) -> Measurements:
    """Build each network once and measure every case on it, round by round.

    A round measures each case once, so that whatever disturbs the machine for seconds disturbs one repetition of each.

    Parameters
    ----------
    collectives, steps : sequence
        Cases.
    repeats : int
        Rounds.
    progress : callable
        Told what is being measured.

    Returns
    -------
    Measurements
        In the order of the networks.

    Raises
    ------
    ScenarioError
        E-NET-004 if a network is not what it says, or a rank fails.
    """
    found = Measurements({}, [], [])
    for topology in networks_of(collectives, steps):
        here = [case for case in collectives if case.topology == topology]
        steps_here = [case for case in steps if case.topology == topology]
        progress(f"{topology.name}: {len(here)} collectives, {len(steps_here)} training steps")
        with emulated(topology) as hosts, workers(hosts) as group:
            found.probes[topology.name] = assert_rates(topology, group)
            rounds = [_round(group, here, steps_here, number, repeats) for number in range(repeats)]
        for index, case in enumerate(here):
            parts = [one.collectives[index] for one in rounds]
            seconds, arrival_s = (np.concatenate([getattr(part, of) for part in parts]) for of in PARTS)
            found.collectives.append(MeasuredCollective(case, seconds, arrival_s))
        for index, step in enumerate(steps_here):
            seconds = np.concatenate([one.steps[index].seconds for one in rounds])
            compute_s = np.median([one.steps[index].compute_s for one in rounds], axis=0)
            found.steps.append(MeasuredStep(step, seconds, compute_s))
    return found


PARTS = ("seconds", "arrival_s")


def _round(
    group: Workers, collectives: Sequence[CollectiveCase], steps: Sequence[StepCase], number: int, repeats: int
) -> Measurements:
    """Every case of a network once; the first round warms up."""
    is_first = number == 0
    return Measurements(
        {},
        [_measured_collective(group, case, number, repeats, warms_up=is_first) for case in collectives],
        [_measured_step(group, case, warms_up=is_first) for case in steps],
    )


def networks_of(collectives: Sequence[CollectiveCase], steps: Sequence[StepCase]) -> list[LabTopology]:
    """Networks in the order in which cases name them first."""
    named = [case.topology for case in collectives] + [case.topology for case in steps]
    return list(dict.fromkeys(named))


def _measured_collective(
    group: Workers, case: CollectiveCase, number: int, repeats: int, *, warms_up: bool
) -> MeasuredCollective:
    arrival_s = arrivals(case, repeats)[[number]]
    if case.is_latency:
        arrival_s = arrival_s.repeat(LATENCY_REPEATS, axis=0)
    seconds = group.slowest_s(
        time_collective,
        kind=case.kind,
        num_bytes=case.num_bytes,
        arrival_s=arrival_s,
        pair_bytes=case.pair_bytes() if case.preset else None,
        warms_up=warms_up,
    )
    return MeasuredCollective(case, seconds, arrival_s)


def _measured_step(group: Workers, case: StepCase, *, warms_up: bool) -> MeasuredStep:
    tokens = case.tokens()
    compute_s = group.run(time_compute, tokens=tokens, shape=STEP_SHAPE)[0]
    seconds = group.slowest_s(time_step, tokens=tokens, shape=STEP_SHAPE, warms_up=warms_up)
    return MeasuredStep(case, np.atleast_1d(seconds), compute_s)
