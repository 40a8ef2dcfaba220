"""A measured case with its prediction, and errors of many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.study.measured_cases import MeasuredCase

WIDEST = 6.0
"""Half width above which an interval says nothing and its ends would overflow."""


@dataclass(frozen=True)
class ComparedCase:
    """A measured case with its prediction; ``half_width`` is that of the interval of log(measured / predicted)."""

    case: MeasuredCase
    predicted_s: float
    half_width: float

    @property
    def error(self) -> float:
        """Predicted over measured less one."""
        return self.predicted_s / self.case.median_s - 1.0

    @property
    def log_ratio(self) -> float:
        """Natural logarithm of predicted over measured: alike for twice as long and half as long."""
        return math.log(self.predicted_s / self.case.median_s)

    @property
    def is_covered(self) -> bool:
        """Whether the measured time lies in the interval."""
        return abs(self.log_ratio) <= self.half_width

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of the case."""
        width = math.exp(min(self.half_width, WIDEST))
        return {
            "case": self.case.case,
            "suite": self.case.suite,
            "operation": self.case.operation,
            "pass": self.case.pass_name,
            "measured_s": self.case.median_s,
            "predicted_s": self.predicted_s,
            "error": self.error,
            "low_s": self.predicted_s / width,
            "high_s": self.predicted_s * width,
            "is_covered": self.is_covered,
        }


@dataclass(frozen=True)
class ErrorStatistics:
    """Errors of some cases: |predicted / measured - 1| median and 90th percentile, median error, share covered."""

    num_cases: int
    median: float
    p90: float
    bias: float
    coverage: float

    def to_json(self) -> dict[str, float | int]:
        """Return the numbers."""
        return {
            "num_cases": self.num_cases,
            "median": self.median,
            "p90": self.p90,
            "bias": self.bias,
            "coverage": self.coverage,
        }


def error_statistics(compared: Sequence[ComparedCase]) -> ErrorStatistics:
    """Statistics of some cases, at least one."""
    errors = np.array([one.error for one in compared])
    covered = float(np.mean([one.is_covered for one in compared]))
    absolute = np.abs(errors)
    return ErrorStatistics(
        len(compared), float(np.median(absolute)), float(np.quantile(absolute, 0.9)), float(np.median(errors)), covered
    )


@dataclass(frozen=True)
class MemoryCase:
    """A training step's peak: bytes of tensors measured and predicted, without what the runtime holds beside them."""

    case: MeasuredCase
    predicted_bytes: float
    measured_bytes: float

    @property
    def error(self) -> float:
        """Predicted over measured less one."""
        return self.predicted_bytes / self.measured_bytes - 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of the case."""
        return {
            "case": self.case.case,
            "measured_bytes": self.measured_bytes,
            "predicted_bytes": self.predicted_bytes,
            "error": self.error,
        }
