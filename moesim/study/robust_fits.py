"""Least squares that outliers cannot pull: positive parameters, their covariance, and which of them nothing fixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import FloatArray

OUTLIER_SCALE = 0.1
"""|log error| beyond which a case counts linearly."""
LARGEST_ERROR = 0.5
"""Relative standard error above which a parameter counts as not determined."""
MEDIAN_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
SMALLEST_SPREAD = 1e-4
"""Floor of the spread of residuals: measured times are not exact."""
SCALE_OVER_SPREAD = 1.5
AT_BOUND = 1e-3
STEP = 1e-4
"""Step of a logarithm that derivatives are taken over."""

Values = Mapping[str, float]


@dataclass(frozen=True)
class Parameter:
    """A positive constant to fit: where the search starts and what it may not leave."""

    name: str
    start: float
    low: float
    high: float


@dataclass(frozen=True)
class RobustFit:
    """Fitted constants.

    Attributes
    ----------
    values : mapping of str to float
        By parameter; those that nothing fixes keep their start.
    standard_errors : mapping of str to float
        Relative, of the parameters that were fitted.
    covariance : ndarray of shape (n_fitted, n_fitted)
        Of the logarithms of the fitted parameters, in the order of ``standard_errors``.
    spread : float
        Robust standard deviation of log(predicted / measured).
    refused : mapping of str to str
        Parameters that were not fitted, and why.
    num_cases : int
        Cases of the fit.
    """

    values: Values
    standard_errors: Values
    covariance: FloatArray
    spread: float
    refused: Mapping[str, str]
    num_cases: int


def fit_robustly(
    parameters: Sequence[Parameter], log_ratios: Callable[[Values], FloatArray], *, num_cases: int
) -> RobustFit:
    """Fit positive parameters to log(predicted / measured) = 0 under a loss that is linear for outliers.

    Parameters
    ----------
    parameters : sequence of Parameter
        What to fit.
    log_ratios : callable
        Values of all parameters to log(predicted / measured), an array of shape (num_cases,).
    num_cases : int
        Cases, for the number of degrees of freedom.

    Returns
    -------
    RobustFit
        Values; parameters that the cases do not determine are refused by name and keep their start.

    Notes
    -----
    Soft L1 (scipy.optimize.least_squares) in the logarithms of the parameters, at a scale of 1.5 spreads of the
    residuals (median absolute deviation times 1.4826); variances the larger of s² (Jᵀ ψ' J)⁻¹ and the
    sandwich (Jᵀ ψ' J)⁻¹ (Jᵀ ψ² J) (Jᵀ ψ' J)⁻¹ with the influence ψ = r / sqrt(1 + (r / scale)²) and s the spread, times
    n / (n - p) for degrees of freedom. A parameter is refused where its column
    of J is null or its standard error above 50 %, the worst one first, and the others are fitted again; one whose best
    value is a bound of its range is refused as well.
    """
    refused: dict[str, str] = {}
    free = list(parameters)
    fixed = {one.name: one.start for one in parameters}
    while free:
        if num_cases <= len(free):
            refused[free[-1].name] = f"{num_cases} cases do not fix {len(free)} parameters"
            free = free[:-1]
            continue
        values, covariance, spread = _solve(free, fixed, log_ratios, num_cases)
        why = _worst(free, values, covariance)
        if why is None:
            errors = np.sqrt(np.diag(covariance))
            named = {one.name: float(error) for one, error in zip(free, errors, strict=True)}
            return RobustFit({**fixed, **values}, named, covariance, spread, refused, num_cases)
        worst, reason = why
        refused[worst.name] = reason
        free = [one for one in free if one.name != worst.name]
    spread = _spread(log_ratios(fixed)) if num_cases else 0.0
    return RobustFit(fixed, {}, np.zeros((0, 0)), spread, refused, num_cases)


def _solve(
    free: Sequence[Parameter], fixed: Values, log_ratios: Callable[[Values], FloatArray], num_cases: int
) -> tuple[dict[str, float], FloatArray, float]:
    from scipy.optimize import least_squares

    names = [one.name for one in free]

    def residuals(logs: FloatArray) -> FloatArray:
        return log_ratios({**fixed, **dict(zip(names, np.exp(logs).tolist(), strict=True))})

    low, high = (np.log([getattr(one, bound) for one in free]) for bound in ("low", "high"))
    start = np.clip(np.log([one.start for one in free]), low + AT_BOUND, high - AT_BOUND)
    steps = [STEP] * len(free)

    def solve(begin: FloatArray, scale: float) -> FloatArray:
        found = least_squares(residuals, begin, bounds=(low, high), loss="soft_l1", f_scale=scale, diff_step=steps)
        return np.asarray(found.x)

    wide = solve(start, OUTLIER_SCALE)  # finds the spread of all but outliers, which then sets the scale
    scale = max(SCALE_OVER_SPREAD * _spread(residuals(wide)), SMALLEST_SPREAD)
    best = solve(np.clip(wide, low + AT_BOUND**2, high - AT_BOUND**2), scale)
    at = residuals(best)
    spread = _spread(at) * float(np.sqrt(num_cases / (num_cases - len(free))))
    jacobian = np.stack([(residuals(best + step) - at) / STEP for step in STEP * np.eye(len(free))], axis=1)
    covariance = _covariance(jacobian, at, scale) * (num_cases / (num_cases - len(free)))
    return dict(zip(names, np.exp(best).tolist(), strict=True)), covariance, spread


def _covariance(jacobian: FloatArray, residuals: FloatArray, scale: float) -> FloatArray:
    """Covariance of an M-estimate: correlations of the information, variances the larger of two estimates.

    The sandwich (slopes of the influence outside, its squares inside) knows what outliers add; the spread over the
    information knows what a constant costs that a single case fixes, whose residual is then null.
    """
    stretch = 1.0 + (residuals / scale) ** 2
    influence, slope = residuals / np.sqrt(stretch), stretch**-1.5
    outside = _inverse(jacobian.T @ (jacobian * slope[:, None]))
    inside = jacobian.T @ (jacobian * influence[:, None] ** 2)
    plain = _spread(residuals) ** 2 * outside
    if not np.isfinite(outside).all():
        return plain
    sandwich = outside @ inside @ outside
    widening = np.sqrt(np.maximum(np.diag(sandwich) / np.diag(plain), 1.0))
    return np.asarray(plain * np.outer(widening, widening))


def _inverse(information: FloatArray) -> FloatArray:
    """Inverse of a positive matrix; infinite variances where it is singular."""
    scale = np.sqrt(np.diag(information))
    if (scale <= 0).any():
        return np.diag(np.where(scale > 0, 0.0, np.inf))
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    inverse = vectors @ np.diag(1.0 / np.maximum(values, 1e-12)) @ vectors.T
    return np.asarray(inverse / np.outer(scale, scale))


def _spread(residuals: FloatArray) -> float:
    return max(float(np.median(np.abs(residuals))) * MEDIAN_TO_DEVIATION, SMALLEST_SPREAD)


def _worst(free: Sequence[Parameter], values: Values, covariance: FloatArray) -> tuple[Parameter, str] | None:
    """Least determined parameter with the reason; None if all are determined."""
    errors = np.sqrt(np.diag(covariance))
    index = int(np.argmax(errors))
    if not errors[index] <= LARGEST_ERROR:
        found = "no case depends on it" if not np.isfinite(errors[index]) else f"standard error {errors[index]:.0%}"
        return free[index], found
    for one in free:
        place = (np.log(values[one.name]) - np.log(one.low)) / (np.log(one.high) - np.log(one.low))
        if not AT_BOUND < place < 1 - AT_BOUND:
            return one, f"its best value is a bound of its range, {one.low:g} to {one.high:g}"
    return None
