from __future__ import annotations

import numpy as np
import pytest

from moesim.study.interval_checks import RatioRow, interval_checks, ratio_range, weighted_quantile


def rows_of(group: str, ratios: list[float], stack_class: str = "current") -> list[RatioRow]:
    return [RatioRow(ratio, group, stack_class) for ratio in ratios]


def test_every_group_weighs_the_same_however_many_rows_it_has() -> None:
    many = rows_of("many", [1.1] * 1000)
    few = rows_of("few", [2.0])
    other = rows_of("other", [0.5])
    assert ratio_range(many + few + other) == (0.5, 2.0)


def test_a_range_always_holds_the_prediction_itself() -> None:
    assert ratio_range(rows_of("slow", [1.5, 1.6]) + rows_of("slower", [2.0])) == (1.0, 2.0)


def test_weighted_quantile_with_equal_weights_is_an_order_statistic() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    assert weighted_quantile(values, np.ones(100), 0.05) == 5.0
    assert weighted_quantile(values, np.ones(100), 0.95) == 95.0


def test_coverage_counts_only_groups_that_did_not_make_the_range() -> None:
    """Of three groups the middle one lies inside what the others give; each end lies outside."""
    (check,) = interval_checks(rows_of("low", [0.5]) + rows_of("middle", [1.2]) + rows_of("high", [2.0]))
    assert (check.low, check.high) == (0.5, 2.0)
    assert check.coverage == pytest.approx(1 / 3)


def test_nothing_is_said_of_a_single_group() -> None:
    assert interval_checks(rows_of("alone", [1.0, 2.0])) == []


def test_draws_of_one_distribution_are_covered_nine_times_in_ten() -> None:
    generator = np.random.default_rng(1)
    rows = [row for group in range(200) for row in rows_of(str(group), [float(np.exp(generator.normal(0.0, 0.3)))])]
    (check,) = interval_checks(rows)
    assert check.coverage == pytest.approx(0.9, abs=0.03)
