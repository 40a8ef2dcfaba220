"""Report of collective validation: classes, tables, what is reported apart or cannot be mapped, and every row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moesim.study.collective_tables import tables_of
from moesim.study.collective_validation import LEVEL, RATIO_TOLERANCE, TARGETS, CollectiveValidation
from moesim.study.kernel_tables import BoolArray

ROWS, REPORT = "rows.csv", "report.md"
WORST_TABLES = 15
ROW_COLUMNS = (
    "table",
    "system",
    "class",
    "collective",
    "ranks",
    "ranks_per_domain",
    "bytes",
    "measured_us",
    "predicted_us",
    "error",
    "low_us",
    "high_us",
    "library",
    "network",
    "constants",
    "judged",
    "reason",
)


def write_collective_report(validation: CollectiveValidation, folder: Path) -> None:
    """Write the report and a CSV file with every row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(collective_report(validation), encoding="utf-8")
    (folder / ROWS).write_text(collective_rows_csv(validation), encoding="utf-8")


def collective_rows_csv(validation: CollectiveValidation) -> str:
    """Every mapped row with its prediction, and every table that is not mapped with its reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ROW_COLUMNS)
    for index, row in enumerate(validation.rows):
        predicted, width = float(validation.predicted_s[index]), float(np.exp(validation.half_widths[index]))
        facts = row.facts
        writer.writerow(
            [
                row.table,
                row.system,
                validation.classes[index],
                row.kind,
                row.num_ranks,
                facts.ranks_per_domain,
                f"{row.num_bytes:.10g}",
                f"{row.measured_s * 1e6:.6g}",
                f"{predicted * 1e6:.6g}",
                f"{predicted / row.measured_s - 1.0:.4f}",
                f"{predicted / width * 1e6:.6g}",
                f"{predicted * width * 1e6:.6g}",
                row.moe_library or facts.library,
                facts.network,
                "without the system" if validation.is_known_system[index] else "other systems",
                "no" if facts.apart else "yes",
                facts.apart,
            ]
        )
    for lost in validation.unmapped:
        writer.writerow([lost.table, *[""] * (len(ROW_COLUMNS) - 3), "no", f"not mapped: {lost.reason}"])
    return text.getvalue()


def collective_report(validation: CollectiveValidation) -> str:
    """The report as Markdown."""
    lines = [
        "# Collectives and MoE kernels, on systems that were not fitted on",
        "",
        "Error is |predicted / measured - 1|, median / 90th percentile; bias is its median with sign.",
        "Every row is predicted from constants fitted without its whole system (MoE kernels: without its table); rows",
        f"of systems that were not fitted at all, from all others. Intervals are meant to cover {LEVEL:.0%}.",
        "",
        "| class | error | target | interval covers | tables |",
        "| --- | --- | --- | --- | --- |",
        *_class_lines(validation),
        "",
        "Missed: " + ("; ".join(validation.failures) or "none"),
        "",
        *_figure_lines(validation),
        "## Tables",
        "",
        "| table | system | class | error | interval covers |",
        "| --- | --- | --- | --- | --- |",
        *_table_lines(validation, apart=False),
        "",
        "## Worst tables",
        "",
        "| table | class | error |",
        "| --- | --- | --- |",
        *_worst_lines(validation),
        "",
        "## Reported apart",
        "",
        "In disorder or outside what is modelled; not judged, and not fitted on.",
        "",
        "| table | reason | error |",
        "| --- | --- | --- |",
        *_table_lines(validation, apart=True),
        *(f"| {lost.table} | not mapped: {lost.reason} | {lost.rows} rows |" for lost in validation.unmapped),
        "",
    ]
    return "\n".join(lines)


def _class_lines(validation: CollectiveValidation) -> Iterator[str]:
    for name, (median, p90) in TARGETS.items():
        members = validation.members(name)
        if not members.any():
            yield f"| {name} | no rows | {median:.0%} / {p90:.0%} | | |"
            continue
        tables = len({row.table for row, is_in in zip(validation.rows, members, strict=True) if is_in})
        covered = f"{validation.coverage(members):.0%}"
        yield f"| {name} | {validation.errors(members)} | {median:.0%} / {p90:.0%} | {covered} | {tables} |"


def _figure_lines(validation: CollectiveValidation) -> list[str]:
    lines = ["## Published growths and ratios", ""]
    ratio = validation.dispatch_ratio()
    if ratio is not None:
        measured, predicted = ratio
        lines.append(
            f"- DeepEP normal dispatch, printed bandwidth at 8 ranks over 16: predicted {predicted:.2f}, measured "
            f"{measured:.2f}, off by {predicted / measured - 1.0:+.1%} (tolerance {RATIO_TOLERANCE:.0%})"
        )
    for case in validation.growth:
        tolerance = f"tolerance {RATIO_TOLERANCE:.0%}" if case.is_judged else "not judged: read from pixels"
        lines.append(
            f"- {case.words}: predicted x{case.predicted:.2f}, published x{case.measured:.2f}, off by "
            f"{case.error:+.1%} ({tolerance})"
        )
    return [*lines, ""]


def _parts(validation: CollectiveValidation, *, apart: bool) -> Iterator[tuple[str, str, str, BoolArray]]:
    """Table, class or reason, system and rows, one entry per table and class or reason."""
    for table, positions in tables_of(validation.rows).items():
        groups: dict[tuple[str, str], list[int]] = {}
        for index in positions:
            row = validation.rows[index]
            if bool(row.facts.apart) == apart:
                key = row.facts.apart if apart else validation.classes[index]
                groups.setdefault((key, row.system), []).append(index)
        for (key, system), indices in groups.items():
            members = np.zeros(len(validation.rows), dtype=bool)
            members[indices] = True
            yield table, key, system, members


def _table_lines(validation: CollectiveValidation, *, apart: bool) -> Iterator[str]:
    for table, key, system, members in _parts(validation, apart=apart):
        error = validation.errors(members)
        if apart:
            yield f"| {table} | {key} | {error} |"
        else:
            yield f"| {table} | {system} | {key} | {error} | {validation.coverage(members):.0%} |"


def _worst_lines(validation: CollectiveValidation) -> list[str]:
    found = [(validation.errors(members), table, key) for table, key, _, members in _parts(validation, apart=False)]
    worst = sorted(found, key=lambda one: -one[0].median)[:WORST_TABLES]
    return [f"| {table} | {key} | {error} |" for error, table, key in worst]
