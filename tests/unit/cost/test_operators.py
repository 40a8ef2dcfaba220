from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_scenarios import loaded, random_document, shipped_library

from moesim.cost.efficiency_surfaces import DeviceRates, combined_time_s, device_rates
from moesim.cost.operators import Hardware, attention_cost, gemm_cost, price, traffic_cost
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext, gemm
from moesim.structure.lowering_layers import dense_part
from moesim.structure.step_graph import AttentionCore, Gemm, MemoryTraffic, Operation

library = shipped_library()
DEVICES = [
    device_rates(library.device(library.cluster(cluster).device), library.stack(stack))
    for cluster, stack in (
        ("v100_sxm2_32gb_8", "pytorch_einsum_nccl"),
        ("h800_sxm_hgx_nodes", "deepseek_dualpipe_deepep"),
        ("tpu_v3_16x16", "xla_einsum"),
        ("k40_pcie_nodes", "pytorch_permute_nccl"),
        ("mi300x_nodes", "megatron_core_rccl"),
    )
]
IDEAL = DeviceRates(
    peak={"bf16": 1e15},
    gemm_fraction=1.0,
    gemm_memory_fraction=1.0,
    prologue_length=0.0,
    gemm_fixed_s=0.0,
    attention_fraction=1.0,
    memory_bandwidth=3e12,
    traffic_fraction=1.0,
    traffic_fixed_s=0.0,
    compute_units=128.0,
)


def gemm_of(rows: float, columns: float, inner: float, groups: float = 1.0, **fields: Any) -> Gemm:
    shape = [np.array([float(number)]) for number in (rows, columns, inner, groups)]
    return dataclasses.replace(Gemm(*shape, precision="bf16", input_bytes=2.0, output_bytes=2.0), **fields)


def gemm_seconds(work: Gemm, rates: DeviceRates) -> float:
    return float(gemm_cost(work, rates)[0][0])


extents = st.integers(1, 40_000)


@given(st.sampled_from(DEVICES), extents, extents, extents, st.integers(1, 64), st.integers(1, 5000))
def test_gemm_time_never_falls_with_an_extent(rates, rows, columns, inner, groups, more):
    base = gemm_seconds(gemm_of(rows, columns, inner, groups), rates)
    for larger in (
        (rows + more, columns, inner, groups),
        (rows, columns + more, inner, groups),
        (rows, columns, inner + more, groups),
        (rows, columns, inner, groups + more),
    ):
        assert gemm_seconds(gemm_of(*larger), rates) >= base * (1 - 1e-12), larger


@given(st.sampled_from(DEVICES), extents, extents, extents, st.integers(1, 64))
def test_gemm_is_never_faster_than_the_roofline(rates, rows, columns, inner, groups):
    time_s, ideal_s, flops = gemm_cost(gemm_of(rows, columns, inner, groups), rates)
    num_bytes = 2.0 * groups * (rows * inner + inner * columns + rows * columns)
    assert flops[0] == pytest.approx(2.0 * groups * rows * columns * inner)
    roofline = max(flops[0] / rates.peak_for("bf16"), num_bytes / rates.memory_bandwidth)
    assert ideal_s[0] == pytest.approx(roofline, rel=1e-12)
    assert time_s[0] >= roofline


def test_gemm_of_an_ideal_device_reaches_the_roofline_at_both_ends():
    compute_bound = gemm_of(2**20, 2**20, 2**20)
    memory_bound = gemm_of(1, 2**20, 2**20, groups=4)
    for work in (compute_bound, memory_bound):
        time_s, ideal_s, _ = gemm_cost(work, IDEAL)
        assert time_s[0] == pytest.approx(ideal_s[0], rel=1e-2)
    assert gemm_seconds(compute_bound, IDEAL) == pytest.approx(2.0 * 2.0**60 / 1e15, rel=1e-6)


def test_gemm_without_rows_takes_no_time():
    time_s, ideal_s, flops = gemm_cost(gemm_of(0, 4096, 4096), DEVICES[0])
    assert (time_s[0], ideal_s[0], flops[0]) == (0, 0, 0)


def test_rows_of_grouped_experts_are_padded_to_a_matrix_instruction():
    """17 rows of each expert cost 32; one expert alone is not padded by the kernel of a group."""
    seventeen, thirty_two = (gemm_of(rows, 8192, 8192, groups=64) for rows in (17, 32))
    compute = dataclasses.replace(IDEAL, memory_bandwidth=1e30)
    assert gemm_seconds(seventeen, compute) == gemm_seconds(thirty_two, compute)


@given(st.floats(0, 1e3), st.floats(0, 1e3))
def test_overlapped_time_lies_between_the_longer_part_and_the_sum(compute_s, memory_s):
    together = float(combined_time_s(np.array([compute_s]), np.array([memory_s]))[0])
    assert max(compute_s, memory_s) <= together <= (compute_s + memory_s) * (1 + 1e-12)


def test_a_precision_the_device_lacks_runs_at_its_fp32_rate_or_its_slowest():
    with_fp32 = dataclasses.replace(IDEAL, peak={"fp16": 100.0, "fp32": 10.0})
    without = dataclasses.replace(IDEAL, peak={"bf16": 100.0, "fp8": 200.0})
    assert (with_fp32.peak_for("fp16"), with_fp32.peak_for("fp64"), without.peak_for("fp32")) == (100.0, 10.0, 100.0)


def context_of(stack: str, **changes: Any) -> LoweringContext:
    seed = next(
        seed
        for seed in range(2000)
        if (fields := random_document(seed))["stack"] == stack
        and fields["workload"]["kind"] == "training"
        and fields["precision"]["gradients"] == changes.get("gradients", fields["precision"]["gradients"])
        and fields["precision"]["activations"] != "fp32"
        and fields["model"]["architecture"] == "decoder_only"
    )
    scenario = loaded(random_document(seed))
    return LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)


@pytest.mark.parametrize(("stack", "ratio"), [("megatron_core_nccl", 2.5), ("pytorch_einsum_nccl", 2.0)])
def test_attention_backward_is_two_and_a_half_forwards_with_a_flash_kernel_and_two_without(stack, ratio):
    """Five products instead of two: a flash kernel computes the scores again."""
    context = context_of(stack)
    (kind, *_) = layer_sequence(context.model).kinds
    cores = [row for row in dense_part(context, kind).operations if row.name == "attention.core"]
    flops = {row.phase: float(attention_cost(row.work, IDEAL, 1)[2][0]) for row in cores}
    assert flops["activation_gradient"] == pytest.approx(ratio * flops["forward"], rel=1e-12)


def test_attention_flops_are_those_of_the_visible_half():
    """8 heads of 128, 1024 queries on 1024 keys: 4 * 1024^2 * 128 * 8 / 2 FLOPs."""
    pairs, heads = np.array([1024.0**2]), np.array([8.0])
    work = AttentionCore(pairs, heads, 256.0, 0.5, np.array([1.0]), "bf16", 2.0)
    assert attention_cost(work, IDEAL, 1)[2][0] == 4 * 1024**2 * 128 * 8 / 2


def test_weight_gradients_are_read_and_written_in_fp32():
    """Accumulated over micro-batches: 4 bytes read and 4 written per element beside the 2-byte operands."""
    context = context_of("megatron_core_nccl", gradients="fp32")
    rows, columns, inner = np.array([64.0]), 4096.0, 8192.0
    work = gemm(context, "weight_gradient", (rows, columns, inner))
    assert (work.output_bytes, work.accumulates) == (4.0, True)
    forward = gemm(context, "forward", (rows, columns, inner))
    assert (forward.output_bytes, forward.accumulates) == (2.0, False)
    memory_only = dataclasses.replace(IDEAL, peak={context.scenario.precision.compute: 1e30})
    num_bytes = (64 * 8192 + 8192 * 4096) * work.input_bytes + 64 * 4096 * 8.0
    assert gemm_seconds(work, memory_only) == pytest.approx(num_bytes / IDEAL.memory_bandwidth, rel=1e-9)


@given(st.sampled_from(DEVICES), st.integers(1, 10), st.floats(1, 1e12), st.floats(1, 4))
def test_traffic_time_is_fixed_time_per_kernel_and_bytes_over_bandwidth(rates, kernels, num_bytes, load):
    work = MemoryTraffic(np.array([num_bytes]))
    time_s, ideal_s, flops = traffic_cost(work, rates, kernels)
    wire = num_bytes / rates.memory_bandwidth
    assert time_s[0] == pytest.approx(kernels * rates.traffic_fixed_s + wire / rates.traffic_fraction, rel=1e-12)
    assert (ideal_s[0], flops[0]) == (wire, 0)
    more = MemoryTraffic(work.num_bytes * load)
    assert traffic_cost(more, rates, kernels)[0][0] >= time_s[0]


@pytest.mark.parametrize("rates", DEVICES)
def test_steps_that_wait_for_each_other_add_to_the_time_and_not_to_the_ideal(rates):
    work = MemoryTraffic(np.array([1e6, 0.0]))
    slower = dataclasses.replace(work, serial_s=np.array([3e-4, 3e-4]))
    (time_s, ideal_s, _), (plain_s, plain_ideal_s, _) = (traffic_cost(one, rates, 2) for one in (slower, work))
    assert time_s - plain_s == pytest.approx([3e-4, 0.0], rel=1e-9)  # no bytes, no kernel
    assert list(ideal_s) == list(plain_ideal_s)


def test_the_fullest_rank_takes_longer_and_the_mean_keeps_its_flops():
    scenario = loaded(random_document(0))
    hardware: Hardware = scenario.system.hardware
    work = dataclasses.replace(gemm_of(4096, 4096, 4096, groups=8), precision=scenario.scenario.precision.compute)
    even = Operation("expert.up", "expert_gemm", "forward", "compute", work)
    skewed = dataclasses.replace(even, load_factor=np.array([2.0]))
    plain, loaded_cost = price(even, hardware), price(skewed, hardware)
    assert loaded_cost.time_s[0] == plain.time_s[0]
    assert loaded_cost.flops[0] == plain.flops[0]
    assert plain.extra_s[0] == 0
    assert 0.5 * plain.time_s[0] < loaded_cost.extra_s[0] <= plain.time_s[0]
