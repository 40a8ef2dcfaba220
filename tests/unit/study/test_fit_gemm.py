"""Fits of GEMM surfaces: planted constants come back, grids keep their limits, reports say what was found."""

from __future__ import annotations

import csv
import gzip
from functools import cache

import numpy as np
import pytest

from moesim.cost.gemm_surface import GemmCore, GemmMachine, GemmSurface, candidate_times_s, core_time_s, grid_corners
from moesim.study.fit_gemm import (
    KNOTS,
    GemmTable,
    cross_validate,
    drop_limits,
    fit_core,
    fit_grid,
    fit_surface,
    gemm_table,
    grid_edges,
    machine_of_device,
    read_surface,
    with_spread,
)
from moesim.study.kernel_tables import coverage, error_statistics
from moesim.study.kernel_validation import (
    GEMM_TARGETS,
    fit_gemm_tables,
    gemm_regimes,
    kernel_report,
    validate_gemm,
    write_gemm_surfaces,
    write_kernel_report,
)

MACHINE = GemmMachine(peak_flop_rate=1e15, memory_bandwidth=3e12, compute_units=132.0, l2_cache_bytes=50e6)
PLANTED = GemmCore(
    launch_s=2.2e-6, compute_fraction=0.75, memory_fraction=0.85, chunk_latency_s=1.2e-7, prologue_length=120.0,
    split_s=2.1e-6, wave_softness=0.7, tile_softness=0.5, overlap_exponent=2.6, l2_ratio=5.0,
    cached_activations=0.6, cached_weights=0.9, cache_start=0.5, cache_width=1.0,
)  # fmt: skip


@cache
def planted_table(noise: float = 0.03, bump: float = 0.0) -> GemmTable:
    generator = np.random.default_rng(7)
    m, n, k = np.meshgrid(
        [1, 8, 16, 33, 64, 128, 257, 512, 1024, 2048, 4096, 8192],
        [32, 64, 128, 512, 768, 2048, 4096, 8192, 16384],
        [32, 64, 128, 512, 1536, 4096, 8192, 16384],
        indexing="ij",
    )
    m, n, k = (size.ravel().astype(np.float64) for size in (m, n, k))
    time_s = core_time_s(PLANTED, MACHINE, m, n, k) * np.exp(generator.normal(0.0, noise, m.size))
    time_s = time_s * np.where((n % 64 != 0) & (k % 64 == 0), 1.3, 1.0)
    lacking = np.clip((np.log2(n) - 8.0) / 4.0, 0.0, 1.0) * np.clip((np.log2(m) - 6.0) / 3.0, 0.0, 1.0)
    return GemmTable(m, n, k, time_s * np.exp(bump * lacking))


@cache
def planted_surface() -> GemmSurface:
    return fit_surface(planted_table(), MACHINE)


def test_planted_constants_come_back():
    table = planted_table()
    aligned = table.rows(table.is_aligned)
    fitted = fit_core(aligned, MACHINE)
    assert fitted.launch_s == pytest.approx(PLANTED.launch_s, rel=0.05)
    assert fitted.compute_fraction == pytest.approx(PLANTED.compute_fraction, rel=0.05)
    assert fitted.memory_fraction == pytest.approx(PLANTED.memory_fraction, rel=0.05)
    assert fitted.chunk_latency_s == pytest.approx(PLANTED.chunk_latency_s, rel=0.1)
    assert fitted.split_s == pytest.approx(PLANTED.split_s, rel=0.1)
    predicted = core_time_s(fitted, MACHINE, aligned.m, aligned.n, aligned.k)
    truth = core_time_s(PLANTED, MACHINE, aligned.m, aligned.n, aligned.k)
    assert error_statistics(predicted, truth).p90 < 0.02


def test_held_out_shapes_are_predicted_to_the_noise_and_the_interval_covers():
    table = planted_table()
    held_out = cross_validate(table, MACHINE, folds=2)
    error = error_statistics(held_out.predicted_s, table.time_s)
    # |normal(0, 3 %)|: median 2.0 %, 90th percentile 4.9 %
    assert error.median < 0.025
    assert error.p90 < 0.065
    surface = with_spread(planted_surface(), table, held_out.predicted_s)
    widths = surface.half_width(held_out.predicted_s, table.is_aligned)
    assert coverage(np.log(table.time_s / held_out.predicted_s), widths) == pytest.approx(0.9, abs=0.03)


def test_misalignment_penalty_is_found_and_never_below_one():
    surface = planted_surface()
    assert surface.penalty_n == pytest.approx(1.3, rel=0.05)
    assert 1.0 <= surface.penalty_k < 1.05


def test_grid_takes_what_the_formula_lacks():
    table = planted_table(bump=0.3)
    held_out = cross_validate(table, MACHINE, folds=2)
    with_grid = error_statistics(held_out.predicted_s, table.time_s)
    without = error_statistics(held_out.formula_s, table.time_s)
    assert with_grid.p90 < without.p90
    assert with_grid.median < without.median


def test_fitted_surface_never_falls():
    surface = fit_surface(planted_table(bump=0.3), MACHINE)
    generator = np.random.default_rng(3)
    m = np.round(2.0 ** generator.uniform(0, 14, 20_000))
    n, k = (64 * np.round(2.0 ** generator.uniform(0, 9, 20_000)) for _ in range(2))
    here = surface.time_s(m, n, k)
    for there in (surface.time_s(m + 1, n, k), surface.time_s(m, n + 64, k), surface.time_s(m, n, k + 64)):
        assert (there >= here * (1 - 1e-12)).all()


def test_grid_falls_along_no_edge_by_more_than_its_limit():
    table = planted_table(bump=0.4)
    corners, weights = grid_corners(KNOTS, table.m, table.n, table.k)
    shape = tuple(len(axis) for axis in KNOTS)
    edges = grid_edges(shape)
    generator = np.random.default_rng(1)
    limits = generator.uniform(0.0, 0.05, edges.shape[0])
    values = fit_grid(generator.normal(0, 0.3, table.m.size), corners, weights, limits, shape=shape).ravel()
    assert (values[edges[:, 1]] - values[edges[:, 0]] >= -limits - 1e-12).all()


def test_unlimited_grid_recovers_a_planted_grid():
    generator = np.random.default_rng(2)
    shape = tuple(len(axis) for axis in KNOTS)
    planted = generator.normal(0.0, 0.1, int(np.prod(shape)))
    m, n, k = (2.0 ** generator.uniform(axis[0], axis[-1], 20_000) for axis in KNOTS)
    corners, weights = grid_corners(KNOTS, m, n, k)
    residual = (weights * planted[corners]).sum(axis=0)
    limits = np.full(grid_edges(shape).shape[0], 9.0)
    values = fit_grid(residual, corners, weights, limits, shape=shape, ridge=1e-3, shrinkage=1e-3)
    assert np.median(np.abs(values.ravel() - planted)) < 2e-3


def test_limits_are_zero_where_the_formula_is_flat_and_not_where_it_rises():
    limits = drop_limits(PLANTED, MACHINE, KNOTS, probes=100)
    shape = tuple(len(axis) for axis in KNOTS)
    edges = grid_edges(shape)
    assert (limits >= 0).all()
    per_edge = {(int(low), int(high)): limit for (low, high), limit in zip(edges, limits, strict=True)}
    index = np.arange(np.prod(shape)).reshape(shape)
    assert per_edge[int(index[0, 0, 0]), int(index[1, 0, 0])] < 1e-3  # m from 1 to 16 at n = k = 64: one tile
    assert per_edge[int(index[-1, 3, 3]), int(index[-1, 4, 3])] > 0.1  # n from 4096 to 16384 at m = 8192: work grows


def test_formula_is_the_least_of_its_candidates():
    m, n, k = np.array([1.0, 300.0]), np.array([512.0, 4096.0]), np.array([8192.0, 640.0])
    least = np.min([times.min(axis=0) for times in candidate_times_s(PLANTED, MACHINE, m, n, k)], axis=0)
    assert core_time_s(PLANTED, MACHINE, m, n, k).tolist() == least.tolist()


def test_machine_comes_from_the_profile():
    assert machine_of_device("h100_sxm") == GemmMachine(989e12, 3.35e12, 132.0, 50 * 2**20)


@cache
def written_table() -> bytes:
    table = planted_table()
    lines = ["m,n,k,time_us"]
    columns = zip(table.m, table.n, table.k, table.time_s * 1e6, strict=True)
    lines += [f"{m:.0f},{n:.0f},{k:.0f},{time_us:.4f}" for m, n, k, time_us in columns]
    return gzip.compress("\n".join(lines).encode())


@pytest.mark.slow
def test_validation_writes_report_summary_and_surface(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "h100_sxm_gemm_bf16.csv.gz").write_bytes(written_table())
    fitted = fit_gemm_tables(data, seed=3, folds=2)
    validation = validate_gemm(data, seed=3, fitted=fitted)
    assert validation.failures == []
    report, summary = write_kernel_report(validation, out)
    text = report.read_text(encoding="utf-8")
    assert "seed 3" in text
    assert text == kernel_report(validation)
    assert text.count("\n| n ") == 10
    rows = list(csv.DictReader(summary.read_text(encoding="utf-8").splitlines()))
    assert {row["rows"] for row in rows} == set(gemm_regimes(fitted[0].table))
    assert GEMM_TARGETS["h100_sxm"]["all"][0] > float(rows[0]["median"])
    [path] = write_gemm_surfaces(fitted, out, seed=3)
    assert path.stat().st_size < 8000
    sizes = (np.array([1, 77, 4096]), 4096, 1024)
    assert read_surface(path).time_s(*sizes) == pytest.approx(fitted[0].surface.time_s(*sizes), rel=1e-12)


def test_missed_target_is_a_failure(tmp_path):
    table = planted_table(noise=0.2)
    (tmp_path / "h200_sxm_gemm_bf16.csv").write_text(
        "m,n,k,time_us\n"
        + "".join(
            f"{m:.0f},{n:.0f},{k:.0f},{time_us:.4f}\n"
            for m, n, k, time_us in zip(table.m, table.n, table.k, table.time_s * 1e6, strict=True)
        ),
        encoding="utf-8",
    )
    [failure] = validate_gemm(tmp_path, fitted=fit_gemm_tables(tmp_path, folds=2)).failures
    assert failure.startswith("h200_sxm, all: ")
    assert "exceeds 4.0% / 11.0%" in failure


def test_table_is_read_in_seconds():
    table = gemm_table({"m": np.array([1]), "n": np.array([64]), "k": np.array([64]), "time_us": np.array([2.5])})
    assert table.time_s == pytest.approx([2.5e-6])
    assert table.flops.tolist() == [2 * 64 * 64]
