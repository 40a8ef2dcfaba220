"""Hidden shares from each alone and both at once."""

from __future__ import annotations

import pytest

from moesim.study.measured_cases import MeasuredCase
from moesim.study.overlap_calibration import hidden_shares


def triple(collective: str, size: int, compute: float, communicate: float, together: float):
    shape = {"ranks": 4, "compute": "gemm", "collective": collective, "size": size}
    times = {"compute": compute, "collective": communicate, "together": together}
    return [
        MeasuredCase(f"{part}{size}", "overlap", part, "forward", "bf16", shape, 0, 0, time_s, 0, 5, "", "")
        for part, time_s in times.items()
    ]


def test_half_of_the_shorter_hides_where_half_of_it_is_saved_and_an_outlier_does_not_pull():
    cases = [one for size in range(5) for one in triple("all_to_all", size, 10.0, 4.0 + size, 10.0 + (4.0 + size) / 2)]
    (found,) = hidden_shares([*cases, *triple("all_to_all", 9, 10.0, 8.0, 90.0)])
    assert found.share == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(0.0)
    assert found.num_pairs == 6


def test_short_partners_and_missing_parts_are_no_pairs_and_too_few_are_refused():
    cases = [*triple("all_reduce", 1, 10.0, 0.5, 10.0), *triple("all_reduce", 2, 10.0, 8.0, 12.0)[:2]]
    (found,) = hidden_shares([*cases, *triple("all_reduce", 3, 10.0, 8.0, 12.0)])
    assert found.num_pairs == 1
    assert "3 are needed" in found.refused
