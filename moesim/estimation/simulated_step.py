"""The answer of the event-driven engine: an estimate's keys, quantiles over draws, and what ranks do meanwhile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moesim.engine.memory_timeline import MemoryTimeline
from moesim.engine.timelines import Timeline
from moesim.engine.uneven_world import LossAttribution, quantiles_s
from moesim.estimation.step_contention import Contention
from moesim.estimation.step_estimate import StepEstimate
from moesim.structure.columns import FloatArray
from moesim.structure.placement import rank_ranges


@dataclass(frozen=True)
class Fractions:
    """Shares of a step: computing, communication in line, and waiting for passes, other ranks or the host; sum 1."""

    busy_fraction: float
    exposed_fraction: float
    idle_fraction: float


@dataclass(frozen=True)
class StageFractions(Fractions):
    """Mean shares of the ranks of a stage over ranks and draws, and of its least busy rank."""

    stage: int
    ranks: int
    least_busy_fraction: float


@dataclass(frozen=True)
class RecordedRank(Fractions):
    """Mean shares of a rank over draws, the ranks it stands for, and most bytes in the first draw."""

    rank: int
    stage: int
    stands_for: tuple[int, ...]
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Agreement:
    """The load that ``estimate`` prices by both engines: step times, and their difference over the analytical one."""

    analytical_s: float
    event_driven_s: float
    relative_difference: float


@dataclass(frozen=True)
class Recording:
    """What was recorded of the first draw."""

    timeline: Timeline
    memory: MemoryTimeline


@dataclass(frozen=True)
class SimulatedStep:
    """Answer of a simulation; ``to_json`` gives the pinned keys.

    Attributes
    ----------
    estimate : StepEstimate
        The answer at the mean of the draws; its parts are those of the critical stage, the mean over ranks and draws.
    draws_asked, seed : int
        What was asked for; fewer draws are there where the run was interrupted.
    step_times_s : ndarray of shape (n_draws,)
        Step time of each draw.
    peak_memory_bytes : ndarray of shape (n_draws,)
        Most bytes on any rank at the loads of each draw.
    losses : LossAttribution
        What the mean step is lost to.
    stages : tuple of StageFractions
        What the ranks of each stage do.
    ranks : tuple of RecordedRank
        What the ranks asked for do.
    agreement : Agreement
        Of both engines where nothing is drawn.
    recording : Recording or None
        Timeline and memory of those ranks, where asked for; collectives have links of their own there.
    contention : Contention or None
        What collectives lose that share links, where asked for. It is in all times above but the agreement.
    """

    estimate: StepEstimate
    draws_asked: int
    seed: int
    step_times_s: FloatArray
    peak_memory_bytes: FloatArray
    losses: LossAttribution
    stages: tuple[StageFractions, ...]
    ranks: tuple[RecordedRank, ...]
    agreement: Agreement
    recording: Recording | None = None
    contention: Contention | None = None

    @property
    def draws(self) -> int:
        """Draws that were finished."""
        return len(self.step_times_s)

    @property
    def is_interrupted(self) -> bool:
        """Whether draws are missing."""
        return self.draws < self.draws_asked

    @property
    def recorded_step_time_s(self) -> float:
        """Step time of the first draw as it is recorded, with links of their own for all collectives."""
        return float(self.step_times_s[0]) - (0.0 if self.contention is None else self.contention.contention_s)

    @property
    def quantiles_s(self) -> dict[str, float]:
        """Quantiles of the step time over draws."""
        return quantiles_s(self.step_times_s)

    @property
    def peak_memory_quantiles_bytes(self) -> dict[str, int]:
        """Quantiles over draws of the memory of the fullest rank."""
        return {name: round(value) for name, value in quantiles_s(self.peak_memory_bytes).items()}

    def to_json(self) -> dict[str, Any]:
        """The answer with the keys of ``estimate`` and those of draws and ranks, ready for ``json.dumps``."""
        contention = {} if self.contention is None else {"contention": self.contention.to_json()}
        return {
            **self.estimate.to_json(),
            "quantiles_s": self.quantiles_s,
            "draws": self.draws,
            "draws_asked": self.draws_asked,
            "seed": self.seed,
            "peak_memory_bytes": self.peak_memory_quantiles_bytes,
            "losses_s": {name.removesuffix("_s"): value for name, value in asdict(self.losses).items()},
            "agreement": asdict(self.agreement),
            "stages": [asdict(stage) for stage in self.stages],
            "ranks": [_rank_json(rank) for rank in self.ranks],
            **contention,
        }


def _rank_json(rank: RecordedRank) -> dict[str, Any]:
    return {**asdict(rank), "stands_for": rank_ranges(rank.stands_for)}
