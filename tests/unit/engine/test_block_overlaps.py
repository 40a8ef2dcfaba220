"""MoE blocks of whole steps under explicit overlap: the same laws whatever the scenario."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
from random_scenarios import loaded, random_document, shipped_library, with_fields

from moesim.describe.hardware import CommunicationKernels
from moesim.engine.contended_steps import contended_step
from moesim.engine.event_driven import simulate_step
from moesim.errors import ScenarioError
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.estimation.step_estimate import StepEstimate

SHIPPED = ("deepseek_v3", "mixtral_8x7b", "m6t_1t_v100x480", "switch_base", "qwen3_30b_a3b")
LIGHT_HEAD = "model.vocab_size=1024"
"""Leaves the slowest stage to the layers: in 16 bits, the head of DeepSeek-V3 outweighs them."""
MOE = [seed for seed in range(40) if random_document(seed)["model"].get("moe")]


@lru_cache
def answer(name: str, *overlap: str) -> StepEstimate:
    return estimate_loaded(load(name, assignments=list(overlap), library=shipped_library()))


def random_answer(seed: int, **overlap: object) -> StepEstimate:
    return estimate_loaded(loaded(with_fields(random_document(seed), {"overlap": overlap})))


def has_two_micro_batches(seed: int) -> bool:
    return bool(loaded(random_document(seed)).columns["num_micro_batches"][0] >= 2)


def is_small(scenario: LoadedScenario) -> bool:
    """Few passes, so that it is run quickly one by one."""
    columns = scenario.columns
    return bool(columns["num_micro_batches"][0] * columns["stages"][0] * columns["virtual_stages"][0] < 60)


def without_kernels(scenario: LoadedScenario) -> LoadedScenario:
    """The same where communication kernels take no compute units."""
    stack = scenario.system.stack.model_copy(update={"communication_kernels": CommunicationKernels()})
    return replace(scenario, system=replace(scenario.system, stack=stack))


@pytest.mark.parametrize("name", SHIPPED)
def test_one_chunk_is_a_stack_that_hides_no_all_to_all(name):
    exposed = answer(name, "stack_options.overlaps_expert_communication=false")
    one = answer(name, "overlap.expert_chunks=1")
    assert one.step_time_s == pytest.approx(exposed.step_time_s, rel=1e-9)
    for category, parts in one.to_json()["breakdown_s"].items():
        assert parts["exposed"] == pytest.approx(exposed.to_json()["breakdown_s"][category]["exposed"], rel=1e-6)


@pytest.mark.slow
def test_one_chunk_is_a_stack_that_hides_nothing_in_random_scenarios():
    for seed in MOE:
        plain = with_fields(random_document(seed), {"stack_options": {"overlaps_expert_communication": False}})
        exposed = estimate_loaded(loaded(plain))
        assert random_answer(seed, expert_chunks=1).step_time_s == pytest.approx(exposed.step_time_s, rel=1e-9), seed


@pytest.mark.slow
def test_parts_of_random_scenarios_sum_to_the_step_and_none_beats_the_lower_bound():
    cases = [(seed, {"expert_chunks": "auto"}) for seed in MOE]
    cases += [(seed, {"two_micro_batches": True}) for seed in MOE if has_two_micro_batches(seed)]
    assert len(cases) > 50
    for seed, overlap in cases:
        found = random_answer(seed, **overlap)
        parts = found.to_json()["breakdown_s"]
        assert sum(part["exposed"] for part in parts.values()) == pytest.approx(found.step_time_s, rel=1e-9), seed
        assert found.lower_s <= found.step_time_s * (1 + 1e-9), seed
        assert all(part["hidden"] >= 0 and part["exposed"] >= 0 for part in parts.values()), seed


@pytest.mark.parametrize("name", SHIPPED)
def test_auto_is_at_least_as_fast_as_any_degree(name):
    auto = answer(name, "overlap.expert_chunks=auto").step_time_s
    degrees = [answer(name, f"overlap.expert_chunks={degree}").step_time_s for degree in (1, 2, 4, 8)]
    assert auto <= min(degrees) * (1 + 1e-9)
    assert auto < max(degrees)


def test_two_micro_batches_hide_most_of_the_exchanges_of_deepseek_v3():
    """As its report says: nearly all of it, beside 20 of 132 SMs."""
    parts = answer("deepseek_v3", "overlap.two_micro_batches=true", "overlap.shared_experts=true")
    exchanges = parts.to_json()["breakdown_s"]["all_to_all"]
    assert exchanges["hidden"] > 10 * exchanges["exposed"]
    assert parts.step_time_s < answer("deepseek_v3", "overlap.expert_chunks=1").step_time_s


def test_kernels_that_take_no_compute_units_slow_nothing():
    overlapped = "overlap.two_micro_batches=true"
    scenario = load("deepseek_v3", assignments=[LIGHT_HEAD, overlapped], library=shipped_library())
    free, slowed = estimate_loaded(without_kernels(scenario)), answer("deepseek_v3", LIGHT_HEAD, overlapped)
    gemm = [found.to_json()["breakdown_s"]["expert_gemm"]["exposed"] for found in (free, slowed)]
    plain = answer("deepseek_v3", LIGHT_HEAD).to_json()["breakdown_s"]["expert_gemm"]["exposed"]
    assert gemm[0] == pytest.approx(plain, rel=1e-9)
    assert plain * 1.05 < gemm[1] < plain / (1 - 20 / 132)
    assert free.step_time_s < slowed.step_time_s


@pytest.mark.parametrize(
    ("name", "assignments", "field"),
    [
        ("mixtral_8x7b", ["overlap.shared_experts=true"], "overlap.shared_experts"),
        ("t5_base", ["overlap.expert_chunks=2"], "overlap.expert_chunks"),
        ("deepseek_v3", ["overlap.expert_chunks=2", "overlap.two_micro_batches=true"], "overlap.expert_chunks"),
        (
            "deepseek_v3",
            ["overlap.expert_chunks=2", "stack_options.overlaps_expert_communication=true"],
            "stack_options.overlaps_expert_communication",
        ),
        ("deepseek_v3", ["workload.kind=prefill", "overlap.gradient_bucket=25 MB"], "overlap.gradient_bucket"),
        ("m6t_1t_v100x480", ["overlap.two_micro_batches=true"], "overlap.two_micro_batches"),
        ("mixtral_8x7b", ["overlap.prefetch=true"], "overlap.prefetch"),
        ("deepseek_v3", ["overlap.expert_chunks=0"], "overlap.expert_chunks"),
        ("deepseek_v3", ["overlap.gradient_bucket=25"], "overlap.gradient_bucket"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_field(name, assignments, field):
    with pytest.raises(ScenarioError) as caught:
        load(name, assignments=assignments, library=shipped_library())
    assert field in [problem.field for problem in caught.value.problems]


@pytest.mark.slow
def test_both_engines_agree_under_explicit_overlap():
    seen = 0
    for seed in MOE[:12]:
        for overlap in ({"expert_chunks": "auto"}, {"expert_chunks": 3}, {"two_micro_batches": True}):
            if "two_micro_batches" in overlap and not has_two_micro_batches(seed):
                continue
            scenario = loaded(with_fields(random_document(seed), {"overlap": overlap}))
            if not is_small(scenario):
                continue
            run = simulate_step(scenario.system, scenario.columns)
            assert float(run.step_time_s[0]) == pytest.approx(estimate_loaded(scenario).step_time_s, rel=1e-9), seed
            seen += 1
    assert seen > 12


def achieved(scenario: LoadedScenario, data_parallel: float) -> LoadedScenario:
    """The same under a stack that hides another share of the gradients' reduction and of ZeRO's collectives."""
    stack = scenario.system.stack
    overlap = stack.overlap.model_copy(update={"data_parallel": data_parallel})
    return replace(scenario, system=replace(scenario.system, stack=stack.model_copy(update={"overlap": overlap})))


@pytest.mark.parametrize("name", ["m6t_1t_v100x480", "m6t_100b_v100x128", "t5_base"])
def test_one_bucket_hides_nothing_of_the_reduction(name):
    plain = load(name, assignments=["parallelism.zero_stage=0"], library=shipped_library())
    exposed = estimate_loaded(achieved(plain, 0.0)).step_time_s
    one = answer(name, "parallelism.zero_stage=0", "overlap.gradient_bucket=100 TB").step_time_s
    assert one == pytest.approx(exposed, rel=1e-9)


def test_the_best_bucket_lies_between_one_and_many():
    """One bucket waits for the whole backward pass, tiny ones pay their latency each."""
    sizes = ("100 TB", "25 MB", "1 MB", "10 kB")
    times = [answer("m6t_1t_v100x480", f"overlap.gradient_bucket={size}").step_time_s for size in sizes]
    assert times[1] < min(times[0], times[3])
    hidden = answer("m6t_1t_v100x480", "overlap.gradient_bucket=25 MB").to_json()["breakdown_s"]["data_parallel"]
    assert hidden["hidden"] > hidden["exposed"]


def test_prefetching_leaves_the_first_gather_and_the_last_reduction():
    """Without loss and with short collectives, of L layers' gathers and reductions 1/L stays exposed in each pass."""
    plain = load("m6t_base_v100", assignments=["parallelism.zero_stage=3"], library=shipped_library())
    whole = estimate_loaded(achieved(plain, 0.0)).to_json()["breakdown_s"]["data_parallel"]["exposed"]
    found = answer("m6t_base_v100", "parallelism.zero_stage=3", "overlap.prefetch=true")
    parts = found.to_json()["breakdown_s"]["data_parallel"]
    layers = sum(run.count for run in plain.scenario.model.layers)
    assert parts["exposed"] == pytest.approx(whole / layers, rel=0.01)
    assert parts["exposed"] + parts["hidden"] == pytest.approx(whole, rel=1e-9)


@pytest.mark.slow
def test_all_engines_agree_on_buckets_and_prefetching():
    seen = 0
    for seed in range(25):
        fields = random_document(seed)
        if fields["workload"]["kind"] != "training":
            continue
        bucketed = with_fields(fields, {"overlap.gradient_bucket": "25 MB"})
        for document in (bucketed, with_fields(fields, {"overlap.prefetch": True, "parallelism.zero_stage": 3})):
            scenario = loaded(document)
            if not is_small(scenario):
                continue
            expected = estimate_loaded(scenario)
            parts = expected.to_json()["breakdown_s"]
            assert all(part["exposed"] >= 0 and part["hidden"] >= 0 for part in parts.values()), seed
            run = simulate_step(scenario.system, scenario.columns)
            assert float(run.step_time_s[0]) == pytest.approx(expected.step_time_s, rel=1e-9), seed
            closed = contended_step(scenario.system, scenario.columns, network="closed")
            assert closed.step_time_s == pytest.approx(expected.step_time_s, rel=1e-9), seed
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("name", ["deepseek_v3", "m6t_1t_v100x480", "switch_base"])
def test_two_chunks_move_the_same_rows_in_two_exchanges(name):
    """Their bytes are halves and their latencies whole, so that together they take somewhat longer."""
    one, two = (
        sum(answer(name, LIGHT_HEAD, f"overlap.expert_chunks={chunks}").to_json()["breakdown_s"]["all_to_all"].values())
        for chunks in (1, 2)
    )
    assert one < two < 1.5 * one
    assert answer(name, "overlap.expert_chunks=2").step_time_s < answer(name, "overlap.expert_chunks=1").step_time_s
