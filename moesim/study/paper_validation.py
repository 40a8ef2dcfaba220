"""Published figures of papers, predicted as they are: components of a layer, whole steps, rates.

Each case names a scenario, what was measured and its role: ``fit`` if a constant of a profile was taken from it (or
from a case of the same system), ``judge`` if nothing was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.cost.operators import price
from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import FormatError, Problem
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario, load
from moesim.structure.layers import layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_layers import dense_part
from moesim.structure.lowering_moe import moe_part
from moesim.structure.step_graph import Operation

ROLES = ("fit", "judge")
QUANTITIES = ("step_time_s", "sequences_per_s", "operations_s")
BACKWARD_PHASES = ("activation_gradient", "weight_gradient")


@dataclass(frozen=True)
class PaperCase:
    """One published figure.

    ``quantity`` is ``step_time_s``, ``sequences_per_s`` or ``operations_s``: the sum over one layer of each kind in
    ``layers`` of the operations whose names begin with one of ``names``, in ``phase``, at mean load, nothing hidden.
    """

    id: str
    source: str
    role: str
    scenario: str
    assignments: tuple[str, ...]
    quantity: str
    measured: float
    layers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    phase: str = "forward"
    note: str = ""


@dataclass(frozen=True)
class PaperResult:
    """A case with its prediction; ``error`` is predicted over measured minus one."""

    case: PaperCase
    predicted: float

    @property
    def error(self) -> float:
        """Relative error."""
        return self.predicted / self.case.measured - 1.0


@dataclass(frozen=True)
class PaperReport:
    """Results of all cases."""

    results: tuple[PaperResult, ...]

    def statistics(self, role: str) -> dict[str, float]:
        """Median and 90th percentile of the absolute error, bias and count of one role."""
        errors = np.array([result.error for result in self.results if result.case.role == role])
        if not len(errors):
            return {"count": 0.0}
        return {
            "count": float(len(errors)),
            "median": float(np.median(np.abs(errors))),
            "p90": float(np.quantile(np.abs(errors), 0.9)),
            "bias": float(np.mean(errors)),
        }

    def to_json(self) -> dict[str, Any]:
        """Statistics by role and every case."""
        return {
            "schema_version": 1,
            "statistics": {role: self.statistics(role) for role in ROLES},
            "cases": [
                {
                    "id": result.case.id,
                    "source": result.case.source,
                    "role": result.case.role,
                    "scenario": result.case.scenario,
                    "quantity": result.case.quantity,
                    "measured": result.case.measured,
                    "predicted": result.predicted,
                    "error": result.error,
                    "note": result.case.note,
                }
                for result in self.results
            ],
        }

    def to_markdown(self) -> str:
        """The error table as a page."""
        lines = [
            "# Papers, predicted as they are",
            "",
            "Error is predicted / measured - 1. `fit`: a constant of a profile was taken from this case or system;",
            "`judge`: nothing was.",
            "",
        ]
        for role in ROLES:
            numbers = self.statistics(role)
            if numbers["count"]:
                lines.append(
                    f"- {role}: {numbers['count']:.0f} cases, median {numbers['median']:.1%}, 90th percentile "
                    f"{numbers['p90']:.1%}, bias {numbers['bias']:+.1%}"
                )
        lines += [
            "",
            "| case | role | measured | predicted | error | source |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for result in self.results:
            case = result.case
            lines.append(
                f"| {case.id} | {case.role} | {case.measured:.4g} | {result.predicted:.4g} | {result.error:+.1%} | "
                f"{case.source} |"
            )
        notes = [f"- {result.case.id}: {result.case.note}" for result in self.results if result.case.note]
        return "\n".join([*lines, "", "Notes:", "", *notes, ""])


def read_paper_cases(path: Path) -> list[PaperCase]:
    """Read the cases of a JSON file.

    Raises
    ------
    FormatError
        If the file cannot be read or a case lacks something.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        cases = [_case(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = Problem(
            code="E-FMT-014",
            message=f"not a list of paper cases: {type(error).__name__} {error}",
            remedy="see validation/papers/cases.json for the keys of a case",
            file=str(path),
        )
        raise FormatError([problem]) from None
    return cases


def _case(entry: dict[str, Any]) -> PaperCase:
    if entry["role"] not in ROLES or entry["quantity"] not in QUANTITIES:
        raise ValueError(f"{entry['id']}: role {entry['role']!r} or quantity {entry['quantity']!r} is unknown")
    lists = {key: tuple(entry.get(key, ())) for key in ("assignments", "layers", "names")}
    fields: dict[str, Any] = {**entry, **lists}
    return PaperCase(**fields)


def validate_papers(cases: Sequence[PaperCase]) -> PaperReport:
    """Predict every case; nothing is tuned."""
    library = HardwareLibrary()
    return PaperReport(tuple(PaperResult(case, predicted_quantity(case, library)) for case in cases))


def predicted_quantity(case: PaperCase, library: HardwareLibrary) -> float:
    """Prediction of one case."""
    loaded = load(case.scenario, assignments=case.assignments, library=library)
    if case.quantity == "operations_s":
        return sum(_operation_seconds(loaded, case))
    step_time_s = estimate_loaded(loaded).step_time_s
    return step_time_s if case.quantity == "step_time_s" else loaded.scenario.workload.sequences_per_step / step_time_s


def _operation_seconds(loaded: LoadedScenario, case: PaperCase) -> Iterator[float]:
    phases = BACKWARD_PHASES if case.phase == "backward" else (case.phase,)
    for operation in _operations(loaded, case.layers):
        if operation.phase in phases and operation.name.startswith(case.names):
            yield float(np.ravel(price(operation, loaded.system.hardware).time_s)[0])


def _operations(loaded: LoadedScenario, layers: Sequence[str]) -> Iterator[Operation]:
    """Operations of one layer of each kind that is asked for."""
    context = LoweringContext(loaded.scenario, loaded.system.stack, loaded.columns)
    for kind in layer_sequence(loaded.scenario.model).kinds:
        if kind.name in layers:
            yield from dense_part(context, kind).operations
            if kind.is_moe:
                yield from moe_part(context, kind, loaded.system.load_factor).operations
