"""Judge communication libraries on systems they were not fitted on: ``moesim validate collectives``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, Problem
from moesim.study.collective_tables import (
    CollectiveRow,
    Unmapped,
    bottleneck_copies,
    read_collective_tables,
)
from moesim.study.fit_collectives import CollectiveFit, FittedConstants
from moesim.study.fit_moe_libraries import MoeConstants, MoeFit
from moesim.study.kernel_tables import (
    BoolArray,
    ErrorStatistics,
    FloatArray,
    conformal_half_widths,
    coverage,
    error_statistics,
)
from moesim.study.library_files import LibraryFits, narrowed, narrowed_moe, read_fits
from moesim.study.torus_growth import GrowthCase, growth_cases

LEVEL = 0.9
MEBIBYTE = 2.0**20
MOE = "MoE dispatch and combine"
TARGETS: dict[str, tuple[float, float]] = {
    "one node, >= 1 MiB": (0.06, 0.18),
    "one node, < 1 MiB": (0.07, 0.18),
    "several nodes, >= 1 MiB": (0.10, 0.30),
    "several nodes, < 1 MiB": (0.17, 0.50),
    MOE: (0.11, 0.31),
}
"""Median and 90th percentile of |predicted / measured - 1| that a class of left-out rows must stay within."""
RATIO_TOLERANCE = 0.2
RATIO_TABLES = ("deepep_norm_8", "deepep_norm_16")
EVALUATIONS_WITHOUT = 10
"""Steps of a fit that leaves one system out; it starts from the fit on everything."""


@dataclass(frozen=True)
class CollectiveValidation:
    """Rows of a file with predictions that had not seen their system; arrays (n_rows,)."""

    rows: Sequence[CollectiveRow]
    predicted_s: FloatArray
    half_widths: FloatArray
    classes: Sequence[str]
    is_known_system: BoolArray
    unmapped: Sequence[Unmapped]
    growth: Sequence[GrowthCase]

    @property
    def measured_s(self) -> FloatArray:
        """Measured seconds."""
        return np.array([row.measured_s for row in self.rows])

    @property
    def is_judged(self) -> BoolArray:
        """Rows of tables in good order."""
        return np.array([not row.facts.apart for row in self.rows], dtype=bool)

    def members(self, name: str) -> BoolArray:
        """Judged rows of a class."""
        return np.asarray(self.is_judged & (np.array(self.classes) == name))

    def errors(self, chosen: BoolArray) -> ErrorStatistics:
        """Statistics of some rows."""
        return error_statistics(self.predicted_s[chosen], self.measured_s[chosen])

    def coverage(self, chosen: BoolArray) -> float:
        """Share of some rows inside their intervals."""
        return coverage(np.log(self.measured_s / self.predicted_s)[chosen], self.half_widths[chosen])

    def dispatch_ratio(self) -> tuple[float, float] | None:
        """DeepEP's dispatch bandwidth at 8 ranks over that at 16, measured and predicted; None without its tables."""
        bandwidths: dict[str, tuple[float, float]] = {}
        for row, predicted in zip(self.rows, self.predicted_s, strict=True):
            if row.table in RATIO_TABLES and row.kind == "dispatch":
                carried = row.num_bytes * bottleneck_copies(row.num_ranks, row.facts.domains)
                bandwidths[row.table] = (carried / row.measured_s, carried / predicted)
        if len(bandwidths) < len(RATIO_TABLES):
            return None
        one, two = (bandwidths[table] for table in RATIO_TABLES)
        return one[0] / two[0], one[1] / two[1]

    @property
    def failures(self) -> list[str]:
        """Targets that were missed, one sentence each."""
        found = []
        for name, (median, p90) in TARGETS.items():
            error = self.errors(self.members(name))
            if error.count and (error.median > median or error.p90 > p90):
                found.append(f"{name}: {error} exceeds {median:.0%} / {p90:.0%}")
        ratio = self.dispatch_ratio()
        if ratio is not None and abs(ratio[1] / ratio[0] - 1.0) > RATIO_TOLERANCE:
            found.append(f"DeepEP dispatch bandwidth, 8 over 16 ranks: {ratio[1]:.2f}, measured {ratio[0]:.2f}")
        found += [
            f"{case.words}: x{case.predicted:.2f}, published x{case.measured:.2f}"
            for case in self.growth
            if case.is_judged and abs(case.error) > RATIO_TOLERANCE
        ]
        return found


def validate_collectives(data: Path, fits: LibraryFits | None = None) -> CollectiveValidation:
    """Predict every row of a file of collective tables from constants that were fitted on other systems.

    Parameters
    ----------
    data : Path
        CSV file of collective tables.
    fits : LibraryFits, optional
        Fits with each system left out; the shipped ones by default. A row whose system is not among them is predicted
        from all that was fitted.

    Returns
    -------
    CollectiveValidation
        Predictions, intervals, classes.

    Raises
    ------
    FormatError
        If the file cannot be read.
    """
    tables = read_collective_tables(data)
    known = read_fits() if fits is None else fits
    rows = tables.rows
    predicted, is_known = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    is_moe = np.array([bool(row.moe_library) for row in rows], dtype=bool)
    for chosen, is_kernel in ((np.flatnonzero(~is_moe), False), (np.flatnonzero(is_moe), True)):
        if len(chosen):
            part = [rows[index] for index in chosen]
            predicted[chosen], is_known[chosen] = (_predict_moe if is_kernel else _predict_collectives)(part, known)
    classes = [class_of_row(row) for row in rows]
    widths = _half_widths(rows, predicted, classes, known.half_widths)
    return CollectiveValidation(rows, predicted, widths, classes, is_known, tables.unmapped, growth_cases())


def class_of_row(row: CollectiveRow) -> str:
    """Class whose target a row is judged by."""
    if row.moe_library:
        return MOE
    place = "one node" if row.facts.domains == 1 else "several nodes"
    return f"{place}, {'>=' if row.num_bytes >= MEBIBYTE else '<'} 1 MiB"


def _predict_collectives(rows: Sequence[CollectiveRow], fits: LibraryFits) -> tuple[FloatArray, BoolArray]:
    model = CollectiveFit(rows)
    predicted = np.zeros(len(rows))
    for system in np.unique(model.systems):
        chosen = model.systems == system
        predicted[chosen] = model.predict_s(fits.without_system.get(str(system), fits.everything), chosen)
    return predicted, np.isin(model.systems, list(fits.without_system))


def _predict_moe(rows: Sequence[CollectiveRow], fits: LibraryFits) -> tuple[FloatArray, BoolArray]:
    model = MoeFit(rows)
    predicted = np.zeros(len(rows))
    for table in np.unique(model.tables):
        chosen = model.tables == table
        predicted[chosen] = model.predict_s(fits.moe_without_table.get(str(table), fits.moe), chosen)
    return predicted, np.isin(model.tables, list(fits.moe_without_table))


def _half_widths(
    rows: Sequence[CollectiveRow], predicted_s: FloatArray, classes: Sequence[str], stored: Mapping[str, float]
) -> FloatArray:
    """Of each row from the judged rows of other systems (MoE: tables) in its class; the stored one where there is none.

    A network that was never measured in good order carries a factor of two on small messages at least.
    """
    groups = np.array(classes)
    widths = np.array([stored[name] for name in classes])
    judged = np.array([not row.facts.apart for row in rows], dtype=bool)
    folds = np.unique([row.table if row.moe_library else row.system for row in rows], return_inverse=True)[1]
    measured_s = np.array([row.measured_s for row in rows])
    if judged.any():
        errors = np.log(measured_s / predicted_s)[judged]
        found = conformal_half_widths(errors, folds[judged], groups=groups[judged], level=LEVEL)
        widths[judged] = np.where(np.isfinite(found), found, widths[judged])
    unmeasured = np.array(["never measured" in row.facts.apart for row in rows], dtype=bool)
    is_small = np.array([row.num_bytes < MEBIBYTE for row in rows], dtype=bool)
    return np.where(unmeasured & is_small, np.maximum(widths, np.log(2.0)), widths)


def fit_libraries(data: Path) -> LibraryFits:
    """Fit all libraries on a file, once on everything in good order and once without each system (MoE: table).

    Raises
    ------
    FormatError
        If the file cannot be read, or a class has no rows in good order.
    """
    ordered = [row for row in read_collective_tables(data).rows if not row.facts.apart]
    empty = sorted(set(TARGETS) - {class_of_row(row) for row in ordered})
    if empty:
        message = f"no rows in good order of class {empty[0]!r} to fit on"
        remedy = "fit on a file that has all classes, or leave --refit and --libraries away"
        raise FormatError([Problem(code="E-FMT-014", message=message, remedy=remedy, file=str(data))])
    collectives = [row for row in ordered if not row.moe_library]
    kernels = [row for row in ordered if row.moe_library]
    model, moe_model = CollectiveFit(collectives), MoeFit(kernels)
    start, moe_start = model.fit(), moe_model.fit()
    without: dict[str, FittedConstants] = {}
    for system in np.unique(model.systems):
        chosen = model.systems == system
        constants = model.constants(model.fit(~chosen, start, evaluations=EVALUATIONS_WITHOUT))
        members = [collectives[index].facts for index in np.flatnonzero(chosen)]
        names = sorted({one.library for one in members}), sorted({one.network for one in members} - {""})
        without[str(system)] = narrowed(constants, *names)
    moe_without: dict[str, MoeConstants] = {}
    for table in np.unique(moe_model.tables):
        chosen = moe_model.tables == table
        moe_constants = moe_model.constants(moe_model.fit(~chosen, moe_start, evaluations=EVALUATIONS_WITHOUT))
        libraries = sorted({kernels[index].moe_library for index in np.flatnonzero(chosen)})
        moe_without[str(table)] = narrowed_moe(moe_constants, libraries)
    fits = LibraryFits(
        everything=model.constants(start),
        without_system=without,
        moe=moe_model.constants(moe_start),
        moe_without_table=moe_without,
        half_widths={},
        systems_of_library=_systems_of_libraries(ordered),
        rows=len(ordered),
    )
    return LibraryFits(**{**fits.__dict__, "half_widths": _class_widths(ordered, fits)})


def _class_widths(rows: Sequence[CollectiveRow], fits: LibraryFits) -> dict[str, float]:
    widths = {}
    for name in TARGETS:
        members = [row for row in rows if class_of_row(row) == name]
        predicted, _ = (_predict_moe if name == MOE else _predict_collectives)(members, fits)
        measured = np.array([row.measured_s for row in members])
        widths[name] = float(np.quantile(np.abs(np.log(measured / predicted)), LEVEL))
    return widths


def _systems_of_libraries(rows: Sequence[CollectiveRow]) -> dict[str, int]:
    systems: dict[str, set[str]] = {}
    for row in rows:
        names = [row.moe_library] if row.moe_library else [row.facts.library, row.facts.network]
        for name in filter(None, names):
            systems.setdefault(name, set()).add(row.system)
    return {name: len(found) for name, found in sorted(systems.items())}
