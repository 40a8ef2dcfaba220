"""Ranges of measured over predicted step times by class of stacks, judged on groups that did not make them.

Rows of one source and model share hardware, software and bias, so a group is left out as a whole, and every group
weighs the same in a quantile however many rows it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import FloatArray

LOW_QUANTILE, HIGH_QUANTILE = 0.05, 0.95


@dataclass(frozen=True)
class RatioRow:
    """Measured over predicted step time of one row, the group it belongs to and the class of its stack."""

    ratio: float
    group: str
    stack_class: str


@dataclass(frozen=True)
class IntervalCheck:
    """Range of one class of stacks and how often left-out rows lie inside.

    ``low`` and ``high`` are quantiles over all groups, never above and below one; ``coverage`` is the mean over groups
    of the share of their rows inside the range that the other groups make.
    """

    stack_class: str
    groups: int
    rows: int
    low: float
    high: float
    coverage: float


def ratio_range(rows: Sequence[RatioRow]) -> tuple[float, float]:
    """5th and 95th percentile of the ratios, each group weighing the same, one inside."""
    ratios = np.array([row.ratio for row in rows])
    names, counts = np.unique([row.group for row in rows], return_counts=True)
    size = dict(zip(names.tolist(), counts.tolist(), strict=True))
    weights = np.array([1.0 / size[row.group] for row in rows])
    low, high = (weighted_quantile(ratios, weights, level) for level in (LOW_QUANTILE, HIGH_QUANTILE))
    return min(low, 1.0), max(high, 1.0)


def weighted_quantile(values: FloatArray, weights: FloatArray, level: float) -> float:
    """Smallest value at which the weights of it and all smaller ones reach a share of their sum."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(share, level - 1e-12)), len(values) - 1)])


def interval_checks(rows: Sequence[RatioRow]) -> list[IntervalCheck]:
    """Range and left-out coverage of every class of stacks with at least two groups."""
    checks = []
    for name in sorted({row.stack_class for row in rows}):
        members = [row for row in rows if row.stack_class == name]
        groups = sorted({row.group for row in members})
        if len(groups) < 2:
            continue
        shares = []
        for group in groups:
            low, high = ratio_range([row for row in members if row.group != group])
            inside = [low <= row.ratio <= high for row in members if row.group == group]
            shares.append(float(np.mean(inside)))
        low, high = ratio_range(members)
        checks.append(IntervalCheck(name, len(groups), len(members), low, high, float(np.mean(shares))))
    return checks
