"""Surfaces carried to devices without tables: from which device, what travels, what stays true."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.attention_surface import AttentionShapes, AttentionTimeSurface, attention_time_s
from moesim.cost.gemm_surface import GemmMachine, GemmSurface, are_same_figures, gemm_surface_from_json
from moesim.cost.moe_rank_loads import MoeShapes, balanced_rank_load
from moesim.cost.moe_surface import MoeTimeSurface, moe_flops, moe_time_s
from moesim.cost.surface_transfer import (
    Anchors,
    SurfaceOrigin,
    TransferRules,
    attention_surface_at,
    attention_surface_for,
    carried_gemm_surface,
    device_anchors,
    gemm_surface_for,
    kernel_machine,
    lender,
    moe_surface_at,
    moe_surface_for,
    nearest_lender,
    portable_core,
    transfer_rules,
)
from moesim.describe.hardware_library import HardwareLibrary

LIBRARY = HardwareLibrary()
DEVICES = LIBRARY.names("devices")
PRECISIONS = ("bf16", "fp16", "fp8", "fp4", "fp32", "int8")
LAYERS = [
    (2048, 768, 8, 128, 1, 1),
    (4096, 14336, 2, 8, 2, 4),
    (7168, 2048, 8, 256, 1, 8),
    (1024, 21248, 1, 960, 1, 480),
]
devices, precisions = st.sampled_from(DEVICES), st.sampled_from(PRECISIONS)


@cache
def gemm(name: str) -> tuple[GemmSurface, SurfaceOrigin]:
    return gemm_surface_for(LIBRARY.device(name), LIBRARY)


@cache
def attention(name: str) -> tuple[AttentionTimeSurface, SurfaceOrigin]:
    return attention_surface_for(LIBRARY.device(name), LIBRARY)


@cache
def moe(name: str) -> tuple[MoeTimeSurface, SurfaceOrigin]:
    return moe_surface_for(LIBRARY.device(name), LIBRARY)


def rules() -> TransferRules:
    return transfer_rules(LIBRARY.transfer_document())


def gemm_time_s(name: str, precision: str, *sizes: float) -> tuple[float, GemmMachine]:
    surface, _ = gemm(name)
    machine = kernel_machine(LIBRARY.device(name), precision)
    machine = replace(machine, compute_units=surface.machine.compute_units)
    return float(surface.time_s(*sizes, machine)), machine


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("h100_sxm", "h100_sxm"),
        ("h800_sxm", "h100_sxm"),
        ("h20", "h200_sxm"),
        ("a800_sxm", "a100_sxm"),
        ("b300_sxm", "b200_sxm"),
        ("v100_sxm2_32gb", "a100_sxm"),
        ("t4", "a100_sxm"),
        ("k40", "a100_sxm"),
        ("tpu_v3_core", "a100_sxm"),
        ("mi250x_gcd", "a100_sxm"),
    ],
)
def test_a_device_takes_the_surface_of_the_nearest_generation(name, source):
    origins = [of(name)[1] for of in (gemm, attention, moe)]
    assert {origin.device for origin in origins} == {source}
    assert {origin.kind for origin in origins} == {"fitted" if name == source else "transferred"}


def test_of_two_generations_as_near_the_older_lends_and_ada_never_does():
    ampere, ada, hopper = (lender(LIBRARY.device(name)) for name in ("a100_sxm", "l40s", "h100_sxm"))
    assert nearest_lender(ada, [hopper, ampere], rules()).device == "a100_sxm"
    assert nearest_lender(ampere, [ada, hopper], rules()).device == "h100_sxm"
    assert nearest_lender(ada, [hopper, ada], rules()).device == "l40s"


def test_facts_of_measured_devices_are_those_of_their_profiles():
    measured = rules().measured
    assert set(measured) == {
        name for operator in ("gemm", "attention", "moe") for name in LIBRARY.surface_devices(operator)
    }
    for name, facts in measured.items():
        profile = lender(LIBRARY.device(name))
        assert facts.generation == profile.generation
        assert facts.flops_per_byte == pytest.approx(profile.flops_per_byte, rel=1e-5)


def test_every_generation_of_a_device_has_a_rank():
    assert {LIBRARY.device(name).generation for name in DEVICES} <= set(rules().rank)


def test_the_same_figures_keep_the_grid_and_others_do_not():
    assert np.any(gemm("h800_sxm")[0].grid.log_ratio)
    assert attention("h800_sxm")[0].grids
    assert not np.any(gemm("h20")[0].grid.log_ratio)
    assert not np.any(gemm("v100_sxm2_32gb")[0].grid.log_ratio)
    assert not moe("v100_sxm2_32gb")[0].grids
    sizes = (np.array([64, 4096]), 4096, np.array([4096, 512]))
    assert gemm("h800_sxm")[0].time_s(*sizes).tolist() == gemm("h100_sxm")[0].time_s(*sizes).tolist()


def test_l2_traffic_and_cached_operands_do_not_travel_between_generations():
    document = LIBRARY.surface("gemm", "a100_sxm")
    assert document is not None
    machine = kernel_machine(LIBRARY.device("v100_sxm2_32gb"))
    away = carried_gemm_surface(document, machine, Anchors(), is_same_generation=False)
    near = carried_gemm_surface(document, machine, Anchors(), is_same_generation=True)
    assert away.core == portable_core(document)
    assert near.core == gemm_surface_from_json(document).core
    assert away.core.l2_ratio > 1e3 > near.core.l2_ratio


def test_published_figures_replace_those_of_the_source():
    v100 = LIBRARY.device("v100_sxm2_32gb")
    anchors = device_anchors(v100)
    assert anchors.compute_fraction == v100.kernels.gemm.compute_fraction.value
    assert anchors.memory_fraction is None  # transferred from the A100 in the profile already
    surface, _ = gemm("v100_sxm2_32gb")
    rate = 2 * 8192**3 / float(surface.time_s(8192, 8192, 8192))
    assert 0.95 * 0.78 < rate / 125e12 <= 0.78
    assert gemm("k40")[0].core.launch_s == pytest.approx(5e-6)


def test_units_of_another_vendor_count_by_their_share_of_the_peak():
    tpu = gemm("tpu_v3_core")[0].machine
    assert tpu.compute_units == pytest.approx(61.5e12 / (312e12 / 108))
    assert gemm("v100_sxm2_32gb")[0].machine.compute_units == 80


def test_narrow_elements_move_fewer_bytes():
    wide, narrow = (kernel_machine(LIBRARY.device("h100_sxm"), precision) for precision in ("bf16", "fp8"))
    assert narrow.memory_bandwidth == 2 * wide.memory_bandwidth
    assert narrow.peak_flop_rate > wide.peak_flop_rate
    assert not are_same_figures(wide, narrow)
    assert are_same_figures(wide, kernel_machine(LIBRARY.device("h100_sxm"), "fp16"))
    assert kernel_machine(LIBRARY.device("v100_sxm2_32gb"), "bf16").peak_flop_rate == 125e12


def test_intervals_are_those_of_the_transfer_table():
    for operator, of in (("gemm", gemm), ("attention", attention), ("moe", moe)):
        for name in ("v100_sxm2_32gb", "h20"):
            surface, origin = of(name)
            spread = rules().intervals[operator][origin.relation]
            widths = surface.spread.half_widths if isinstance(surface, GemmSurface) else surface.interval_half_widths
            assert list(widths) == list(spread.half_widths)
    wide, narrow = (max(gemm(name)[0].spread.half_widths) for name in ("v100_sxm2_32gb", "h20"))
    assert wide > narrow


@settings(max_examples=400, deadline=None)
@given(
    name=devices,
    precision=precisions,
    sizes=st.tuples(st.integers(1, 70_000), st.integers(1, 1100), st.integers(1, 1100)),
    more=st.tuples(st.integers(0, 5_000), st.integers(0, 300), st.integers(0, 300)),
)
def test_on_any_device_time_never_falls_as_m_or_aligned_n_or_k_grow(name, precision, sizes, more):
    (m, n, k), (more_m, more_n, more_k) = sizes, more
    less_s, _ = gemm_time_s(name, precision, m, 64 * n, 64 * k)
    more_s, _ = gemm_time_s(name, precision, m + more_m, 64 * (n + more_n), 64 * (k + more_k))
    assert more_s >= less_s * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(name=devices, precision=precisions, m=st.integers(1, 10**6), n=st.integers(1, 10**5), k=st.integers(1, 10**5))
def test_on_any_device_no_gemm_exceeds_the_peak(name, precision, m, n, k):
    time_s, machine = gemm_time_s(name, precision, m, n, k)
    assert 2.0 * m * n * k / time_s <= machine.peak_flop_rate * (1 + 1e-12)


@settings(max_examples=300, deadline=None)
@given(
    name=devices,
    precision=precisions,
    sizes=st.tuples(st.integers(1, 256), st.integers(1, 32768), st.integers(1, 16)),
    group=st.integers(1, 16),
    head_size=st.sampled_from((64, 128, 192, 256)),
    grown=st.tuples(st.integers(0, 64), st.integers(0, 8192), st.integers(0, 8)),
)
def test_on_any_device_attention_hardly_falls_with_more_work_nor_exceeds_the_peak(
    name, precision, sizes, group, head_size, grown
):
    surface = attention_surface_at(attention(name)[0], kernel_machine(LIBRARY.device(name), precision))
    (batch, sequence, kv_heads), (more_batch, more_sequence, more_heads) = sizes, grown
    both = [
        np.array([batch, batch + more_batch], dtype=float),
        np.array([sequence, sequence + more_sequence], dtype=float),
        np.array([kv_heads * group, (kv_heads + more_heads) * group], dtype=float),
        np.array([kv_heads, kv_heads + more_heads], dtype=float),
        np.full(2, float(head_size)),
    ]
    shapes = AttentionShapes(*both)
    less_s, more_s = attention_time_s(surface, shapes)
    slack = 0.03 if surface.grids else 1e-9  # grids are kept from falling at probes, along batch and sequence
    assert more_s >= less_s * (1 - slack)
    assert (shapes.flops / np.array([less_s, more_s]) <= surface.peak_flop_per_s * (1 + 1e-12)).all()


@settings(max_examples=300, deadline=None)
@given(
    name=devices,
    precision=precisions,
    sizes=st.sampled_from(LAYERS),
    tokens=st.integers(1, 65536),
    more=st.integers(0, 8192),
)
def test_on_any_device_a_balanced_layer_hardly_falls_with_more_tokens_nor_exceeds_the_peak(
    name, precision, sizes, tokens, more
):
    surface = moe_surface_at(moe(name)[0], kernel_machine(LIBRARY.device(name), precision))
    columns = [np.full(2, float(size)) for size in (*sizes, 3)]
    shapes = MoeShapes(*[np.array([tokens, tokens + more], dtype=float), *columns])
    load = balanced_rank_load(shapes)
    less_s, more_s = moe_time_s(surface, shapes, load)
    slack = 0.03 if surface.grids else 1e-9
    assert more_s >= less_s * (1 - slack)
    rates = moe_flops(shapes, load) / np.array([less_s, more_s])
    assert (rates <= surface.machine.peak_flop_per_s * (1 + 1e-12)).all()
