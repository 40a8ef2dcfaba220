"""Bytes of drawn loads against the memory model asked for the same load on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from random_scenarios import loaded, random_document, shipped_library

from moesim.estimation.loading import LoadedScenario, load
from moesim.structure.activations_in_flight import held_at_once
from moesim.structure.columns import FloatArray
from moesim.structure.layers import LayerSequence, StagePlan, layer_sequence, stage_plan
from moesim.structure.loaded_memory import LoadedBytes, loaded_bytes, loaded_peaks
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import chunk_activations, stage_parameters, working_bytes
from moesim.structure.pipeline_schedules import micro_batches_in_flight

TRIED = range(400)


def dropless(seed: int) -> LoadedScenario | None:
    """Scenario of a seed with its capacity taken away, if it has experts and every stage has layers."""
    document = random_document(seed)
    if "moe" not in document["model"] or document["model"]["moe"] is None:
        return None
    document["model"]["moe"]["router"] |= {"capacity_factor": None, "imbalance": {"kind": "uniform"}}
    scenario = loaded(document)
    return scenario if min(plan_of(scenario)[1].counts.sum(axis=0)) > 0 else None


def plan_of(scenario: LoadedScenario) -> tuple[LayerSequence, StagePlan]:
    sequence, columns = layer_sequence(scenario.scenario.model), scenario.columns
    given = scenario.scenario.parallelism.pipeline.layers_per_stage
    stages, virtual = int(columns["stages"][0]), int(columns["virtual_stages"][0])
    return sequence, stage_plan(sequence, stages, virtual, tuple(given) if given else None)


def layers_of(sequence: LayerSequence, plan: StagePlan, stage: int) -> list[int]:
    ends = np.cumsum(plan.counts.sum(axis=0)).astype(int)
    starts = np.concatenate([[0], ends[:-1]])
    numbers = [n for chunk in range(stage, len(ends), plan.stages) for n in range(starts[chunk], ends[chunk])]
    is_last = stage == plan.stages - 1
    return numbers + [len(sequence.order) + index for index in range(sequence.mtp_layers * is_last)]


def added(scenario: LoadedScenario, stage: int, factors: dict[int, FloatArray]) -> LoadedBytes:
    sequence, plan = plan_of(scenario)
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    schedule = scenario.scenario.parallelism.pipeline.schedule
    counts = scenario.columns["num_micro_batches"]
    flight = micro_batches_in_flight(schedule, plan.stages, plan.virtual_stages, counts)[:, 0].tolist()
    losses = flight[-1] if schedule == "gpipe" else 1.0
    layers = [(number, factors.get(number, np.ones((1, 1)))) for number in layers_of(sequence, plan, stage)]
    return loaded_bytes(context, sequence, layers, flight[stage], losses)


def peaks(scenario: LoadedScenario, stage: int, factors: dict[int, FloatArray]) -> FloatArray:
    """Activations of a stage's ranks at their largest, and what loads add to buffers."""
    sequence, plan = plan_of(scenario)
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    schedule = scenario.scenario.parallelism.pipeline.schedule
    count = round(float(scenario.columns["num_micro_batches"][0]))
    chunks = chunk_activations(context, sequence, plan, lambda degrees: np.ones(degrees.shape))
    ends = np.concatenate([[0], np.cumsum(plan.counts.sum(axis=0)).astype(int)])
    held = plan.placed.held[stage].tolist()
    layers = [list(range(ends[chunk], ends[chunk + 1])) for chunk in held]
    for numbers, chunk in zip(layers, held, strict=True):
        if chunk == plan.placed.chunks - 1:
            numbers += [len(sequence.order) + index for index in range(sequence.mtp_layers)]
    loads = [[(number, factors.get(number, np.ones((1, 1)))) for number in numbers] for numbers in layers]
    moments = held_at_once(schedule, plan.stages, plan.virtual_stages, count)[stage]
    at_mean, always = (chunks.kept[held, 0], float(chunks.loss[0])), float(chunks.rebuilt[0])
    if not context.is_training:  # nothing adds up: the largest layer's activations, whatever is in flight
        moments, always = moments * 0.0, float(of_model(scenario, 1.0)[0][stage])
    return loaded_peaks(context, sequence, loads, moments, at_mean) + always


def of_model(scenario: LoadedScenario, load: float) -> tuple[FloatArray, FloatArray]:
    sequence, plan = plan_of(scenario)
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    parameters = stage_parameters(scenario.scenario, sequence, plan)
    bytes_ = working_bytes(context, sequence, plan, parameters, lambda degrees: np.full(degrees.shape, load))
    return bytes_.activations[:, 0], bytes_.buffers[:, 0]


CASES = [seed for seed in TRIED if dropless(seed) is not None][:60]


@pytest.mark.parametrize("seed", CASES)
def test_the_same_load_on_all_layers_adds_what_the_memory_model_says(seed: int) -> None:
    """Where a stage has all kinds of layers; the model takes the largest kind even on stages that lack it."""
    scenario = dropless(seed)
    assert scenario is not None
    sequence, plan = plan_of(scenario)
    mean, loaded_at = of_model(scenario, 1.0), of_model(scenario, 2.5)
    factor = np.full((3, 2), 2.5)
    for stage in range(plan.stages):
        numbers = layers_of(sequence, plan, stage)
        assert (added(scenario, stage, {}).total == 0).all()
        assert peaks(scenario, stage, {}) == pytest.approx(mean[0][stage], rel=1e-12)
        if (plan.stage_counts()[:, stage] > 0).all():
            buffers = loaded_at[1][stage] - mean[1][stage]
            found = peaks(scenario, stage, dict.fromkeys(numbers, factor))
            assert found.shape == factor.shape
            assert found == pytest.approx(loaded_at[0][stage] + buffers, rel=1e-9)
            assert added(scenario, stage, dict.fromkeys(numbers, factor)).buffers == pytest.approx(buffers, rel=1e-9)


def test_there_are_cases_of_every_recompute_policy() -> None:
    policies = {random_document(seed)["parallelism"]["recompute"] for seed in CASES}
    assert policies == {"none", "selective", "full"}
    assert len(CASES) == 60


def test_each_rank_and_draw_adds_the_bytes_of_its_own_layers() -> None:
    """One layer's load on one rank in one draw, and twice the excess on another: twice the bytes, and no others."""
    scenario = load("mixtral_8x7b", library=shipped_library())
    layer = layers_of(*plan_of(scenario), 0)[3]
    factor = np.ones((2, 3))
    factor[0, 1], factor[1, 2] = 1.5, 2.0
    found = added(scenario, 0, {layer: factor}).activations
    assert found[0, 1] > 0
    assert found[1, 2] == pytest.approx(2 * found[0, 1])
    assert np.count_nonzero(found) == 2
