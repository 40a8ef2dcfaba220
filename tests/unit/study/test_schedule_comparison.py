from __future__ import annotations

import math
from functools import lru_cache

import pytest
from random_scenarios import loaded, random_document, shipped_library

from moesim.describe.quantities import PRECISION_BYTES
from moesim.engine.analytical import evaluate
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.explanation import explain_step
from moesim.estimation.loading import LoadedScenario, load
from moesim.estimation.step_estimate import StepEstimate
from moesim.structure.memory_footprint import optimizer_bytes_per_parameter
from moesim.structure.pipeline_schedules import SCHEDULES
from moesim.study.schedule_comparison import ScheduleComparison, ScheduleRow, compare_schedules, with_schedule

ROUNDING = 1e-9


def shipped(name: str, *assignments: str) -> LoadedScenario:
    return load(name, assignments=assignments, library=shipped_library())


@lru_cache(maxsize=1)
def deepseek() -> ScheduleComparison:
    return compare_schedules(shipped("deepseek_v3", "parallelism.pipeline.schedule=one_f_one_b"))


def rows_of(comparison: ScheduleComparison) -> dict[str, ScheduleRow]:
    return {row.schedule: row for row in comparison.rows}


class TestDeepSeek:
    def test_every_schedule_has_a_row_and_the_scenarios_own_is_marked(self):
        assert [row.schedule for row in deepseek().rows] == list(SCHEDULES)
        assert [row.schedule for row in deepseek().rows if row.is_chosen] == ["one_f_one_b"]

    def test_a_schedule_that_is_not_legal_says_why_and_has_no_numbers(self):
        row = rows_of(deepseek())["interleaved_one_f_one_b"]
        assert not row.is_legal
        assert "(120)" in row.reasons[0]
        assert "multiples of the stages (16)" in row.reasons[0]
        assert row.step_time_s is row.peak_memory_bytes is row.fits is None

    def test_a_row_is_the_estimate_of_the_scenario_with_that_schedule(self):
        answer = estimate_loaded(
            shipped("deepseek_v3", "parallelism.pipeline.schedule=zb_v", "parallelism.pipeline.virtual_stages=2")
        )
        row = rows_of(deepseek())["zb_v"]
        assert row.step_time_s == answer.step_time_s
        assert row.bubble_fraction == answer.pipeline.bubble_fraction
        assert row.peak_memory_bytes == answer.memory.peak
        assert row.fits == answer.fits

    def test_less_bubble_costs_memory_as_the_papers_say(self):
        even = ("model.vocab_size=1024", "model.mtp_layers=0", "model.layers=[{count: 64, ffn: moe}]")
        rows = rows_of(compare_schedules(shipped("deepseek_v3", *even)))
        bubble = {name: row.bubble_fraction for name, row in rows.items() if row.is_legal}
        memory = {name: row.peak_memory_bytes for name, row in rows_of(deepseek()).items() if row.is_legal}
        assert max(bubble["zb_v"], bubble["zb_h2"]) < bubble["zb_h1"] < bubble["one_f_one_b"]
        assert bubble["dualpipe"] < bubble["one_f_one_b"]
        assert memory["v_min"] < memory["v_half"] < memory["zb_v"] <= memory["zb_h1"] < memory["zb_h2"]
        assert memory["dualpipe_v"] < memory["dualpipe"] < memory["gpipe"]

    def test_the_dictionary_holds_what_the_rows_hold(self):
        entries = deepseek().to_json()["schedules"]
        assert [entry["schedule"] for entry in entries] == list(SCHEDULES)
        assert entries[0]["step_time_s"] == rows_of(deepseek())["gpipe"].step_time_s
        assert {entry["is_legal"] for entry in entries} == {True, False}


class TestMemory:
    def test_dualpipe_holds_the_model_twice(self):
        twice, once = (
            next(evaluate(*_system(shipped("mixtral_8x22b", f"parallelism.pipeline.schedule={name}"))))
            for name in ("dualpipe", "one_f_one_b")
        )
        for category in ("weights", "gradients", "optimizer"):
            both, one = getattr(twice.memory.states, category)[:, 0], getattr(once.memory.states, category)[:, 0]
            assert both.tolist() == pytest.approx((one + one[::-1]).tolist(), rel=1e-12)
        assert (twice.costs.optimizer_s > 1.9 * once.costs.optimizer_s).all()

    def test_mirrored_stages_exchange_the_gradients_they_keep(self):
        """ZeRO-1: what a device keeps, over one port; beside the reduction of both its chunks."""
        scenario = shipped("mixtral_8x22b", "parallelism.pipeline.schedule=dualpipe", "parallelism.zero_stage=1")
        (twice,) = evaluate(*_system(scenario))
        once = shipped("mixtral_8x22b", "parallelism.zero_stage=1")
        (single,) = evaluate(*_system(once))
        exchanged = (twice.costs.reduction_s - (single.costs.reduction_s + single.costs.reduction_s[::-1]))[:, 0]
        kept = twice.memory.states.optimizer[:, 0] / optimizer_bytes_per_parameter(scenario.scenario)
        rate = kept * PRECISION_BYTES[scenario.scenario.precision.reduction] / exchanged
        port = scenario.system.cluster.fabric.levels[-1].bandwidth_per_device.value
        assert (rate > 0.3 * port).all()
        assert (rate < port).all()

    def test_a_model_with_token_prediction_needs_one_embedding_per_end_that_has_both(self):
        """DeepSeek-V3 by 1F1B has a third copy, of the prediction module, on its last stage; DualPipe has it there."""
        twice, once = (
            next(evaluate(*_system(shipped("deepseek_v3", f"parallelism.pipeline.schedule={name}"))))
            for name in ("dualpipe", "one_f_one_b")
        )
        embedding = 129280 * 7168 * 2
        saved = 2 * once.memory.states.weights.sum() - twice.memory.states.weights.sum()
        assert saved == pytest.approx(2 * embedding, rel=1e-12)

    def test_the_first_stage_of_a_v_has_both_ends_of_the_model(self):
        loop = "parallelism.pipeline.schedule=interleaved_one_f_one_b"
        two, v = "parallelism.pipeline.virtual_stages=2", "parallelism.pipeline.schedule=zb_v"
        (looped,) = evaluate(*_system(shipped("mixtral_8x7b", loop, two)))
        (folded,) = evaluate(*_system(shipped("mixtral_8x7b", v, two)))
        embedding = 32000 * 4096 * 2
        excess = folded.memory.states.weights[0, 0] - folded.memory.states.weights[1, 0]
        assert excess == pytest.approx(2 * embedding, rel=1e-4)
        assert folded.memory.states.weights.sum() == pytest.approx(looped.memory.states.weights.sum(), rel=1e-12)


def _system(scenario: LoadedScenario):
    return scenario.system, scenario.columns


@lru_cache(maxsize=1)
def random_answers() -> list[tuple[LoadedScenario, StepEstimate]]:
    answers = []
    documents = [random_document(seed) for seed in range(35)]
    for document in documents:
        if document["workload"]["kind"] != "training" or document["parallelism"]["pipeline"]["stages"] == 1:
            continue
        scenario = loaded(document)
        for row in compare_schedules(scenario).rows:
            if row.is_legal and row.schedule in SCHEDULES[3:]:
                tried = with_schedule(scenario, row.schedule, row.virtual_stages)
                answers.append((tried, estimate_loaded(tried)))
    return answers


class TestRandomScenarios:
    """Every schedule that a random training scenario can run, under the laws that hold for all."""

    def test_every_schedule_is_among_them(self):
        assert {item.scenario.parallelism.pipeline.schedule for item, _ in random_answers()} == set(SCHEDULES[3:])

    def test_the_step_lies_between_its_bounds(self):
        for _, answer in random_answers():
            assert answer.lower_s <= answer.step_time_s * (1 + ROUNDING), answer.scenario
            assert answer.step_time_s <= answer.upper_s * (1 + ROUNDING), answer.scenario

    def test_exposed_parts_sum_to_the_step(self):
        for _, answer in random_answers():
            assert min(answer.exposed_s.values()) >= 0
            assert math.isclose(math.fsum(answer.exposed_s.values()), answer.step_time_s, rel_tol=ROUNDING)

    def test_the_pipeline_is_no_shorter_than_the_work_of_its_busiest_stage(self):
        for tried, answer in random_answers():
            (part,) = evaluate(tried.system, tried.columns)
            busy = max(answer.pipeline.stage_times_s) * float(tried.columns["num_micro_batches"][0])
            assert part.finish_s.max() >= busy * (1 - ROUNDING)

    def test_a_weight_gradient_takes_a_part_of_the_backward(self):
        for tried, _ in random_answers():
            (part,) = evaluate(tried.system, tried.columns)
            weight = part.times.chunk.weight_gradient_s
            assert (weight >= 0).all()
            assert (weight <= part.times.chunk.backward_s).all()
            assert weight.sum() > 0


def test_explained_seconds_of_dualpipe_are_those_of_the_mean_of_both_directions():
    scenario = shipped("mixtral_8x22b", "parallelism.pipeline.schedule=dualpipe")
    answer = estimate_loaded(scenario)
    expert = math.fsum(
        term.times * term.seconds_each for term in explain_step(scenario) if term.category == "expert_gemm"
    )
    assert expert == pytest.approx(answer.exposed_s["expert_gemm"], rel=1e-9)


@pytest.mark.parametrize("name", ["mixtral_8x22b", "qwen3_235b_a22b", "deepseek_v3"])
def test_the_part_that_runs_apart_is_the_weight_gradients_of_the_explained_terms(name):
    scenario = shipped(name)
    (part,) = evaluate(scenario.system, scenario.columns)
    case = int(part.pass_case[0])
    per_stage = part.plan.stage_sums(part.times.chunk.weight_gradient_s)[:, part.times.chunk_case[case]]
    micro_batches = float(scenario.columns["num_micro_batches"][0])
    terms = [term for term in explain_step(scenario) if term.phase == "weight_gradient"]
    explained = math.fsum(term.times * term.seconds_each for term in terms)
    assert explained == pytest.approx(micro_batches * per_stage[part.critical_stage[case]], rel=1e-9)


def test_a_micro_batch_of_a_v_is_sent_on_once_less_each_way_than_in_a_loop():
    """Two chunks on each of four stages: seven boundaries, of which a V turns inside the last stage at one."""
    loop, fold = (
        estimate_loaded(
            shipped(
                "mixtral_8x7b",
                f"parallelism.pipeline.schedule={schedule}",
                "parallelism.pipeline.virtual_stages=2",
            )
        ).hidden_s["pipeline_p2p"]
        for schedule in ("interleaved_one_f_one_b", "zb_v")
    )
    assert loop > 0
    assert fold == pytest.approx(loop * 6 / 7, rel=1e-9)
