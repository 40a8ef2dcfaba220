"""Simulate the draws of a scenario, batch by batch, and sum them up; what is finished survives an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np

from moesim.engine.analytical import PlanEvaluation
from moesim.engine.event_driven import SimulatedRun
from moesim.engine.memory_timeline import memory_contents, memory_timeline
from moesim.estimation.estimate import PricedStep, analytical_step, step_answer
from moesim.estimation.loading import LoadedScenario
from moesim.estimation.simulated_step import (
    Agreement,
    Fractions,
    RecordedRank,
    Recording,
    SimulatedStep,
    StageFractions,
)
from moesim.estimation.step_estimate import AnswerWarning
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CATEGORIES

ENGINE = "event_driven"
COMMUNICATION: tuple[str, ...] = ("all_to_all", "tensor_parallel", "context_parallel", "data_parallel")
WAITING: tuple[str, ...] = ("host", "imbalance", "pipeline_bubble", "pipeline_p2p")
"""Categories in which a rank computes nothing and moves nothing in line; all others but communication are busy time."""
BATCH_S = 1.0
"""Draws are run in batches of about this long, so that progress shows and an interruption loses little."""
MANY_EVENTS = 2_000_000

Advance = Callable[[int, int], None]


@dataclass
class _Sums:
    """What the draws run so far add up to: step times, and seconds by category, (stages, columns) each."""

    step_times_s: list[float] = field(default_factory=list)
    exposed_s: dict[str, FloatArray] = field(default_factory=dict)
    hidden_s: dict[str, FloatArray] = field(default_factory=dict)

    def add(self, run: SimulatedRun) -> None:
        """Add the draws of a run."""
        self.step_times_s += run.step_time_s.tolist()
        for totals, parts in ((self.exposed_s, run.exposed_s), (self.hidden_s, run.hidden_s)):
            for name, seconds in parts.items():
                totals[name] = totals.get(name, np.zeros(1)) + seconds.sum(axis=0)

    def means(self, parts: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Mean over draws by category, (stages, columns)."""
        return {name: parts[name] / len(self.step_times_s) for name in CATEGORIES if name in parts}
