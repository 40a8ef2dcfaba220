"""One scenario under every pipeline schedule: which are legal, how long a step takes and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from moesim.describe.consistency import inconsistencies
from moesim.describe.scenario import PipelineParallelism, Scenario
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario
from moesim.structure.chunk_placement import FOLDED_SCHEDULES
from moesim.structure.group_tables import group_columns_table
from moesim.structure.legality import legality_rules, resolve_columns
from moesim.structure.pipeline_schedules import SCHEDULES, micro_batches_in_flight


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule of a comparison.

    Attributes
    ----------
    schedule : str
        Its name.
    virtual_stages : int
        Chunks per stage it was tried with: 2 in a V; for interleaving the scenario's own, or 2; else 1.
    is_chosen : bool
        Whether it is the scenario's own.
    reasons : tuple of str
        Why it is not legal here, with what to do; empty if it is. The numbers below are None then.
    step_time_s, bubble_fraction : float or None
        As ``estimate`` gives them.
    peak_in_flight : float or None
        Most micro-batches whose activations a stage holds at once.
    peak_memory_bytes : int or None
        On the fullest device.
    fits : bool or None
        Whether that is usable memory.
    """

    schedule: str
    virtual_stages: int
    is_chosen: bool
    reasons: tuple[str, ...]
    step_time_s: float | None = None
    bubble_fraction: float | None = None
    peak_in_flight: float | None = None
    peak_memory_bytes: int | None = None
    fits: bool | None = None

    @property
    def is_legal(self) -> bool:
        """Whether the scenario can run it."""
        return not self.reasons


@dataclass(frozen=True)
class ScheduleComparison:
    """All schedules for one scenario, in the order of ``pipeline_schedules.SCHEDULES``."""

    scenario: str
    rows: tuple[ScheduleRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as a dictionary."""
        return {"scenario": self.scenario, "schedules": [asdict(row) | {"is_legal": row.is_legal} for row in self.rows]}


def compare_schedules(loaded: LoadedScenario) -> ScheduleComparison:
    """Estimate a scenario under every pipeline schedule.

    Parameters
    ----------
    loaded : LoadedScenario
        A legal scenario; all but its schedule and chunks per stage is kept, the network too.

    Returns
    -------
    ScheduleComparison
        One row per schedule, legal or not.
    """
    return ScheduleComparison(loaded.scenario.name, tuple(_row(loaded, schedule) for schedule in SCHEDULES))


def with_schedule(loaded: LoadedScenario, schedule: str, virtual_stages: int) -> LoadedScenario:
    """The scenario with another schedule, unchecked."""
    parallelism = loaded.scenario.parallelism
    chosen = {"schedule": schedule, "virtual_stages": virtual_stages}
    pipeline: PipelineParallelism = parallelism.pipeline.model_copy(update=chosen)
    changed: Scenario = loaded.scenario.model_copy(
        update={"parallelism": parallelism.model_copy(update={"pipeline": pipeline})}
    )
    columns = resolve_columns(group_columns_table(changed, {}, 1))
    return replace(loaded, scenario=changed, system=replace(loaded.system, scenario=changed), columns=columns)


def _row(loaded: LoadedScenario, schedule: str) -> ScheduleRow:
    own = loaded.scenario.parallelism.pipeline
    virtual_stages = 1
    if schedule in FOLDED_SCHEDULES:
        virtual_stages = 2
    elif schedule == own.schedule:
        virtual_stages = own.virtual_stages
    elif schedule == "interleaved_one_f_one_b":
        virtual_stages = max(own.virtual_stages, 2)
    tried = with_schedule(loaded, schedule, virtual_stages)
    row = ScheduleRow(schedule, virtual_stages, schedule == own.schedule, tuple(_reasons(tried)))
    if not row.is_legal:
        return row
    answer = estimate_loaded(tried)
    stages = own.stages
    in_flight = micro_batches_in_flight(schedule, stages, virtual_stages, tried.columns["num_micro_batches"])
    return replace(
        row,
        step_time_s=answer.step_time_s,
        bubble_fraction=answer.pipeline.bubble_fraction,
        peak_in_flight=float(in_flight.max()),
        peak_memory_bytes=answer.memory.peak,
        fits=answer.fits,
    )


def _reasons(tried: LoadedScenario) -> Iterator[str]:
    for found in inconsistencies(tried.scenario):
        yield f"{found.message}; {found.remedy}"
    for rule in legality_rules(tried.scenario, tried.system.cluster, tried.columns):
        if rule.breaks[0]:
            texts = (rule.text(template, tried.columns, 0) for template in (rule.message, rule.remedy))
            yield "; ".join(texts)
