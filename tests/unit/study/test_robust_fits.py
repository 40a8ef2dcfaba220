"""Robust fits: planted constants come back, outliers do not pull, and what nothing fixes is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.study.robust_fits import Parameter, fit_robustly

SIZES = np.geomspace(1e3, 1e9, 60)
PLANTED = {"latency": 2e-5, "rate": 5e10}
PARAMETERS = [Parameter("latency", 1e-3, 1e-9, 1.0), Parameter("rate", 1e9, 1e3, 1e15)]


def model(values):
    return values["latency"] + SIZES / values["rate"]


def measured(seed: int, noise: float = 0.03, outliers: float = 0.05):
    generator = np.random.default_rng(seed)
    times = model(PLANTED) * np.exp(noise * generator.normal(size=SIZES.size))
    is_outlier = generator.random(SIZES.size) < outliers
    return np.where(is_outlier, times * generator.uniform(2, 5, SIZES.size), times)


@pytest.mark.parametrize("seed", range(8))
def test_planted_constants_come_back_within_three_stated_errors_despite_noise_and_outliers(seed):
    times = measured(seed)
    fit = fit_robustly(PARAMETERS, lambda values: np.log(model(values) / times), num_cases=times.size)
    assert fit.refused == {}
    for name, planted in PLANTED.items():
        assert abs(np.log(fit.values[name] / planted)) < 3 * fit.standard_errors[name] < 0.1
    assert 0.02 < fit.spread < 0.045


def test_stated_errors_are_neither_far_too_small_nor_far_too_large():
    """Pulls of 40 draws: their mean square is 1 within its own error of about 0.22 (Student's tails included)."""
    pulls = []
    for seed in range(40):
        times = measured(100 + seed, outliers=0.0)
        fit = fit_robustly(PARAMETERS, lambda values, t=times: np.log(model(values) / t), num_cases=times.size)
        pulls += [np.log(fit.values[name] / PLANTED[name]) / fit.standard_errors[name] for name in PLANTED]
    assert 0.5 < np.mean(np.square(pulls)) < 2.0


def test_least_squares_alone_would_be_pulled():
    """The test above can fail: with plain squares the same outliers move the rate by many of its stated errors."""
    times = measured(3, outliers=0.2)
    fit = fit_robustly(PARAMETERS, lambda values: np.log(model(values) / times), num_cases=times.size)
    plain = float(np.exp(np.mean(np.log(SIZES[-20:] / times[-20:]))))
    assert abs(np.log(fit.values["rate"] / PLANTED["rate"])) < 0.5 * abs(np.log(plain / PLANTED["rate"]))


def test_a_constant_that_no_case_depends_on_is_refused_and_the_others_are_fitted():
    times = measured(0)
    extra = [*PARAMETERS, Parameter("colour", 3.0, 1.0, 10.0)]
    fit = fit_robustly(extra, lambda values: np.log(model(values) / times), num_cases=times.size)
    assert fit.refused == {"colour": "no case depends on it"}
    assert fit.values["colour"] == 3.0
    assert set(fit.standard_errors) == set(PLANTED)
    assert fit.covariance.shape == (2, 2)


def test_constants_that_only_appear_as_a_product_are_not_both_fitted():
    times = measured(0)
    two = [Parameter("rate", 1e9, 1e3, 1e15), Parameter("share", 0.5, 0.01, 1000.0)]

    def log_ratios(values):
        return np.log((2e-5 + SIZES / (values["rate"] * values["share"])) / times)

    fit = fit_robustly(two, log_ratios, num_cases=times.size)
    assert len(fit.refused) == 1
    assert len(fit.standard_errors) == 1


def test_fewer_cases_than_constants_refuse_the_last_ones():
    fit = fit_robustly(PARAMETERS, lambda values: np.log(model(values)[:2] / model(PLANTED)[:2]), num_cases=2)
    assert "2 cases do not fix 2 parameters" in fit.refused.values()


def test_a_best_value_at_the_end_of_its_range_is_refused():
    times = model(PLANTED)
    slow = [PARAMETERS[0], Parameter("rate", 1e9, 1e3, 2e10)]
    fit = fit_robustly(slow, lambda values: np.log(model(values) / times), num_cases=times.size)
    assert "bound of its range" in fit.refused["rate"]
