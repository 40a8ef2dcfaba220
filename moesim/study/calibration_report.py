"""A calibration in words and as JSON: constants with errors, held-out errors, covariance, what was refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.describe.hardware import ElementwiseKernels
from moesim.structure.columns import FloatArray
from moesim.study.calibration import Calibration
from moesim.study.kernel_calibration import FittedKernel
from moesim.study.link_calibration import FittedLevel
from moesim.study.overlap_calibration import HiddenShare
from moesim.study.robust_fits import RobustFit


@dataclass(frozen=True)
class CalibrationResult:
    """Everything one run of ``moesim calibrate`` found.

    ``host`` has launch and synchronisation times of the software, ``refused`` what no case was there for,
    ``elementwise`` the stack's kernels where the cases show them, ``overlap`` what hides beside compute,
    ``grouped_fraction`` the rate of grouped products over that of GEMMs.
    """

    calibration: Calibration | None
    kernels: Sequence[FittedKernel]
    levels: Sequence[FittedLevel]
    host: dict[str, float]
    refused: dict[str, str]
    elementwise: ElementwiseKernels | None = None
    overlap: Sequence[HiddenShare] = ()
    grouped_fraction: float | None = None

    def parts(self) -> list[tuple[str, RobustFit, FloatArray]]:
        """Name, fit and held-out log errors of every block."""
        blocks = self.calibration.blocks if self.calibration else ()
        found = [(block.name, block.fit, block.held_out) for block in blocks]
        found += [(f"attention {one.library} {one.pass_name}", one.fit, one.held_out) for one in self.kernels]
        found += [(f"links {one.level} {one.family}", one.fit, one.held_out) for one in self.levels]
        return found

    def all_refused(self) -> dict[str, str]:
        """Constants that were not fitted, by block and name, and why."""
        found = {f"{name}: {key}": why for name, fit, _ in self.parts() for key, why in fit.refused.items()}
        found |= {f"overlap {one.collective}": one.refused for one in self.overlap if one.refused}
        return {**found, **self.refused}

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON object."""
        return {
            "schema_version": 1,
            "blocks": [_block_json(*part) for part in self.parts()],
            "host_s": self.host,
            "grouped_fraction": self.grouped_fraction,
            "overlap": [
                {"collective": one.collective, "hidden_share": one.share, "standard_error": one.standard_error}
                for one in self.overlap
                if not one.refused
            ],
            "elementwise": self.elementwise.model_dump() if self.elementwise else None,
            "refused": self.all_refused(),
        }


def _block_json(name: str, fit: RobustFit, held_out: FloatArray) -> dict[str, Any]:
    errors = np.abs(np.expm1(held_out))
    return {
        "name": name,
        "num_cases": fit.num_cases,
        "values": dict(fit.values),
        "standard_errors": dict(fit.standard_errors),
        "covariance_of_logs": fit.covariance.tolist(),
        "spread": fit.spread,
        "held_out": {
            "count": int(errors.size),
            "median": float(np.median(errors)) if errors.size else None,
            "p90": float(np.quantile(errors, 0.9)) if errors.size else None,
            "coverage": float(np.mean(np.abs(held_out) <= 1.645 * fit.spread)) if errors.size else None,
        },
    }


def calibration_text(result: CalibrationResult) -> str:
    """Return the result as text for people."""
    lines: list[str] = []
    for name, fit, held_out in result.parts():
        errors = np.abs(np.expm1(held_out))
        left_out = (
            f"shapes left out: median {np.median(errors):.1%}, 90th percentile {np.quantile(errors, 0.9):.1%}"
            if errors.size
            else "no shape could be left out"
        )
        lines.append(f"{name}: {fit.num_cases} cases, spread {fit.spread:.1%}; {left_out}")
        lines += [f"  {key} = {fit.values[key]:.4g} +- {error:.1%}" for key, error in fit.standard_errors.items()]
        lines += _correlations(fit)
    lines += [
        f"overlap {one.collective}: {one.share:.0%} +- {one.standard_error:.0%} hidden, {one.num_pairs} pairs"
        for one in result.overlap
        if not one.refused
    ]
    lines += [f"host: {name} = {seconds:.4g} s" for name, seconds in result.host.items()]
    lines += [f"refused: {name}: {why}" for name, why in result.all_refused().items()]
    return "\n".join(lines)


def _correlations(fit: RobustFit) -> list[str]:
    """Pairs of constants that the cases can hardly tell apart."""
    names, found = list(fit.standard_errors), []
    for row in range(len(names)):
        for column in range(row):
            deviation = math.sqrt(fit.covariance[row, row] * fit.covariance[column, column])
            correlation = fit.covariance[row, column] / deviation if deviation else 0.0
            if abs(correlation) > 0.8:
                found.append(f"  {names[column]} and {names[row]} correlate by {correlation:+.2f}")
    return found
