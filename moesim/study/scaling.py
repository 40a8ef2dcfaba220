"""Step time, throughput and cost of one scenario against the number of devices: weak and strong scaling.

Devices are the scenario's times powers of two. Tensor, context, pipeline and expert-tensor degrees are kept, the data
degree follows. The expert degree is kept too, until a stage has too few devices for it; then it shrinks with them. Weak
scaling keeps the sequences per device, strong scaling the sequences per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesim.describe.scenario import Scenario
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario
from moesim.estimation.step_estimate import StepEstimate
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.group_tables import group_columns_table
from moesim.structure.legality import legality_rules, resolve_columns
from moesim.units import format_quantity

Mode = Literal["weak", "strong"]
Verdict = Literal["ok", "does_not_fit", "illegal"]

MEMORY = "memory"


@dataclass(frozen=True)
class PointVerdict:
    """Whether a point is legal and fits; ``rule`` is a sweep's short reason, ``reason`` a sentence; empty if ok."""

    verdict: Verdict
    rule: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ScalingCurve:
    """One way of scaling; every array has shape (n_points,), by growing number of devices.

    Attributes
    ----------
    mode : str
        ``weak`` or ``strong``.
    devices : ndarray of int
        Devices of each point.
    expert_degrees : ndarray of int
        Expert degree of each point, the same for both ways of scaling; the scenario's own where the devices do not
        divide into its stages, which is illegal.
    points : tuple of PointVerdict
        What is wrong with each point, if anything.
    step_time_s, lower_s, upper_s, tokens_per_s, usd_per_billion_tokens, memory_peak_bytes : ndarray
        As ``estimate`` gives them; NaN where a point is illegal, and costs where no price is known.
    ideal_step_time_s, ideal_tokens_per_s, ideal_usd_per_billion_tokens : ndarray
        Perfect scaling from the scenario itself, illegal points included.
    """

    mode: Mode
    devices: IntArray
    expert_degrees: IntArray
    points: tuple[PointVerdict, ...]
    step_time_s: FloatArray
    lower_s: FloatArray
    upper_s: FloatArray
    tokens_per_s: FloatArray
    usd_per_billion_tokens: FloatArray
    memory_peak_bytes: FloatArray
    ideal_step_time_s: FloatArray
    ideal_tokens_per_s: FloatArray
    ideal_usd_per_billion_tokens: FloatArray

    @property
    def efficiency_fraction(self) -> FloatArray:
        """Throughput over that of perfect scaling, shape (n_points,)."""
        return self.tokens_per_s / self.ideal_tokens_per_s


@dataclass(frozen=True)
class Scaling:
    """Weak and strong scaling of a scenario, starting from its own estimate ``base``."""

    base: StepEstimate
    weak: ScalingCurve
    strong: ScalingCurve

    @property
    def curves(self) -> tuple[ScalingCurve, ScalingCurve]:
        """Both curves, weak first."""
        return self.weak, self.strong


def scaling_from(loaded: LoadedScenario) -> Scaling:
    """Estimate a scenario on fewer and on more devices.

    Parameters
    ----------
    loaded : LoadedScenario
        Where perfect scaling starts. Its own hardware is used: no profile is read again.

    Returns
    -------
    Scaling
        Illegal and oversized points are part of it, each with its reason.

    Notes
    -----
    On f times the devices, perfect weak scaling keeps the step time, perfect strong scaling divides it by f; both
    multiply tokens per second by f and keep the cost of a token.
    """
    base = estimate_loaded(loaded)
    counts = device_counts(base.num_devices, loaded.system.cluster.device_count)
    return Scaling(base, _curve(loaded, base, "weak", counts), _curve(loaded, base, "strong", counts))


def device_counts(base_devices: int, cluster_devices: int) -> IntArray:
    """Whole multiples and fractions of a number of devices by powers of two, up to the cluster; shape (n_points,).

    Examples
    --------
    >>> device_counts(12, 48)
    array([ 3,  6, 12, 24, 48])
    """
    counts = [base_devices]
    while counts[0] % 2 == 0:
        counts.insert(0, counts[0] // 2)
    while counts[-1] * 2 <= cluster_devices:
        counts.append(counts[-1] * 2)
    return np.array(counts, dtype=np.int64)


def _curve(loaded: LoadedScenario, base: StepEstimate, mode: Mode, counts: IntArray) -> ScalingCurve:
    factor = counts / base.num_devices  # a power of two: exact
    scaled = [_scaled(loaded.scenario, mode, int(count), base.num_devices) for count in counts]
    found = [_point(loaded, scenario) for scenario in scaled]
    estimates = [estimate for _, estimate in found]
    usd = base.cost.usd_per_billion_tokens
    return ScalingCurve(
        mode=mode,
        devices=counts,
        expert_degrees=np.array([scenario.parallelism.expert for scenario in scaled], dtype=np.int64),
        points=tuple(point for point, _ in found),
        step_time_s=_measures(estimates, lambda answer: answer.step_time_s),
        lower_s=_measures(estimates, lambda answer: answer.lower_s),
        upper_s=_measures(estimates, lambda answer: answer.upper_s),
        tokens_per_s=_measures(estimates, lambda answer: answer.tokens_per_s),
        usd_per_billion_tokens=_measures(estimates, lambda answer: answer.cost.usd_per_billion_tokens),
        memory_peak_bytes=_measures(estimates, lambda answer: answer.memory.peak),
        ideal_step_time_s=base.step_time_s / (factor if mode == "strong" else np.ones(len(counts))),
        ideal_tokens_per_s=base.tokens_per_s * factor,
        ideal_usd_per_billion_tokens=np.full(len(counts), np.nan if usd is None else usd),
    )


def _measures(estimates: Sequence[StepEstimate | None], measure: Callable[[StepEstimate], float | None]) -> FloatArray:
    """One measure of every point, NaN where there is no estimate or the estimate has none."""
    values = [None if estimate is None else measure(estimate) for estimate in estimates]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _scaled(scenario: Scenario, mode: Mode, devices: int, base_devices: int) -> Scenario:
    """Scenario on another number of devices, legal or not."""
    # A multiple of the data degree, so whole wherever that is; where it is not, the degrees break their rule first.
    per_step: float = scenario.workload.sequences_per_step * (devices / base_devices if mode == "weak" else 1)
    degrees = {"data": "auto", "expert": _expert_degree(scenario, devices)}
    return scenario.model_copy(
        update={
            "devices": devices,
            "workload": scenario.workload.model_copy(update={"sequences_per_step": per_step}),
            "parallelism": scenario.parallelism.model_copy(update=degrees),
        }
    )


def _expert_degree(scenario: Scenario, devices: int) -> int:
    """Expert degree on a number of devices: the scenario's own, or as much of it as the devices of a stage allow."""
    parallelism = scenario.parallelism
    ranks, rest = divmod(devices, parallelism.expert_tensor * parallelism.pipeline.stages)
    return parallelism.expert if rest else math.gcd(parallelism.expert, ranks)


def _point(loaded: LoadedScenario, scaled: Scenario) -> tuple[PointVerdict, StepEstimate | None]:
    """Verdict of one number of devices, and the estimate if it is legal."""
    system = replace(loaded.system, scenario=scaled)
    columns = resolve_columns(group_columns_table(scaled, {}, 1))
    for rule in legality_rules(scaled, system.cluster, columns):
        if rule.breaks[0]:
            return PointVerdict("illegal", rule.name, rule.text(rule.message, columns, 0)), None
    estimate = estimate_loaded(replace(loaded, scenario=scaled, system=system, columns=columns))
    if estimate.fits:
        return PointVerdict("ok"), estimate
    needed, usable = (
        format_quantity(number, "bytes", digits=4) for number in (estimate.memory.peak, estimate.memory.capacity)
    )
    reason = f"the fullest device needs {needed}, {usable} are usable"
    return PointVerdict("does_not_fit", MEMORY, reason), estimate
