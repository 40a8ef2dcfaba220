"""Kernels of a step priced through fitted surfaces: the same time as the surface alone, and its bounds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_scenarios import loaded, random_document, shipped_library

from moesim.cost.efficiency_surfaces import DeviceRates, device_rates
from moesim.cost.fitted_surfaces import NO_SURFACES, SURFACE_OPERATORS
from moesim.cost.kernel_times import (
    WIDE_OUTPUT_EXPONENT,
    four_constant_gemm_s,
    gemm_surface_in_step,
    gemm_times_s,
    moe_parameters_in_step,
    wide_output_bytes,
)
from moesim.cost.moe_rank_loads import TILE_ROWS, RankLoad
from moesim.cost.moe_surface import UNCACHED, _grouped_gemm_s, grouped_gemm_time_s
from moesim.cost.operators import attention_cost, gemm_cost, loaded_gemm
from moesim.cost.surface_transfer import device_surfaces
from moesim.estimation.loading import load
from moesim.estimation.provenance import sourced_figures
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_layers import dense_part
from moesim.structure.lowering_moe import moe_part
from moesim.structure.step_graph import AttentionCore, Gemm, PrefillShape, linear_extents
from moesim.study.predictions import predict_file

MEASURED = ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "gb200", "l40s")
library = shipped_library()


def rates_of(device: str, **changes: Any) -> DeviceRates:
    profile = library.device(device)
    return dataclasses.replace(device_rates(profile, surfaces=device_surfaces(profile, library)), **changes)


RATES = {device: rates_of(device) for device in MEASURED}
H100 = RATES["h100_sxm"]


def gemm_of(rows: Any, columns: Any, inner: Any, groups: Any = 1.0, **fields: Any) -> Gemm:
    shape = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(size, dtype=float)) for size in (rows, columns, inner, groups))
    )
    return dataclasses.replace(Gemm(*shape, precision="bf16", input_bytes=2.0, output_bytes=2.0), **fields)


def seconds(work: Gemm, rates: DeviceRates) -> float:
    return float(gemm_cost(work, rates)[0][0])


def core_of(
    sequences: float, length: float, heads: float, kv_heads: float, head_size: float, **fields: Any
) -> AttentionCore:
    one = np.ones(1)
    work = AttentionCore(
        pairs=one * sequences * length**2,
        heads=one * heads,
        matmul_width=2.0 * head_size,
        visible_fraction=0.5,
        io_elements=one * sequences * length * head_size * 2.0 * (heads + kv_heads),
        precision="bf16",
        element_bytes=2.0,
        prefill=PrefillShape(one * sequences, one * length, one * kv_heads, head_size),
    )
    return dataclasses.replace(work, **fields)


@pytest.mark.parametrize("device", MEASURED)
def test_surfaces_were_fitted_at_the_figures_the_device_profile_has(device):
    """Else asking a surface at the profile's figures would move it."""
    rates, surfaces = RATES[device], RATES[device].surfaces
    assert surfaces.gemm
    assert surfaces.attention
    assert surfaces.moe
    figures = (rates.peak["bf16"], rates.memory_bandwidth, rates.compute_units)
    gemm, attention, moe = surfaces.gemm.machine, surfaces.attention, surfaces.moe.machine
    assert (gemm.peak_flop_rate, gemm.memory_bandwidth, gemm.compute_units) == figures
    assert (attention.peak_flop_per_s, attention.memory_bytes_per_s, attention.compute_units) == figures
    assert (moe.peak_flop_per_s, moe.memory_bytes_per_s, moe.compute_units) == figures


def test_a_predicted_kernel_takes_the_time_the_step_gives_it(tmp_path: Path):
    """Rows of ``predict`` on an H100, in its units, against the price of the same operations."""
    shapes = [(4096, 14336, 4096), (7, 4096, 4096), (300, 1000, 200)]
    passes = {"forward": "forward", "dgrad": "activation_gradient", "wgrad": "weight_gradient"}
    lines = [f"{m},{n},{k},{name}" for m, n, k in shapes for name in passes]
    (tmp_path / "gemm.csv").write_text("m,n,k,pass\n" + "\n".join(lines) + "\n")
    predict_file("gemm", "h100_sxm", tmp_path / "gemm.csv", tmp_path / "out.csv", library=library)
    rows = (tmp_path / "out.csv").read_text().splitlines()
    at = rows[0].split(",").index("predicted_us")
    expected = [seconds(gemm_of(*linear_extents(*shape)[phase]), H100) for shape in shapes for phase in passes.values()]
    assert [float(row.split(",")[at]) for row in rows[1:]] == pytest.approx([1e6 * time for time in expected], rel=1e-5)
    (tmp_path / "attention.csv").write_text(
        "batch_size,isl,num_heads,num_key_value_heads,head_dim,pass,is_causal\n"
        "2,4096,32,8,128,forward,true\n2,4096,32,8,128,backward,true\n1,1000,16,16,64,forward,false\n"
    )
    predict_file("attention", "h100_sxm", tmp_path / "attention.csv", tmp_path / "out.csv", library=library)
    rows = (tmp_path / "out.csv").read_text().splitlines()
    at = rows[0].split(",").index("predicted_us")
    cores = [
        core_of(2, 4096, 32, 8, 128),
        core_of(2, 4096, 32, 8, 128, matmul_width=2.5 * 256.0),
        core_of(1, 1000, 16, 16, 64, visible_fraction=1.0),
    ]
    expected = [float(attention_cost(core, H100, 1)[0][0]) for core in cores]
    assert [float(row.split(",")[at]) for row in rows[1:]] == pytest.approx([1e6 * time for time in expected], rel=1e-5)


devices = st.sampled_from(MEASURED)
extents = st.integers(1, 40_000)
blocks = st.integers(1, 600)


@given(devices, extents, blocks, blocks, st.integers(1, 64), st.integers(1, 5000), st.booleans())
def test_time_never_falls_with_rows_groups_or_aligned_widths(device, rows, columns, inner, groups, more, is_ragged):
    base = (rows, 64 * columns, 64 * inner, groups)
    larger = [
        (base[0] + more, *base[1:]),
        (base[0], base[1] + 64 * more, *base[2:]),
        (*base[:2], base[2] + 64 * more, groups),
        (*base[:3], groups + more),
    ]
    rates = RATES[device]
    at_base = seconds(gemm_of(*base, is_ragged=is_ragged), rates)
    for shape in larger:
        assert seconds(gemm_of(*shape, is_ragged=is_ragged), rates) >= at_base * (1 - 1e-9), shape


@given(
    devices,
    extents,
    extents,
    extents,
    st.integers(1, 64),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.7, 1.0, 1.4]),
)
def test_no_gemm_beats_its_peak_or_its_ideal_time(device, rows, columns, inner, groups, is_ragged, is_fp32, in_step):
    rates = dataclasses.replace(RATES[device], gemm_in_step=in_step)
    work = gemm_of(rows, columns, inner, groups, is_ragged=is_ragged)
    if is_fp32:
        work = dataclasses.replace(work, output_bytes=4.0, accumulates=True)
    time_s, ideal_s, flops = gemm_cost(work, rates)
    assert time_s[0] >= flops[0] / rates.peak["bf16"]
    assert flops[0] / rates.peak["bf16"] <= ideal_s[0] <= time_s[0]


@pytest.mark.parametrize("is_ragged", [False, True])
def test_cases_are_priced_as_if_alone(is_ragged):
    """Distinct shapes are priced once and gathered; groups of works of other kinds stay apart."""
    rows = np.array([512.0, 16.0, 512.0, 0.0, 37.5])
    many = [
        gemm_of(rows, 4096, 1024, 8, is_ragged=is_ragged),
        gemm_of(rows, 4096, 1024, 8),
        gemm_of(rows, 4096, 1024, 8, precision="fp8", input_bytes=1.0),
    ]
    for work, together in zip(many, gemm_times_s(many, H100), strict=True):
        alone = [seconds(dataclasses.replace(work, **parts), H100) for parts in each_case(work)]
        assert together.tolist() == pytest.approx(alone, rel=1e-12)
        assert together[3] == 0.0
        assert together[0] == together[2] > together[1] > 0.0


def each_case(work: Gemm) -> list[dict[str, Any]]:
    names = ("rows", "columns", "inner", "groups")
    return [{name: getattr(work, name)[index : index + 1] for name in names} for index in range(work.rows.size)]


def test_a_step_slows_what_computes_and_not_what_waits():
    """At 0.7 of the rate a large GEMM takes 1 / 0.7 as long; one row of weights streams as fast as before."""
    slower = dataclasses.replace(H100, gemm_in_step=0.7)
    large, row = gemm_of(16384, 16384, 16384), gemm_of(1, 16384, 16384)
    assert seconds(large, slower) / seconds(large, H100) == pytest.approx(1 / 0.7, rel=0.01)
    assert seconds(row, slower) / seconds(row, H100) == pytest.approx(1.0, abs=0.02)


def test_weight_gradients_pay_for_reading_and_writing_fp32():
    """4 bytes read and 4 written, at the memory rate of sums or of the surface, partly beside the product."""
    plain = gemm_of(4096, 14336, 8192)
    accumulating = dataclasses.replace(plain, output_bytes=4.0, accumulates=True)
    assert (wide_output_bytes(plain), wide_output_bytes(accumulating)) == (0.0, 8.0)
    surface = H100.surfaces.gemm
    assert surface is not None
    plain_rate = dataclasses.replace(H100, accumulation_fraction=None)
    for rates, fraction in ((H100, H100.accumulation_fraction), (plain_rate, surface.core.memory_fraction)):
        output_s, power = 4096 * 14336 * 8 / (3.35e12 * fraction), WIDE_OUTPUT_EXPONENT
        joined_s = (seconds(plain, rates) ** power + output_s**power) ** (1 / power)
        assert seconds(accumulating, rates) == pytest.approx(joined_s, rel=1e-6)
        assert max(seconds(plain, rates), output_s) < joined_s < seconds(plain, rates) + output_s


def test_load_grows_the_tokens_of_each_pass():
    forward = gemm_of(100, 2048, 4096)
    gradient = dataclasses.replace(gemm_of(2048, 4096, 100), sums_tokens=True)
    assert loaded_gemm(forward, np.array([2.0])).rows[0] == 200
    assert loaded_gemm(gradient, np.array([2.0])).inner[0] == 200
    assert loaded_gemm(gradient, np.array([2.0])).rows[0] == 2048


def test_rows_that_scatter_fill_the_tiles_they_fill_on_average():
    assert H100.surfaces.moe
    numbers, machine = H100.surfaces.moe.parameters, H100.surfaces.moe.machine
    groups = 4096
    rows = np.random.default_rng(0).poisson(512.0, groups)
    tiles = np.stack([np.ceil(rows / size).sum() for size in TILE_ROWS])[None]
    drawn = RankLoad(np.array([rows.sum()]), np.array([float(groups)]), tiles, np.zeros(1))
    sizes = (np.array([4096.0]), np.array([2048.0]))
    expected = _grouped_gemm_s(numbers, machine, drawn, sizes, UNCACHED)
    mean = np.array([rows.mean()]), *sizes
    even, scattered = (
        grouped_gemm_time_s(numbers, machine, mean, groups=np.array([float(groups)]), row_dispersion=dispersion)
        for dispersion in (0.0, 1.0)
    )
    assert scattered == pytest.approx(expected, rel=0.01)
    assert even < 0.97 * expected


@given(rows=st.floats(0.1, 5e4), step=st.floats(1.0, 1.2), dispersion=st.sampled_from([0.0, 0.3, 1.0, 50.0]))
def test_more_scattered_rows_never_take_less_time(rows, step, dispersion):
    assert H100.surfaces.moe
    numbers, machine = H100.surfaces.moe.parameters, H100.surfaces.moe.machine
    sizes = (np.array([rows, rows * step]), np.array([4096.0]), np.array([2048.0]))
    time_s = grouped_gemm_time_s(numbers, machine, sizes, groups=np.array([16.0]), row_dispersion=dispersion)
    assert time_s[1] >= time_s[0] * (1 - 1e-9)


def test_8_bit_products_have_the_fraction_of_their_device_and_as_long_a_prologue():
    surfaces = H100.surfaces
    assert surfaces.gemm
    assert surfaces.moe
    rates = dataclasses.replace(H100, eight_bit_fraction=0.9)
    for wide in (2.0, 4.0):
        assert gemm_surface_in_step(surfaces.gemm, rates, wide) == gemm_surface_in_step(surfaces.gemm, H100, wide)
    core, narrow = surfaces.gemm.core, gemm_surface_in_step(surfaces.gemm, rates, 1.0).core
    assert narrow.compute_fraction == pytest.approx(0.9 * core.compute_fraction * rates.gemm_in_step)
    assert narrow.prologue_length == 2.0 * core.prologue_length
    assert narrow.chunk_latency_s == 0.5 * core.chunk_latency_s
    numbers = moe_parameters_in_step(surfaces.moe, rates, 1.0)
    assert numbers.compute_fraction == pytest.approx(
        0.9 * surfaces.moe.parameters.compute_fraction * rates.gemm_in_step
    )
    large = dataclasses.replace(gemm_of(8192, 8192, 8192), precision="fp8", input_bytes=1.0)
    assert 1.5 * seconds(large, rates) < seconds(gemm_of(8192, 8192, 8192), rates) < 2.0 * seconds(large, rates)


def test_finer_scales_slow_a_product_as_its_device_says():
    rates = dataclasses.replace(H100, row_scale_slowdown=1.1, block_scale_slowdown=1.3)
    narrow = dataclasses.replace(gemm_of(8192, 4096, 2048), precision="fp8", input_bytes=1.0)
    plain_s = seconds(narrow, rates)
    for scaling, slowdown in {"tensor": 1.0, "row": 1.1, "block": 1.3}.items():
        assert seconds(dataclasses.replace(narrow, scaling=scaling), rates) == pytest.approx(slowdown * plain_s)


def test_ragged_experts_take_the_grouped_formula_after_a_launch():
    surfaces = H100.surfaces
    assert surfaces.moe
    assert surfaces.gemm
    shape = tuple(np.array([size]) for size in (300.0, 4096.0, 2048.0))
    alone = grouped_gemm_time_s(surfaces.moe.parameters, surfaces.moe.machine, shape, groups=np.array([16.0]))
    work = gemm_of(300, 4096, 2048, 16, is_ragged=True)
    assert seconds(work, H100) == pytest.approx(surfaces.gemm.core.launch_s + float(alone[0]), rel=1e-12)
    equal = dataclasses.replace(work, is_ragged=False)
    assert seconds(equal, H100) == pytest.approx(float(surfaces.gemm.time_s(300, 4096, 2048, groups=16)), rel=1e-12)


def test_narrower_operands_move_fewer_bytes_and_compute_at_their_peak():
    row, large = gemm_of(1, 32768, 32768), gemm_of(16384, 16384, 16384)
    for work, ratio in ((row, 0.5), (large, 0.5)):
        narrow = dataclasses.replace(work, precision="fp8", input_bytes=1.0)
        assert seconds(narrow, H100) / seconds(work, H100) == pytest.approx(ratio, abs=0.05)


def test_a_device_without_surfaces_keeps_its_four_constants():
    work = gemm_of(1000, 2000, 3000)
    bare = dataclasses.replace(H100, surfaces=NO_SURFACES)
    assert seconds(work, bare) == float(four_constant_gemm_s(work, bare)[0])
    assert bare.gemm_launch_s == bare.gemm_fixed_s


def test_attention_over_a_context_group_is_its_share_of_whole_sequences():
    """Half the tokens against all keys: as long as half the batch at full length."""
    document = next(
        fields
        for seed in range(2000)
        if (fields := random_document(seed))["stack"] == "megatron_core_deepep"
        and fields["parallelism"]["context"] > 1
        and fields["workload"]["kind"] == "training"
        and fields["model"]["architecture"] == "decoder_only"
    )
    scenario = loaded(document)
    columns = scenario.columns
    context = LoweringContext(scenario.scenario, scenario.system.stack, columns)
    (kind, *_) = layer_sequence(context.model).kinds
    core = next(row.work for row in dense_part(context, kind).operations if row.name == "attention.core")
    assert isinstance(core, AttentionCore)
    assert core.prefill
    assert core.prefill.length[0] == columns["target_length"][0]
    assert core.prefill.sequences[0] == columns["micro_batch"][0] / columns["context"][0]
    assert core.pairs[0] == pytest.approx(core.prefill.sequences[0] * core.prefill.length[0] ** 2, rel=1e-12)


def test_latent_attention_has_the_head_of_equal_flops():
    """DeepSeek-V3: 192 for queries and keys, 128 for values."""
    scenario = load("deepseek_v3", library=library)
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    (kind, *_) = layer_sequence(context.model).kinds
    core = next(row.work for row in dense_part(context, kind).operations if row.name == "attention.core")
    assert isinstance(core, AttentionCore)
    assert core.prefill
    assert core.prefill.head_size == 160
    assert core.prefill.kv_heads[0] == core.heads[0]


@pytest.mark.parametrize(("stack", "is_ragged"), [("megatron_core_nccl", True), ("pytorch_einsum_nccl", False)])
def test_experts_are_one_grouped_kernel_but_for_one_hot_dispatch(stack, is_ragged):
    document = next(
        fields
        for seed in range(2000)
        if (fields := random_document(seed))["stack"] == stack and "moe" in fields["model"]
    )
    scenario = loaded(document)
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    kind = next(kind for kind in layer_sequence(context.model).kinds if kind.is_moe)
    operations = moe_part(context, kind, scenario.system.load_factor).operations
    experts = [row.work for row in operations if row.category == "expert_gemm"]
    others = [row.work for row in operations if row.category != "expert_gemm" and isinstance(row.work, Gemm)]
    assert experts
    assert all(isinstance(work, Gemm) and work.is_ragged == is_ragged for work in experts)
    assert not any(work.is_ragged for work in others)


def test_an_answer_says_which_surfaces_priced_it_and_how_far_off_they_were():
    system = load("mixtral_8x7b", library=library).system
    figures = {figure.figure: figure for figure in sourced_figures(system)}
    for operator in SURFACE_OPERATORS:
        figure = figures[f"device.surfaces.{operator}.compute_fraction"]
        assert figure.kind == "fitted"
        assert figure.error_fraction is not None
        assert 0.01 < figure.error_fraction < 0.2
        assert figure.source
    assert "device.kernels.gemm.compute_fraction" not in figures
    device = dataclasses.replace(system.hardware.device, surfaces=NO_SURFACES)
    bare = dataclasses.replace(system, hardware=dataclasses.replace(system.hardware, device=device))
    assert "device.kernels.gemm.compute_fraction" in {figure.figure for figure in sourced_figures(bare)}
