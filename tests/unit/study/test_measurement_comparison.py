"""Measured cases priced by the model's own operations, and the errors that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from measured_files import result, write_records

from moesim.cost.operators import gemm_cost, traffic_cost
from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import FormatError, ScenarioError
from moesim.formats.measurement_records import read_measurements
from moesim.structure.step_graph import Gemm, MemoryTraffic
from moesim.study.measured_cases import Measurements
from moesim.study.measurement_comparison import compare_measurements, judge
from moesim.study.measurement_report import comparison_markdown

ROOT = Path(__file__).parents[3]
MEASURED = ROOT / "validation" / "measurements" / "h200_sxm/single_gpu_torch2.11.jsonl"
LAYER = {"tokens": 4096, "hidden": 2048, "inner": 768, "experts": 128, "experts_per_token": 8}
HEADS = {"batch": 1, "length": 4096, "heads": 32, "kv_heads": 4, "head_size": 128}


@pytest.fixture(scope="module")
def h200():
    return judge("h200_sxm", "pytorch_permute_nccl", HardwareLibrary())


@pytest.fixture
def compared(tmp_path, h200):
    def compare(*records):
        return compare_measurements(read_measurements(write_records(tmp_path / "a.jsonl", records)), h200)

    return compare


def one(value: float):
    return np.array([float(value)])


def test_cases_timed_as_predicted_have_no_error_and_all_lie_in_their_intervals(h200):
    measured = read_measurements(MEASURED)
    first = compare_measurements(measured, h200)
    exact = [replace(case.case, median_s=case.predicted_s) for case in first.compared]
    again = compare_measurements(Measurements(exact), h200)
    assert {errors.median for errors in again.by_suite().values()} == {0.0}
    assert {errors.coverage for errors in again.by_suite().values()} == {1.0}
    assert again.suites_beyond(0.0) == []
    assert len(first.compared) + len(first.unmapped) == len(measured.cases)


def test_the_three_products_of_a_linear_layer_are_its_gemms_and_the_last_adds_up_in_fp32(h200, compared):
    shape = {"m": 512, "n": 1024, "k": 4096}
    records = [result("gemm", "gemm", kind, shape) for kind in ("forward", "dgrad", "wgrad")]
    extents = [(512, 1024, 4096, 2.0, False), (512, 4096, 1024, 2.0, False), (1024, 4096, 512, 4.0, True)]
    for case, (rows, columns, inner, written, adds) in zip(compared(*records).compared, extents, strict=True):
        work = Gemm(one(rows), one(columns), one(inner), one(1), "bf16", 2.0, written, adds)
        assert case.predicted_s == pytest.approx(gemm_cost(work, h200.alone.device)[0][0], rel=1e-12)


def test_a_loop_over_experts_is_one_gemm_for_each_with_rows(h200, compared):
    shape = {"n": 1536, "k": 2048, "method": "loop"}
    loop = result("grouped_gemm", "grouped_gemm", "forward", shape, loads=[100, 0, 300])
    parts = [result("gemm", "gemm", "forward", {"m": rows, "n": 1536, "k": 2048}) for rows in (100, 300)]
    looped, *single = compared(loop, *parts).compared
    assert looped.predicted_s == pytest.approx(sum(case.predicted_s for case in single), rel=1e-12)


def test_a_grouped_gemm_is_priced_at_the_mean_and_scatter_of_the_rows_of_the_local_experts(h200, compared):
    record = result("grouped_gemm", "grouped_gemm", "dgrad", {"n": 1536, "k": 2048}, loads=[0, 100, 300, 400])
    (case,) = compared(record).compared
    work = Gemm(one(200), one(2048), one(1536), one(4), "bf16", 2.0, 2.0, is_ragged=True, row_dispersion=125.0)
    assert case.predicted_s == pytest.approx(gemm_cost(work, h200.alone.device)[0][0], rel=1e-12)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_block_is_its_moe_layer_with_attention_norms_and_projections(h200, compared, kind):
    layer = result("moe_layer", "moe_layer", kind, LAYER)
    block = result("transformer_block", "transformer_block", kind, {**HEADS, **LAYER})
    core = result("attention", "causal_attention", kind, {**HEADS, "method": "cudnn"})
    of_layer, of_block, of_core = (case.predicted_s for case in compared(layer, block, core).compared)
    assert of_layer + of_core < of_block < of_layer + 3 * of_core


def test_heads_with_narrower_values_are_priced_at_the_mean_of_both(compared):
    heads = {**HEADS, "kv_heads": 32, "method": "cudnn"}
    sizes = [{"head_size": 192, "value_size": 128}, {"head_size": 160}, {"head_size": 192}]
    latent, mean, wide = (
        case.predicted_s
        for case in compared(*[result("attention", "a", "backward", {**heads, **one}) for one in sizes]).compared
    )
    assert latent == pytest.approx(mean, rel=1e-12)
    assert latent < wide


def test_kernels_alone_run_at_the_sustained_clock_and_layers_at_the_rate_of_their_stack_besides():
    judged_by = judge("h200_sxm", "megatron_core_nccl", HardwareLibrary())
    clock = judged_by.device.sustained_clock_fraction.value
    assert judged_by.alone.device.gemm_in_step == clock < 1
    assert judged_by.in_step.device.gemm_in_step == clock * judged_by.stack.gemm_compute_fraction.value
    assert judged_by.in_step.device.gemm_in_step < clock


def test_a_copy_is_priced_by_its_bytes_and_a_residual_by_three_passes(h200, compared):
    shape = {"rows": 4096, "columns": 2048}
    copy = result("memory_bound", "copy", "forward", shape, bytes=2.0**25)
    residual = result("memory_bound", "residual_add", "forward", shape)
    times = [case.predicted_s for case in compared(copy, residual).compared]
    for time_s, moved in zip(times, (2.0**25, 3 * 2 * 4096 * 2048), strict=True):
        assert time_s == pytest.approx(traffic_cost(MemoryTraffic(one(moved)), h200.alone.device, 1)[0][0], rel=1e-12)


def test_unknown_suites_are_listed_with_a_reason_and_a_file_of_nothing_else_is_refused(compared):
    gemm = result("gemm", "gemm", "forward", {"m": 64, "n": 64, "k": 64})
    strange = result("levitation", "float", "forward", {"height": 3})
    comparison = compared(gemm, strange)
    assert [reason for _, reason in comparison.unmapped] == ["the model has nothing like suite levitation"]
    with pytest.raises(FormatError, match="none of the cases"):
        compared(strange)


def test_shapes_without_their_sizes_are_all_named(compared):
    broken = [
        result("gemm", "gemm", "forward", {"m": 64, "n": 64}),
        result("gemm", "gemm", "forward", {"m": 0, "n": 64, "k": 64}),
        result("moe_layer", "moe_layer", "forward", {**LAYER, "tokens": 1e300}),
        result("attention", "causal_attention", "forward", {**HEADS, "kv_heads": "many"}),
        result("grouped_gemm", "grouped_gemm", "forward", {"n": 64, "k": 64}),
    ]
    with pytest.raises(FormatError) as caught:
        compared(*broken)
    assert [problem.line for problem in caught.value.problems] == [2, 3, 4, 5, 6]


def test_both_unknown_names_are_problems_at_once():
    with pytest.raises(ScenarioError) as caught:
        judge("h200_sx", "no_stack", HardwareLibrary())
    assert ["h200_sxm" in problem.remedy for problem in caught.value.problems] == [True, False]


def test_the_report_lists_the_worst_case_first(compared):
    good = result("memory_bound", "copy", "forward", {"rows": 1, "columns": 1}, bytes=3e8, median_s=9e-5)
    bad = result("memory_bound", "copy", "forward", {"rows": 2, "columns": 1}, bytes=3e8, median_s=9e-3)
    text = comparison_markdown(compared(good, bad), source="a.jsonl")
    worst = text.split("## Worst 2 cases")[1]
    assert worst.index("rows=2") < worst.index("rows=1")


STEP = {
    "blocks": 2,
    "vocabulary": 32000,
    "micro_batches": 1,
    "launch": "graph",
    "ranks": 1,
    "replicas": 1,
    "batch": 1,
    "length": 4096,
    "heads": 32,
    "kv_heads": 4,
    "head_size": 128,
    **LAYER,
    "gated": 1,
    "router": "top_k",
    "dispatch": "permute",
}


def test_a_step_is_the_estimate_of_its_scenario_and_more_blocks_and_batches_take_longer(compared):
    variants = [STEP, {**STEP, "blocks": 4}, {**STEP, "micro_batches": 2}, {**STEP, "launch": "eager"}]
    cases = compared(*(result("train_step", "train_step", "step", shape) for shape in variants)).compared
    one, blocks, batches, eager = (case.predicted_s for case in cases)
    assert 1.5 * one < blocks < 2 * one
    assert one < batches < 2 * one  # the update is made once
    assert eager > one


def test_steps_and_layers_of_one_rank_are_predicted_within_a_tenth_without_a_fit_and_their_memory_within_a_twentieth():
    judged_by = judge("h200_sxm", "pytorch_grouped_mm_nccl", HardwareLibrary())
    for name, suite in (("train_step", "train_step"), ("moe_layer", "moe_layer"), ("memory", "memory")):
        file = MEASURED.with_name(f"{name}_torch2.11.jsonl")
        comparison = compare_measurements(read_measurements(file), judged_by)
        assert comparison.by_suite()[suite].median < 0.1
        if name == "memory":
            assert len(comparison.memory) == 26
            assert np.median([abs(one.error) for one in comparison.memory]) < 0.05
            assert "## Memory" in comparison_markdown(comparison, source="m")


def test_several_ranks_are_left_out_with_a_reason(compared):
    gemm = result("gemm", "gemm", "forward", {"m": 64, "n": 64, "k": 64})
    spread = result("train_step", "train_step", "step", {**STEP, "ranks": 4})
    layer = result("moe_layer", "expert_parallel_layer", "forward", {**LAYER, "ranks": 4})
    assert len(compared(gemm, spread, layer).unmapped) == 2


def test_decoding_with_the_library_of_the_stack_is_predicted_without_a_fit() -> None:
    judged_by = judge("h200_sxm", "pytorch_grouped_mm_nccl", HardwareLibrary())
    comparison = compare_measurements(read_measurements(MEASURED.with_name("decode_torch2.11.jsonl")), judged_by)
    assert len(comparison.compared) == 11
    assert comparison.by_suite()["decode"].median < 0.05
    assert {reason.split(", not ")[1] for _, reason in comparison.unmapped} == {"flash", "packed"}
