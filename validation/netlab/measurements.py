"""Run the cases on the emulated networks: probes, collectives, training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import FloatArray
from validation.netlab.cases import STEP_SHAPE, CollectiveCase, StepCase, arrivals
from validation.netlab.jobs import time_collective
from validation.netlab.moe_steps import time_compute, time_steps
from validation.netlab.probes import Probe, assert_rates
from validation.netlab.topologies import LabTopology, emulated
from validation.netlab.workers import Workers, workers

Progress = Callable[[str], None]
LATENCY_REPEATS = 41
COMPUTE_REPEATS = 5


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
    """Build each network once and measure every case on it.

    Parameters
    ----------
    collectives, steps : sequence
        Cases.
    repeats : int
        Of each; latencies are repeated more often.
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
            found.collectives.extend(measure_collective(group, case, repeats) for case in here)
            found.steps.extend(_measured_steps(group, steps_here, repeats))
    return found


def networks_of(collectives: Sequence[CollectiveCase], steps: Sequence[StepCase]) -> list[LabTopology]:
    """Networks in the order in which cases name them first."""
    named = [case.topology for case in collectives] + [case.topology for case in steps]
    return list(dict.fromkeys(named))


def measure_collective(group: Workers, case: CollectiveCase, repeats: int) -> MeasuredCollective:
    """Time one case from the common start."""
    arrival_s = arrivals(case, LATENCY_REPEATS if case.is_latency else repeats)
    seconds = group.slowest_s(
        time_collective,
        kind=case.kind,
        num_bytes=case.num_bytes,
        arrival_s=arrival_s,
        pair_bytes=case.pair_bytes() if case.preset else None,
    )
    return MeasuredCollective(case, seconds, arrival_s)


def _measured_steps(group: Workers, cases: Sequence[StepCase], repeats: int) -> Iterator[MeasuredStep]:
    for case in cases:
        tokens = case.tokens()
        compute_s = group.run(time_compute, tokens=tokens, shape=STEP_SHAPE, repeats=COMPUTE_REPEATS)[0]
        seconds = group.slowest_s(time_steps, tokens=tokens, shape=STEP_SHAPE, repeats=repeats)
        yield MeasuredStep(case, seconds, compute_s)
