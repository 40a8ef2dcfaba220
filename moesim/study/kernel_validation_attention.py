"""Attention surfaces judged on shapes they were not fitted on: five folds, intervals, a report, surfaces to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.cost.attention_surface import AttentionShapes, AttentionTimeSurface
from moesim.structure.columns import FloatArray, IntArray
from moesim.study.fit_attention import (
    DeviceFigures,
    attention_folds,
    attention_shapes,
    fit_attention,
    held_out_attention_times_s,
)
from moesim.study.fit_grids import with_interval
from moesim.study.kernel_reports import (
    COVERAGE_RANGE,
    LEVEL,
    TABLE_SOURCE,
    errors_text,
    residual_document,
    write_document,
    write_table,
)
from moesim.study.kernel_tables import (
    ATTENTION_COLUMNS,
    ErrorStatistics,
    conformal_half_widths,
    coverage,
    error_statistics,
    kernel_table_paths,
    read_kernel_table,
)

TOLERANCE = (0.035, 0.10)
"""Median and 90th percentile the issue asks of every device."""
TRAINING_FLOPS = 1e9
WORST_SHAPES = 8


@dataclass(frozen=True)
class AttentionValidation:
    """One device's rows, each predicted by fits that did not see its fold; arrays of shape (n_rows,)."""

    device: str
    table_name: str
    figures: DeviceFigures
    shapes: AttentionShapes
    time_s: FloatArray
    predicted_s: FloatArray
    formula_s: FloatArray
    folds: IntArray
    half_widths: FloatArray

    def statistics(self, is_kept: npt.NDArray[np.bool_] | None = None) -> ErrorStatistics:
        """Errors of the rows kept, of all without a choice."""
        rows = slice(None) if is_kept is None else is_kept
        return error_statistics(self.predicted_s[rows], self.time_s[rows])

    @property
    def interval_coverage(self) -> float:
        """Share of rows inside an interval calibrated on the other folds."""
        return coverage(np.log(self.time_s / self.predicted_s), self.half_widths)


def validate_attention(path: Path, device: str, figures: DeviceFigures, *, seed: int = 0) -> AttentionValidation:
    """Predict every row of a table by fits that did not see its (heads, kv heads, head size).

    Parameters
    ----------
    path : Path
        The table.
    device : str
        Device id.
    figures : DeviceFigures
        Datasheet figures of the device.
    seed : int, optional
        Seed of the folds.

    Returns
    -------
    AttentionValidation
        Predictions and 90 % intervals.
    """
    table = read_kernel_table(path, ATTENTION_COLUMNS)
    shapes, time_s = attention_shapes(table), table["time_us"] * 1e-6
    folds = attention_folds(shapes, seed=seed)
    predicted_s, formula_s = held_out_attention_times_s(device, shapes, time_s, figures, folds)
    return AttentionValidation(
        device=device,
        table_name=path.name,
        figures=figures,
        shapes=shapes,
        time_s=time_s,
        predicted_s=predicted_s,
        formula_s=formula_s,
        folds=folds,
        half_widths=conformal_half_widths(np.log(time_s / predicted_s), folds, sizes=predicted_s, level=LEVEL),
    )


def attention_groups(validation: AttentionValidation) -> dict[str, npt.NDArray[np.bool_]]:
    """Rows a report tells apart.

    Parameters
    ----------
    validation : AttentionValidation
        One device.

    Returns
    -------
    dict
        Name to mask of shape (n_rows,).
    """
    shapes, sequence = validation.shapes, validation.shapes.sequence
    groups = {
        "all": np.full(sequence.shape, True),
        ">= 1 GFLOP": shapes.flops >= TRAINING_FLOPS,
        "sequence <= 256": sequence <= 256,
        "sequence 257-2048": (sequence > 256) & (sequence <= 2048),
        "sequence > 2048": sequence > 2048,
        "one query head per key head": shapes.heads == shapes.kv_heads,
    }
    groups |= {f"head size {size:.0f}": shapes.head_size == size for size in np.unique(shapes.head_size)}
    return groups


def attention_problems(validations: Sequence[AttentionValidation]) -> list[str]:
    """What misses its tolerance.

    Parameters
    ----------
    validations : sequence of AttentionValidation
        Devices.

    Returns
    -------
    list of str
        One sentence each, empty if all is well.
    """
    problems = []
    for item in validations:
        found = item.statistics()
        if not (found.median <= TOLERANCE[0] and found.p90 <= TOLERANCE[1]):
            limits = f"{TOLERANCE[0]:.1%} / {TOLERANCE[1]:.1%}"
            problems.append(f"{item.device}: {found.median:.1%} / {found.p90:.1%} on left-out shapes, limit {limits}")
        if not COVERAGE_RANGE[0] <= item.interval_coverage <= COVERAGE_RANGE[1]:
            low, high = COVERAGE_RANGE
            problems.append(f"{item.device}: interval covers {item.interval_coverage:.1%}, not {low:.0%} to {high:.0%}")
    return problems


def attention_summary(validations: Sequence[AttentionValidation]) -> list[dict[str, str | int | float]]:
    """Errors of every device and group, as rows of a table.

    Parameters
    ----------
    validations : sequence of AttentionValidation
        Devices.

    Returns
    -------
    list of dict
        Fractions; ``model`` is ``formula`` or ``formula and grids``.
    """
    rows: list[dict[str, str | int | float]] = []
    for item in validations:
        for group, is_kept in attention_groups(item).items():
            for model, predicted_s in (("formula", item.formula_s), ("formula and grids", item.predicted_s)):
                found = error_statistics(predicted_s[is_kept], item.time_s[is_kept])
                numbers = {name: round(value, 5) for name, value in asdict(found).items()}
                rows.append({"device": item.device, "group": group, "model": model, **numbers})
    return rows


def attention_report(validations: Sequence[AttentionValidation], *, seed: int) -> str:
    """Markdown report.

    Parameters
    ----------
    validations : sequence of AttentionValidation
        Devices.
    seed : int
        Seed of the folds.

    Returns
    -------
    str
        The page.
    """
    problems = attention_problems(validations)
    lines = [
        "# Causal prefill attention against measured tables",
        "",
        f"Source: {TABLE_SOURCE}, bf16. Five folds by whole shape (heads, kv heads, head size), seed {seed}: every",
        "row is predicted by a fit that saw no row of its shape. Entries are median / 90th percentile of",
        "|predicted / measured - 1|. Coverage is that of the 90 % interval, split conformal, calibrated on the other",
        f"folds in eight bins of predicted time. Tolerance: {TOLERANCE[0]:.1%} / {TOLERANCE[1]:.1%}, coverage "
        f"{COVERAGE_RANGE[0]:.0%} to {COVERAGE_RANGE[1]:.0%}.",
        "",
        "| device | rows | formula alone | with grids | bias | >= 1 GFLOP | coverage | within tolerance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in validations:
        found, large = item.statistics(), item.statistics(attention_groups(item)[">= 1 GFLOP"])
        verdict = "no" if any(problem.startswith(f"{item.device}:") for problem in problems) else "yes"
        cells = [
            item.device,
            str(found.count),
            errors_text(error_statistics(item.formula_s, item.time_s)),
            errors_text(found),
        ]
        cells += [f"{found.bias:+.1%}", errors_text(large), f"{item.interval_coverage:.1%}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## By kind of row", ""]
    names = list(dict.fromkeys(name for item in validations for name in attention_groups(item)))
    lines += [f"| rows | {' | '.join(item.device for item in validations)} |", "| --- |" + " --- |" * len(validations)]
    for name in names:
        groups = [attention_groups(item) for item in validations]
        cells = [
            errors_text(item.statistics(group[name])) if name in group else "-"
            for item, group in zip(validations, groups, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Worst shapes", "", "Whole left-out shapes with the largest median error.", ""]
    lines += ["| device | heads | kv heads | head size | median / 90th percentile | bias |", "| --- |" + " --- |" * 5]
    for item in validations:
        lines += _worst_shapes(item)
    lines += ["", "## Misses", "", *(f"- {problem}" for problem in problems or ["none"])]
    return "\n".join([*lines, ""])


def attention_document(
    surface: AttentionTimeSurface, validation: AttentionValidation, *, seed: int
) -> dict[str, object]:
    """A surface with its provenance, as JSON holds it.

    Parameters
    ----------
    surface : AttentionTimeSurface
        Fitted on all rows, with its interval.
    validation : AttentionValidation
        Where its held-out errors come from.
    seed : int
        Seed of the folds.

    Returns
    -------
    dict
        What :func:`~moesim.cost.attention_surface.attention_surface_from_document` reads, and provenance.
    """
    found = {name: round(value, 4) for name, value in asdict(validation.statistics()).items()}
    return {
        "schema_version": 1,
        "operator": "attention_prefill_causal",
        "precision": "bf16",
        "device": surface.device,
        "provenance": {
            "source": TABLE_SOURCE,
            "table": validation.table_name,
            "rows": int(validation.time_s.size),
            "fit": "moesim.study.fit_attention, all folds",
            "held_out": {**found, "folds": 5, "seed": seed, "shape": "heads, kv heads, head size"},
            "coverage": round(validation.interval_coverage, 4),
        },
        "figures": asdict(validation.figures),
        "parameters": {name: float(f"{value:.6g}") for name, value in asdict(surface.parameters).items()},
        **residual_document(surface),
    }


def fit_validated_attention(validation: AttentionValidation) -> AttentionTimeSurface:
    """Fit all rows and take the interval from the held-out errors.

    Parameters
    ----------
    validation : AttentionValidation
        One device.

    Returns
    -------
    AttentionTimeSurface
        What is shipped.
    """
    surface = fit_attention(validation.device, validation.shapes, validation.time_s, validation.figures)
    return with_interval(surface, validation.predicted_s, validation.time_s)


def write_attention_validation(
    data: Path, figures: Mapping[str, DeviceFigures], *, reports: Path, surfaces: Path | None = None, seed: int = 0
) -> list[str]:
    """Validate every table of a folder and write ``attention.md``, ``attention.csv`` and the surfaces.

    Parameters
    ----------
    data : Path
        Folder of the tables.
    figures : mapping
        Datasheet figures by device id.
    reports : Path
        Folder of the report.
    surfaces : Path, optional
        Folder of the surfaces, ``attention_<device>.json``; none are written without it.
    seed : int, optional
        Seed of the folds.

    Returns
    -------
    list of str
        What misses its tolerance.
    """
    validations = [
        validate_attention(path, device, figures[device], seed=seed)
        for device, path in kernel_table_paths(data, "attention_prefill").items()
    ]
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "attention.md").write_text(attention_report(validations, seed=seed), encoding="utf-8")
    write_table(reports / "attention.csv", attention_summary(validations))
    if surfaces is not None:
        surfaces.mkdir(parents=True, exist_ok=True)
        for item in validations:
            document = attention_document(fit_validated_attention(item), item, seed=seed)
            write_document(surfaces / f"attention_{item.device}.json", document)
    return attention_problems(validations)


def _worst_shapes(item: AttentionValidation) -> list[str]:
    keys = np.stack([item.shapes.heads, item.shapes.kv_heads, item.shapes.head_size], axis=1)
    shapes, row_shape = np.unique(keys, axis=0, return_inverse=True)
    errors = np.abs(item.predicted_s / item.time_s - 1.0)
    medians = [float(np.median(errors[row_shape.ravel() == index])) for index in range(len(shapes))]
    lines = []
    for index in np.argsort(medians)[::-1][:WORST_SHAPES]:
        found = item.statistics(row_shape.ravel() == index)
        sizes = " | ".join(f"{size:.0f}" for size in shapes[index])
        lines.append(f"| {item.device} | {sizes} | {errors_text(found)} | {found.bias:+.1%} |")
    return lines
