"""Memory over time against the memory model: the same bytes, counted in flight instead of by formula."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from pipeline_timelines import pipeline_timeline
from random_scenarios import loaded, random_document

from moesim.describe.hardware_library import HardwareLibrary
from moesim.engine.analytical import PlanEvaluation, evaluate
from moesim.engine.memory_timeline import STATES, MemoryContents, MemoryTimeline, memory_timeline, stage_contents
from moesim.engine.timelines import concatenated
from moesim.estimation.loading import LoadedScenario, load
from moesim.resources import shipped_scenarios
from moesim.structure.chunk_placement import FOLDED_SCHEDULES
from moesim.structure.columns import FloatArray
from moesim.structure.memory_footprint import CATEGORIES

SHIPPED = [path.stem for path in shipped_scenarios()]


@lru_cache(maxsize=64)
def loaded_scenario(name: str, *assignments: str) -> LoadedScenario:
    return load(name, assignments=assignments, library=HardwareLibrary())


def followed(loaded: LoadedScenario) -> tuple[PlanEvaluation, tuple[MemoryContents, ...], MemoryTimeline]:
    """Evaluation, contents and memory of every stage of a training step."""
    (evaluation,) = evaluate(loaded.system, loaded.columns)
    times, case = evaluation.times, int(evaluation.pass_case[0])
    timeline = pipeline_timeline(
        loaded.scenario.parallelism.pipeline.schedule,
        evaluation.plan.virtual_stages,
        int(loaded.columns["num_micro_batches"][0]),
        times.forward_s[:, case],
        times.backward_s[:, case],
        float(times.exposed_hop_s[case]),
        times.chunk.weight_gradient_s[:, int(times.chunk_case[case])],
    )
    contents = stage_contents(loaded.system, loaded.columns, evaluation)
    return evaluation, contents, memory_timeline(timeline, dict(enumerate(contents)))


def modelled_peaks(evaluation: PlanEvaluation) -> FloatArray:
    """Peak of every stage by the memory model."""
    memory = evaluation.memory
    state, work = int(memory.state_case[0]), int(memory.work_case[0])
    allocated = sum(getattr(memory.states, name)[:, state] for name in ("weights", "gradients", "optimizer"))
    allocated = allocated + memory.work.activations[:, work] + memory.work.buffers[:, work]
    return np.asarray(memory.fixed + allocated * (1 + memory.fragmentation_fraction))


@pytest.mark.parametrize("name", SHIPPED)
def test_peaks_agree_with_the_memory_model_on_every_stage(name: str) -> None:
    loaded = loaded_scenario(name)
    assert loaded.scenario.workload.kind == "training"
    evaluation, _, memory = followed(loaded)
    np.testing.assert_allclose(list(memory.peaks().values()), modelled_peaks(evaluation), rtol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
def test_recompute_and_gpipe_agree_too(recompute: str, schedule: str) -> None:
    pipeline = f"parallelism.pipeline={{stages: 4, virtual_stages: 1, schedule: {schedule}}}"
    loaded = loaded_scenario("mixtral_8x7b", pipeline, f"parallelism.recompute={recompute}")
    evaluation, contents, memory = followed(loaded)
    assert (contents[0].rebuilt > 0) == (recompute == "full")
    np.testing.assert_allclose(list(memory.peaks().values()), modelled_peaks(evaluation), rtol=1e-12)


@pytest.mark.parametrize("schedule", ["zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe", "dualpipe_v"])
def test_schedules_with_weight_gradients_apart_agree_too(schedule: str) -> None:
    """Four stages of eight layers: chunks are alike, so the counts in flight say it all."""
    virtual = 2 if schedule in FOLDED_SCHEDULES else 1
    pipeline = f"parallelism.pipeline={{stages: 4, virtual_stages: {virtual}, schedule: {schedule}}}"
    loaded = loaded_scenario("mixtral_8x7b", pipeline, "workload.sequences_per_step=256")
    evaluation, _, memory = followed(loaded)
    np.testing.assert_allclose(list(memory.peaks().values()), modelled_peaks(evaluation), rtol=1e-12)


UNEVEN = [
    ("interleaved_one_f_one_b", 4, 3),
    ("interleaved_one_f_one_b", 2, 5),
    ("zb_v", 3, 2),
    ("v_half", 3, 2),
    ("v_min", 3, 2),
    ("dualpipe", 6, 1),
    ("dualpipe_v", 3, 2),
]


@pytest.mark.parametrize(("schedule", "stages", "virtual"), UNEVEN)
@pytest.mark.parametrize("micro_batches", [12, 36, 120])
def test_uneven_chunks_are_counted_one_by_one(schedule: str, stages: int, virtual: int, micro_batches: int) -> None:
    """Layers that chunks do not divide: the model counts those of each chunk, not their mean."""
    pipeline = f"parallelism.pipeline={{stages: {stages}, virtual_stages: {virtual}, schedule: {schedule}}}"
    layers = "model.layers=[{count: 31, ffn: moe}]"
    devices = f"devices={8 * stages}"
    tried = loaded_scenario("mixtral_8x7b", pipeline, layers, devices, "parallelism.data=auto")
    sequences = int(tried.columns["data"][0] * tried.columns["micro_batch"][0]) * micro_batches
    step = f"workload.sequences_per_step={sequences}"
    chunked = loaded_scenario("mixtral_8x7b", pipeline, layers, devices, "parallelism.data=auto", step)
    evaluation, contents, memory = followed(chunked)
    assert len(np.unique(contents[0].kept[1:-1])) >= 2
    np.testing.assert_allclose(list(memory.peaks().values()), modelled_peaks(evaluation), rtol=1e-12)


def test_random_interleaved_steps_hold_what_the_model_says() -> None:
    compared = 0
    for seed in range(120):
        scenario = loaded(random_document(seed))
        evaluation = next(iter(evaluate(scenario.system, scenario.columns)))
        if evaluation.plan.placed.held.shape[1] < 2 or scenario.scenario.workload.kind != "training":
            continue
        if scenario.columns["num_micro_batches"][0] > 64:
            continue
        found, _, memory = followed(scenario)
        np.testing.assert_allclose(list(memory.peaks().values()), modelled_peaks(found), rtol=1e-12, err_msg=str(seed))
        compared += 1
    assert compared > 10


def test_one_f_one_b_by_hand() -> None:
    """Two stages, three micro-batches: F0 F1 B0 F2 B1 B2 on the first stage holds 1 2 1 2 1 0 micro-batches."""
    contents = replace(contents_of_ones(), buffers=0.0, kept=np.array([10.0, 5.0]), loss=2.0, fixed=1.0)
    contents = replace(contents, fragmentation_fraction=0.1)
    weights = replace(contents, states={"weights": 100.0, "gradients": 0.0, "optimizer": 0.0})
    timeline = pipeline_timeline("one_f_one_b", 1, 3, np.ones(2), np.full(2, 2.0), 0.0)
    memory = memory_timeline(timeline, {0: weights, 1: contents})
    first, second = memory.of_rank(0), memory.of_rank(1)
    assert first.parts["activations"].tolist() == [0, 10, 20, 10, 20, 10, 0]
    assert second.parts["activations"].max() == 7
    assert second.parts["activations"][-1] == 0
    assert first.time_s.tolist() == [0, 0, 1, 6, 6, 9, 12]
    assert first.total.tolist() == pytest.approx([1 + 1.1 * (100 + held) for held in first.parts["activations"]])


def test_what_a_split_backward_pass_keeps_ends_with_its_weight_gradient() -> None:
    whole = pipeline_timeline("gpipe", 1, 1, np.ones(1), np.full(1, 2.0), 0.0)
    middle = 0.5 * (whole.start_s + whole.end_s)
    backward = whole.phase == 1
    activation_part = whole.take(backward)
    halves = (
        whole.take(~backward),
        replace(activation_part, end_s=middle[backward]),
        replace(activation_part, start_s=middle[backward], phase=np.full_like(activation_part.phase, 2)),
    )
    contents = replace(contents_of_ones(), kept=np.array([8.0]), loss=2.0, rebuilt=3.0)
    split = memory_timeline(concatenated(halves), {0: contents})
    assert split.time_s.tolist() == [0, 0, 1, 2, 3]
    assert split.parts["activations"].tolist() == [0, 10, 13, 8, 0]


def contents_of_ones() -> MemoryContents:
    return MemoryContents(dict.fromkeys(STATES, 1.0), 1.0, np.ones(1), 0.0, 0.0, 0.0, 0.0, 0.0)


def test_inference_holds_what_the_model_says_all_the_time() -> None:
    assignments = ("workload.kind=prefill", "parallelism.pipeline.schedule=one_f_one_b")
    loaded = loaded_scenario("mixtral_8x7b", *assignments, "parallelism.pipeline.virtual_stages=1")
    (evaluation,) = evaluate(loaded.system, loaded.columns)
    contents = stage_contents(loaded.system, loaded.columns, evaluation)
    stages = evaluation.plan.stages
    timeline = pipeline_timeline("gpipe", 1, 2, np.ones(stages), np.ones(stages), 0.0)
    forward = timeline.take(timeline.phase == 0)
    memory = memory_timeline(forward, dict(enumerate(contents)))
    for stage, peak in enumerate(modelled_peaks(evaluation)):
        np.testing.assert_allclose(memory.of_rank(stage).total, peak, rtol=1e-12)


def test_parts_have_the_categories_of_the_memory_model() -> None:
    _, _, memory = followed(loaded_scenario("m6t_1t_v100x480"))
    assert tuple(memory.parts) == CATEGORIES
    np.testing.assert_allclose(memory.total, sum(memory.parts.values()))
