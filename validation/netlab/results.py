"""Measured beside predicted: rows, verdicts, and the profiles that hold what was fitted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.structure.columns import FloatArray
from validation.netlab.cases import STEP_SHAPE
from validation.netlab.fits import Fit, predicted_s
from validation.netlab.measurements import MeasuredCollective, MeasuredStep, Measurements
from validation.netlab.predictions import Predictor
from validation.netlab.step_predictions import predicted_step
from validation.netlab.topologies import LabTopology, cluster_document

MEDIAN_TOLERANCE = 0.10
WORST_TOLERANCE = 0.25
STEP_TOLERANCE = 0.15
LATENCY_ERROR = 0.5
"""One relative standard deviation of the latencies: ranks share the machine's cores with whatever else runs."""


@dataclass(frozen=True)
class Row:
    """One case; ``num_bytes`` of a collective, 0 for a step; ``part`` is fit, collective or step."""

    network: str
    case: str
    num_bytes: int
    measured_s: float
    low_s: float
    high_s: float
    predicted_s: float
    part: str

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.measured_s - 1.0

    @property
    def size(self) -> str:
        """Bytes in words; empty for a step."""
        if not self.num_bytes:
            return ""
        return f"{self.num_bytes} B" if self.num_bytes < 1024 else f"{self.num_bytes / 1024:,.0f} KiB"


@dataclass(frozen=True)
class Verdict:
    """One thing that was asked for, and what came of it."""

    what: str
    found: float
    tolerance: float

    @property
    def is_met(self) -> bool:
        """Whether the tolerance is kept."""
        return self.found <= self.tolerance


def write_profiles(folder: Path, topologies: Sequence[LabTopology], fit: Fit, source: str) -> None:
    """Write clusters and the fitted library as profiles that ``moesim --profiles`` reads."""
    from ruamel.yaml import YAML

    for name in ("clusters", "libraries"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    writer = YAML()
    for topology in topologies:
        with (folder / "clusters" / f"{topology.name}.yaml").open("w", encoding="utf-8") as file:
            writer.dump(cluster_document(topology), file)
    error = float(np.sqrt(np.mean(np.square(fit.errors))))
    documents = fit.constants.documents(source, latency_error=LATENCY_ERROR, fraction_error=max(error, 0.001))
    for name, document in documents.items():
        (folder / "libraries" / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def rows_of(measurements: Measurements, predictor: Predictor, cores: int) -> list[Row]:
    """Predict every case that was measured; nothing is fitted here."""
    rows = [_collective_row(one, predicted_s(predictor, one)) for one in measurements.collectives]
    return rows + [_step_row(one, predictor, cores) for one in measurements.steps]


def _collective_row(measured: MeasuredCollective, predicted: float) -> Row:
    case = measured.case
    part = "fit" if case.role == "fit" else "collective"
    low, high = _spread(measured.seconds)
    return Row(case.topology.name, case.name, case.num_bytes, measured.typical_s, low, high, predicted, part)


def _step_row(measured: MeasuredStep, predictor: Predictor, cores: int) -> Row:
    case = measured.case
    network = predictor.network(case.topology)
    predicted = predicted_step(network, case.tokens(), STEP_SHAPE, measured.compute_s, cores)
    low, high = _spread(measured.seconds)
    return Row(case.topology.name, case.name, 0, measured.typical_s, low, high, predicted.seconds, "step")


def _spread(seconds: FloatArray) -> tuple[float, float]:
    return float(seconds.min()), float(seconds.max())


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Judge collectives by their median and worst error, steps by their worst."""
    collectives = [abs(row.error) for row in rows if row.part == "collective"]
    steps = [abs(row.error) for row in rows if row.part == "step"]
    found = []
    if collectives:
        found.append(Verdict("collectives, median error", float(np.median(collectives)), MEDIAN_TOLERANCE))
        found.append(Verdict("collectives, worst error", max(collectives), WORST_TOLERANCE))
    if steps:
        found.append(Verdict("training steps, worst error", max(steps), STEP_TOLERANCE))
    return found
