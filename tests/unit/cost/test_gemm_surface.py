"""GEMM surfaces: the formula by hand, monotone times on every shipped surface, rates below the peak."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.gemm_surface import (
    GemmCore,
    GemmMachine,
    GemmSurface,
    core_time_s,
    gemm_surface_from_json,
    grid_corners,
)
from moesim.resources import data_directory

MACHINE = GemmMachine(peak_flop_rate=1e15, memory_bandwidth=4e12, compute_units=100.0, l2_cache_bytes=50e6)
CORE = GemmCore(
    launch_s=2e-6, compute_fraction=0.8, memory_fraction=0.8, chunk_latency_s=1e-7, prologue_length=100.0,
    split_s=2e-6, wave_softness=1.0, tile_softness=1.0, overlap_exponent=3.0, l2_ratio=1e9,
    cached_activations=1.0, cached_weights=1.0, cache_start=1.0, cache_width=1.0,
)  # fmt: skip
SURFACES = sorted((data_directory("hardware_profiles") / "surfaces").glob("gemm_*.json"))
TARGETS = {
    "a100_sxm": (0.055, 0.18), "h100_sxm": (0.04, 0.11), "h200_sxm": (0.04, 0.11), "b200_sxm": (0.055, 0.15),
    "gb200": (0.055, 0.15), "l40s": (0.12, 0.35),
}  # fmt: skip


@cache
def document(name: str) -> dict[str, Any]:
    path = next(path for path in SURFACES if path.stem == f"gemm_{name}")
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def surface(name: str) -> GemmSurface:
    return gemm_surface_from_json(document(name))


names = st.sampled_from(sorted(TARGETS))
rows = st.one_of(st.integers(1, 70_000), st.integers(0, 16).map(lambda octave: 2**octave))
multiples_of_64 = st.one_of(st.integers(1, 2048), st.integers(0, 11).map(lambda octave: 2**octave)).map(
    lambda units: 64 * units
)
growth = st.one_of(st.just(0), st.just(1), st.integers(1, 64), st.integers(1, 5000))


def time_of(name: str, m: float, n: float, k: float) -> float:
    return float(surface(name).time_s(m, n, k))


def test_every_measured_device_has_a_surface():
    assert {path.stem.removeprefix("gemm_") for path in SURFACES} == set(TARGETS)


@settings(max_examples=400, deadline=None)
@given(names, rows, multiples_of_64, multiples_of_64, growth, growth, growth)
def test_time_never_falls_as_m_or_aligned_n_or_k_grow(name, m, n, k, more_m, more_n, more_k):
    larger = time_of(name, m + more_m, n + 64 * more_n, k + 64 * more_k)
    assert larger >= time_of(name, m, n, k) * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(names, rows, st.integers(1, 100_000), st.integers(1, 100_000))
def test_rate_never_exceeds_the_peak(name, m, n, k):
    assert 2.0 * m * n * k / time_of(name, m, n, k) <= surface(name).machine.peak_flop_rate * (1 + 1e-12)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_time_never_falls_along_long_walks(name):
    m, n, k = np.arange(1, 4200), 64 * np.arange(1, 400), 64 * np.arange(1, 400)
    for inner in (64, 1024, 7168, 40_000 // 64 * 64):
        for other in (64, 512, 4096, 131_072):
            assert (np.diff(surface(name).time_s(m, other, inner)) >= -1e-18).all()
            assert (np.diff(surface(name).time_s(other + 1, n, inner)) >= -1e-18).all()
            assert (np.diff(surface(name).time_s(other + 1, inner, k)) >= -1e-18).all()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_shipped_surface_is_small_and_carries_its_provenance(name):
    data = document(name)
    assert np.size(data["grid"]["log_ratio"]) + len(data["core"]) <= 250
    provenance = data["provenance"]
    assert "aiconfigurator" in provenance["source"]
    assert provenance["kind"] == "fitted"
    error = provenance["held_out_error"]
    assert error["median"] <= TARGETS[name][0]
    assert error["p90"] <= TARGETS[name][1]
    assert error["count"] == provenance["rows"]
    assert min(data["penalty_n"], data["penalty_k"]) >= 1.0


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_large_gemm_reaches_half_to_all_of_the_peak(name):
    rate = 2.0 * 8192**3 / time_of(name, 8192, 8192, 8192)
    assert 0.4 <= rate / surface(name).machine.peak_flop_rate <= 0.95


def test_large_gemm_takes_its_flops_at_the_fitted_rate():
    # 2 x 16384^3 FLOP at 0.8 PFLOP/s are 10.995 ms; the prologue adds 100 / 16384, launch 2 us; memory and the latency
    # of 256 iterations (0.5 ms and 25.6 us) vanish in the cube.
    size = np.array(16384.0)
    assert core_time_s(CORE, MACHINE, size, size, size) == pytest.approx(11.06e-3, rel=1e-3)


def test_thin_gemm_takes_its_bytes_at_the_fitted_bandwidth():
    # 2 x 16384^2 bytes of weights at 3.2 TB/s are 167.8 us; activations add 0.01 %, launch 2 us; the main loop of 256
    # iterations takes 25.6 us and vanishes in the cube.
    m, size = np.array(1.0), np.array(16384.0)
    assert core_time_s(CORE, MACHINE, m, size, size) == pytest.approx(169.8e-6, rel=5e-3)


def test_long_main_loop_of_one_tile_is_split():
    # 1024 iterations of 0.1 us in one part; in 32 parts 32 of them, and 2 us to join.
    m, k = np.array(16.0), np.array(65536.0)
    time_s = float(core_time_s(CORE, MACHINE, m, m * 4, k))
    assert 2e-6 + 2e-6 + 3.2e-6 < time_s < 15e-6


def test_grid_weights_are_shares_and_hit_the_knots():
    knots = ((0.0, 2.0, 5.0), (6.0, 8.0), (6.0, 7.0, 9.0))
    generator = np.random.default_rng(0)
    m, n, k = (2.0 ** generator.uniform(0, 12, 50) for _ in range(3))
    corners, weights = grid_corners(knots, m, n, k)
    assert corners.shape == weights.shape == (8, 50)
    assert (weights >= 0).all()
    assert weights.sum(axis=0) == pytest.approx(1.0)
    at, share = grid_corners(knots, np.array([4.0]), np.array([256.0]), np.array([128.0]))
    assert at[:, 0][share[:, 0] == 1.0].tolist() == [1 * 6 + 1 * 3 + 1]


def test_shapes_broadcast_and_no_work_takes_no_time():
    times = surface("h100_sxm").time_s(np.array([[0], [1], [4096]]), [64, 4096], 4096)
    assert times.shape == (3, 2)
    assert times[0].tolist() == [0.0, 0.0]
    assert (times[1:] > 0).all()


def test_fewer_than_one_row_costs_as_one():
    assert time_of("h100_sxm", 0.25, 4096, 4096) == time_of("h100_sxm", 1, 4096, 4096)


def test_misalignment_only_ever_costs():
    aligned = surface("b200_sxm")
    n = 64 * 40
    assert time_of("b200_sxm", 512, n + 1, 4096) >= time_of("b200_sxm", 512, n, 4096) * aligned.penalty_n
    assert time_of("b200_sxm", 512, 4096, n + 1) >= time_of("b200_sxm", 512, 4096, n) * aligned.penalty_k


def test_domain_names_what_was_measured():
    inside = surface("h100_sxm").is_inside_domain([1, 40_000, 512], 4096, [4096, 4096, 70_000])
    assert inside.tolist() == [True, False, False]


def test_interval_is_wider_for_misaligned_shapes_of_a100():
    a100 = surface("a100_sxm")
    assert a100.half_width(5e-6, False) > a100.half_width(5e-6)
    assert a100.half_width([1e-6, 1.0]).shape == (2,)


def test_surface_survives_json():
    original = surface("gb200")
    again = gemm_surface_from_json(json.loads(json.dumps(original.to_json())))
    sizes = (np.array([1, 100, 5000]), 4096, 2048)
    assert again.time_s(*sizes).tolist() == original.time_s(*sizes).tolist()
    assert again.half_width(1e-5) == original.half_width(1e-5)


def test_grid_of_another_shape_than_its_knots_is_refused():
    data = json.loads(json.dumps(document("l40s")))
    data["grid"]["log2_m"].pop()
    with pytest.raises(ValueError, match="shape"):
        gemm_surface_from_json(data)


def test_surface_is_carried_to_another_machine():
    h100 = surface("h100_sxm")
    faster = GemmMachine(2 * h100.machine.peak_flop_rate, 2 * h100.machine.memory_bandwidth, 132.0, 50e6)
    ratio = h100.time_s(8192, 8192, 8192, faster) / h100.time_s(8192, 8192, 8192)
    assert 0.45 < float(ratio) < 0.6
