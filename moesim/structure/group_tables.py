"""Columns of one group of scenarios that share everything but numeric fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesim.describe.scenario import Scenario
from moesim.structure.columns import (
    AUTO_DEGREE,
    COLUMN_OF_PATH,
    DROPLESS,
    RECOMPUTE_CODES,
    WHOLE_RANK_GROUP,
    Columns,
    IntArray,
)


def encode_value(path: str, value: Any) -> float:
    """A field's value as a column entry: codes for words, 0 for null and auto."""
    if value is None:
        return DROPLESS if path.endswith("capacity_factor") else WHOLE_RANK_GROUP
    if value == "auto":
        return float(AUTO_DEGREE)
    if isinstance(value, str):
        return float(RECOMPUTE_CODES[value])
    return float(value)


def scenario_values(scenario: Scenario) -> dict[str, float]:
    """Every column's value for one scenario."""
    workload, parallelism = scenario.workload, scenario.parallelism
    is_pair = scenario.model.architecture == "encoder_decoder"
    router = scenario.model.moe.router if scenario.model.moe else None
    target = workload.target_length if is_pair else workload.sequence_length
    fields: dict[str, Any] = {
        "devices": scenario.devices,
        "parallelism.data": parallelism.data,
        "parallelism.tensor": parallelism.tensor,
        "parallelism.sequence": parallelism.sequence,
        "parallelism.context": parallelism.context,
        "parallelism.pipeline.stages": parallelism.pipeline.stages,
        "parallelism.pipeline.virtual_stages": parallelism.pipeline.virtual_stages,
        "parallelism.expert": parallelism.expert,
        "parallelism.expert_tensor": parallelism.expert_tensor,
        "parallelism.zero_stage": parallelism.zero_stage,
        "parallelism.recompute": parallelism.recompute,
        "workload.sequences_per_micro_batch": workload.sequences_per_micro_batch,
        "workload.sequences_per_step": workload.sequences_per_step,
        "workload.source_length": workload.source_length if is_pair else 0,
        "workload.target_length": target or 0,
        "model.moe.router.capacity_factor": router.capacity_factor if router else None,
        "model.moe.router.group_tokens": router.group_tokens if router else None,
    }
    return {COLUMN_OF_PATH[path]: encode_value(path, value) for path, value in fields.items()}


def group_columns_table(
    scenario: Scenario, swept: Mapping[str, tuple[Sequence[float], IntArray]], n_rows: int
) -> Columns:
    """Columns of ``n_rows`` scenarios: the base's values, and swept columns in their place.

    ``swept`` maps column names to their values and the index of each row's value.
    """
    constants = {name: value for name, value in scenario_values(scenario).items() if name not in swept}
    return Columns.from_levels(n_rows, constants, swept)
