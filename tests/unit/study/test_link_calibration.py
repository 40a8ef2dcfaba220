"""Alpha and beta of levels of links from collectives."""

from __future__ import annotations

import numpy as np
import pytest
from measured_files import result, write_records

from moesim.formats.measurement_records import read_measurements
from moesim.study.link_calibration import LinkCase, fit_links, link_cases

ALPHA, BETA = 30e-6, 20e9
SIZES = [2.0**power for power in range(10, 28, 2)]


def cases(kind, ranks, *, seed=None, level="node"):
    """Times of the textbook: 2(n - 1) rounds of an all-reduce over a ring, one round of an all-to-all."""
    generator = np.random.default_rng(seed)
    found = []
    for size in SIZES:
        rounds = {"all_reduce": 2 * (ranks - 1), "all_gather": ranks - 1, "all_to_all": 1}[kind]
        moved = {"all_reduce": 2.0, "all_gather": 1.0, "all_to_all": 1.0}[kind] * (ranks - 1) / ranks * size
        time_s = rounds * ALPHA + moved / BETA
        if seed is not None:
            time_s *= np.exp(0.03 * generator.normal()) * (4.0 if generator.random() < 0.05 else 1.0)
        found.append(LinkCase(level, kind, ranks, size, time_s))
    return found


def test_planted_latency_and_bandwidth_of_rings_come_back_exactly():
    (level,) = fit_links(cases("all_reduce", 8) + cases("all_gather", 4))
    assert (level.level, level.family) == ("node", "reductions")
    assert level.alpha_s == pytest.approx(ALPHA, rel=1e-4)
    assert level.beta_bytes_per_s == pytest.approx(BETA, rel=1e-4)
    assert np.abs(level.held_out).max() < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_noise_and_outliers_leave_them_within_three_stated_errors(seed):
    measured = [case for ranks in (2, 4, 8) for case in cases("all_reduce", ranks, seed=seed + ranks)]
    (level,) = fit_links(measured)
    for name, planted in (("alpha_s", ALPHA), ("beta_bytes_per_s", BETA)):
        assert abs(np.log(level.fit.values[name] / planted)) < 3 * level.fit.standard_errors[name] + 1e-9


def test_levels_and_families_are_fitted_apart():
    levels = fit_links([*cases("all_reduce", 8), *cases("all_to_all", 8), *cases("all_reduce", 4, level="network")])
    assert [(one.level, one.family) for one in levels] == [
        ("node", "reductions"),
        ("node", "exchanges"),
        ("network", "reductions"),
    ]


def test_messages_of_one_size_refuse_both_by_name():
    same = [LinkCase("node", "all_reduce", ranks, 2.0**20, 1e-4 * ranks) for ranks in (2, 4, 8, 16)]
    (level,) = fit_links(same)
    assert level.alpha_s is None
    assert level.beta_bytes_per_s is None
    assert "do not tell a latency from a bandwidth" in level.fit.refused["alpha_s"]


def test_small_messages_alone_refuse_the_bandwidth():
    small = [
        LinkCase("node", "all_reduce", ranks, size, 2 * (ranks - 1) * ALPHA) for ranks in (2, 4) for size in (8, 64)
    ]
    (level,) = fit_links(small)
    assert level.beta_bytes_per_s is None


def test_records_of_the_suite_become_cases_and_skewed_ones_are_left_out(tmp_path):
    shape = {"ranks": 4, "size": 1048576}
    records = [
        result("collectives", "ping_pong", "forward", shape, median_s=5e-4),
        result("collectives", "all_to_all+all_reduce", "forward", shape, median_s=2e-3),
        result("collectives", "all_to_all", "forward", shape, median_s=1e-3),
        result("collectives", "all_to_all", "forward", {**shape, "preset": "W2"}, median_s=2e-3),
        result("gemm", "gemm", "forward", {"m": 1, "n": 1, "k": 1}),
    ]
    found = link_cases(read_measurements(write_records(tmp_path / "a.jsonl", records)).cases)
    assert found == [
        LinkCase("links", "point_to_point", 4, 1048576.0, 5e-4),
        LinkCase("links", "all_to_all", 4, 1048576.0, 1e-3),
    ]
