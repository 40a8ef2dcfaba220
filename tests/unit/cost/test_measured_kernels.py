"""What measurements added to the prices: sums in fp32, unaligned rows, attention libraries, a stack's own kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moesim.cost.efficiency_surfaces import device_rates
from moesim.cost.explanations import explain_operation
from moesim.cost.kernel_times import WIDE_OUTPUT_EXPONENT
from moesim.cost.operators import Hardware, attention_cost, gemm_cost, price
from moesim.cost.state_costs import update_time_s
from moesim.cost.surface_transfer import attention_kernels_for, device_surfaces
from moesim.describe.hardware_library import HardwareLibrary
from moesim.structure.step_graph import AttentionCore, Gemm, MemoryTraffic, PrefillShape
from moesim.study.measured_cases import MeasuredCase
from moesim.study.measured_operations import map_case

library = HardwareLibrary()
H200 = library.device("h200_sxm")
SURFACES = device_surfaces(H200, library)
STACK = library.stack("pytorch_grouped_mm_nccl")
RATES = device_rates(H200, STACK, surfaces=SURFACES)
LAYER = {"tokens": 4096, "hidden": 2048, "inner": 768, "experts": 128, "experts_per_token": 8}


def one(value: float):
    return np.array([float(value)])


def gemm(rows: float, columns: float, inner: float, **keys) -> Gemm:
    return Gemm(one(rows), one(columns), one(inner), one(1), "bf16", 2.0, **{"output_bytes": 2.0, **keys})


def core(length: float, *, is_backward: bool = False) -> AttentionCore:
    prefill = PrefillShape(one(2), one(length), one(8), 128.0)
    width = 256.0 * (2.5 if is_backward else 1.0)
    pairs = one(2 * length * length)
    return AttentionCore(pairs, one(32), width, 0.5, one(0), "bf16", 2.0, prefill, is_backward)


def layer(kind: str, stack=STACK, **changes):
    case = MeasuredCase("c", "moe_layer", "moe_layer", kind, "bf16", LAYER | changes, 0, 0, 1, 0, 1, "", "")
    return map_case(case, stack).operations


def test_a_sum_in_fp32_is_read_and_written_at_the_measured_rate():
    plain, added = gemm(8192, 8192, 64), gemm(8192, 8192, 64, output_bytes=4.0, accumulates=True)
    plain_s, added_s = (gemm_cost(work, RATES)[0][0] for work in (plain, added))
    fraction = H200.kernels.gemm.accumulation_fraction
    assert fraction is not None
    output_s, power = 8 * 8192**2 / (4.8e12 * fraction.value), WIDE_OUTPUT_EXPONENT
    assert added_s == pytest.approx((plain_s**power + output_s**power) ** (1 / power), rel=1e-9)


@pytest.mark.parametrize(("columns", "inner"), [(4100, 4096), (4096, 4100), (4100, 4100)])
def test_rows_of_no_whole_16_bytes_cost_the_measured_factor(columns, inner):
    slowdown = H200.kernels.gemm.unaligned_slowdown
    assert slowdown is not None
    surface = SURFACES.gemm
    assert surface is not None
    aligned = replace(surface, penalty_unaligned=1.0, penalty_n=1.0, penalty_k=1.0)
    ratio = surface.time_s(4096, columns, inner) / aligned.time_s(4096, columns, inner)
    assert ratio == pytest.approx(slowdown.value)
    assert surface.misalignment(4104, 4104) == max(surface.penalty_n, 1.0) * surface.penalty_k


def test_a_stack_with_an_attention_library_is_priced_by_its_kernels_pass_by_pass():
    without = replace(RATES, attention_library=None)
    forward, backward = core(4096), core(4096, is_backward=True)
    of_surface = attention_cost(backward, without, 1)[0] / attention_cost(forward, without, 1)[0]
    of_kernels = attention_cost(backward, RATES, 1)[0] / attention_cost(forward, RATES, 1)[0]
    assert of_surface[0] == pytest.approx(2.5)
    assert 2.6 < of_kernels[0] < 3.5
    long = attention_cost(core(32768, is_backward=True), RATES, 1)[0] / attention_cost(core(32768), RATES, 1)[0]
    assert long[0] < of_kernels[0]  # what a tile costs beyond its products counts less


def test_kernels_travel_within_a_generation_at_the_figures_of_the_device():
    h20 = library.device("h20")
    carried = attention_kernels_for(h20, library)
    assert ("cudnn", "backward") in carried
    assert carried["cudnn", "forward"].peak_flop_per_s == h20.peak_flop_rate["bf16"].value
    assert attention_kernels_for(library.device("a100_sxm"), library) == {}


def test_a_measured_stack_sorts_copies_casts_and_adds_where_the_others_count_passes():
    names = [operation.name for operation in layer("forward")]
    assert {"dispatch.sort", "dispatch.permute", "combine.unpermute", "router.cast"} <= set(names)
    fused = [operation.name for operation in layer("forward", library.stack("megatron_core_nccl"))]
    assert not {"dispatch.sort", "combine.unpermute", "router.cast"} & set(fused)


def test_with_a_capacity_all_choices_are_sorted_before_the_kept_ones():
    capped = {row.name: row for row in layer("forward", capacity_factor=0.5, capacity_per="assignment")}
    places, kept = capped["dispatch.places"], capped["dispatch.sort"]
    assert places.kernels == kept.kernels
    assert places.work.num_bytes[0] == pytest.approx(2 * kept.work.num_bytes[0])  # half of them are kept
    assert "dispatch.places" not in {row.name for row in layer("forward")}


def test_gradients_of_experts_are_added_by_a_kernel_of_their_own_with_the_bytes_of_the_stack():
    operations = {(row.name, row.phase): row for row in layer("backward")}
    product, added = operations["expert.up", "weight_gradient"], operations["expert.up.sum", "weight_gradient"]
    assert isinstance(product.work, Gemm)
    assert isinstance(added.work, MemoryTraffic)
    assert (product.work.output_bytes, product.work.accumulates) == (2.0, False)
    weights = 128 * 2 * 768 * 2048
    assert added.work.num_bytes[0] == pytest.approx(weights * STACK.elementwise.expert_gradient_bytes)
    assert np.ravel(added.work.compute_s)[0] == pytest.approx(weights * STACK.elementwise.widening_s)
    others = {(row.name, row.phase): row for row in layer("backward", library.stack("megatron_core_nccl"))}
    work = others["expert.up", "weight_gradient"].work
    assert isinstance(work, Gemm)
    assert work.accumulates


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_words_of_a_measured_stack_evaluate_to_its_prices(kind):
    block = {**LAYER, "batch": 1, "length": 4096, "heads": 32, "kv_heads": 4, "head_size": 128}
    case = MeasuredCase("c", "b", "b", kind, "bf16", block, 0, 0, 1, 0, 1, "", "")
    hardware = Hardware(RATES, None)  # type: ignore[arg-type] - nothing here communicates
    for operation in map_case(replace(case, suite="transformer_block"), STACK).operations:
        words = explain_operation(operation, hardware).substituted
        seconds = eval(words, {"max": max})
        assert seconds == pytest.approx(price(operation, hardware).time_s[0], rel=1e-6), operation.name


def test_an_update_runs_at_the_rate_of_updates():
    fraction = H200.kernels.memory_bound.update_fraction
    assert fraction is not None
    expected = RATES.traffic_fixed_s + 3e9 / (4.8e12 * fraction.value)
    assert math.isclose(update_time_s(one(3e9), RATES)[0], expected)


def test_a_stack_that_streams_slower_in_a_step_slows_element_wise_work_alone():
    megatron = device_rates(H200, library.stack("megatron_core_nccl"), surfaces=SURFACES)
    assert megatron.traffic_fraction == pytest.approx(0.822 * device_rates(H200).traffic_fraction)
    assert megatron.update_fraction == RATES.update_fraction
