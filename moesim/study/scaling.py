"""Step time, throughput and cost of one scenario against the number of devices: weak and strong scaling.

Devices are the scenario's times powers of two. Tensor, context, pipeline and expert degrees are kept, the data degree
follows. Weak scaling keeps the sequences per device, strong scaling the sequences per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.engine.analytical import System, evaluate
from moesim.estimation.estimate import estimate_loaded, tokens_per_row
from moesim.estimation.loading import LoadedScenario
from moesim.estimation.step_estimate import StepEstimate
from moesim.structure.columns import AUTO_DEGREE, Columns, FloatArray, IntArray
from moesim.structure.group_tables import group_columns_table
from moesim.structure.legality import first_broken_rule, legality_rules, resolve_columns
from moesim.units import format_quantity

Mode = Literal["weak", "strong"]
Verdict = Literal["ok", "does_not_fit", "illegal"]

SEQUENCES_ARE_NOT_WHOLE = "sequences_not_whole"
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
    points : tuple of PointVerdict
        What is wrong with each point, if anything.
    step_time_s, lower_s, upper_s, tokens_per_s, usd_per_billion_tokens, memory_peak_bytes : ndarray
        As ``estimate`` gives them; NaN where a point is illegal, and costs where no price is known.
    ideal_step_time_s, ideal_tokens_per_s, ideal_usd_per_billion_tokens : ndarray
        Perfect scaling from the scenario itself, illegal points included.
    """

    mode: Mode
    devices: IntArray
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
    return Scaling(base, _curve(loaded.system, base, "weak", counts), _curve(loaded.system, base, "strong", counts))


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


def _curve(system: System, base: StepEstimate, mode: Mode, counts: IntArray) -> ScalingCurve:
    factor = counts / base.num_devices  # by powers of two: exact
    sequences = system.scenario.workload.sequences_per_step * (factor if mode == "weak" else np.ones(len(counts)))
    columns = _columns(system, counts, sequences)
    broken = _broken_rules(system, columns)
    legal = np.flatnonzero([point is None for point in broken])
    measures = _measures(system, columns, legal)
    peak = measures["memory_peak_bytes"]
    usd_per_hour = np.nan if base.cost.usd_per_hour is None else base.cost.usd_per_hour
    return ScalingCurve(
        mode=mode,
        devices=counts,
        points=tuple(rule or _fit(system, float(peak[row])) for row, rule in enumerate(broken)),
        **measures,
        usd_per_billion_tokens=usd_per_hour * factor / 3600.0 / measures["tokens_per_s"] * 1e9,
        ideal_step_time_s=base.step_time_s / (factor if mode == "strong" else np.ones(len(counts))),
        ideal_tokens_per_s=base.tokens_per_s * factor,
        ideal_usd_per_billion_tokens=np.full(len(counts), usd_per_hour / 3600.0 / base.tokens_per_s * 1e9),
    )


def _columns(system: System, counts: IntArray, sequences: FloatArray) -> Columns:
    """Resolved columns of the points: devices, data degree and sequences vary together."""
    rows = np.arange(len(counts))
    swept = {
        "devices": ([float(count) for count in counts], rows),
        "data": ([float(AUTO_DEGREE)], np.zeros_like(rows)),
        "step_sequences": ([float(number) for number in sequences], rows),
    }
    return resolve_columns(group_columns_table(system.scenario, swept, len(counts)))


def _broken_rules(system: System, columns: Columns) -> list[PointVerdict | None]:
    """First broken rule of each point, None where it is legal."""
    rules = list(legality_rules(system.scenario, system.cluster, columns))
    found: list[PointVerdict | None] = []
    for row, index in enumerate(first_broken_rule(rules, len(columns))):
        sequences = float(columns["step_sequences"][row])
        if index >= 0:
            rule = rules[int(index)]
            found.append(PointVerdict("illegal", rule.name, rule.text(rule.message, columns, row)))
        elif not sequences.is_integer():
            found.append(PointVerdict("illegal", SEQUENCES_ARE_NOT_WHOLE, f"{sequences} sequences_per_step"))
        else:
            found.append(None)
    return found


def _measures(system: System, columns: Columns, legal: IntArray) -> dict[str, FloatArray]:
    """Measures of the legal rows, NaN in the others."""
    names = ("step_time_s", "lower_s", "upper_s", "memory_peak_bytes")
    values = {name: np.full(len(columns), np.nan) for name in names}
    for part in evaluate(system, columns.take(legal)):
        rows = legal[part.rows]
        values["step_time_s"][rows] = part.step_time_s
        values["lower_s"][rows] = part.lower_s
        values["upper_s"][rows] = part.upper_s
        values["memory_peak_bytes"][rows] = np.rint(part.memory_peak)
    values["tokens_per_s"] = tokens_per_row(system.scenario, columns) / values["step_time_s"]
    return values


def _fit(system: System, peak_bytes: float) -> PointVerdict:
    usable = system.device.usable_memory.value
    if peak_bytes <= usable:
        return PointVerdict("ok")
    needed, there = (format_quantity(number, "bytes", digits=4) for number in (peak_bytes, usable))
    return PointVerdict("does_not_fit", MEMORY, f"the fullest device needs {needed}, {there} are usable")
