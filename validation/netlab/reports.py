"""What a run leaves: a table in Markdown and CSV, everything in JSON, a chart in HTML."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from validation.netlab.measurements import Measurements
from validation.netlab.predictions import LibraryConstants
from validation.netlab.results import Row, Verdict

REPORT, ROWS, RESULTS, CHART = "report.md", "rows.csv", "results.json", "chart.html"
COLUMNS = ("part", "network", "case", "bytes", "measured_s", "low_s", "high_s", "predicted_s", "error")
HEADINGS = {
    "collective": "Collectives that were predicted without any further fit",
    "step": "Training steps: compute measured alone, communication predicted",
    "fit": "Collectives that the constants were fitted on",
}


@dataclass(frozen=True)
class RunFacts:
    """Where and how a run was made; load averages of one minute at its start and its end."""

    machine: dict[str, str]
    rate: float
    repeats: int
    seconds: float
    load_before: float
    load_after: float


@dataclass(frozen=True)
class Report:
    """All that is told about a run."""

    facts: RunFacts
    constants: LibraryConstants
    measurements: Measurements
    rows: Sequence[Row]
    verdicts: Sequence[Verdict]

    @property
    def is_met(self) -> bool:
        """Whether every tolerance is kept."""
        return all(verdict.is_met for verdict in self.verdicts)

    def to_markdown(self) -> str:
        """Tables for people, worst cases first."""
        return "\n".join([*_head(self), *_tables(self.rows), *_details(self)]) + "\n"

    def to_csv(self) -> str:
        """Every case in one line."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            times = (row.measured_s, row.low_s, row.high_s, row.predicted_s)
            numbers = [*(f"{time:.6f}" for time in times), f"{row.error:.4f}"]
            writer.writerow([row.part, row.network, row.case, row.num_bytes, *numbers])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Everything, single repetitions too."""
        return {
            "schema_version": 1,
            "facts": asdict(self.facts),
            "constants": asdict(self.constants),
            "verdicts": [asdict(one) | {"is_met": one.is_met} for one in self.verdicts],
            "probes": {name: [asdict(one) for one in probes] for name, probes in self.measurements.probes.items()},
            "rows": [asdict(row) | {"error": row.error} for row in self.rows],
            "collective_seconds": [
                {"network": one.case.topology.name, "case": one.case.name, "seconds": one.seconds.round(6).tolist()}
                for one in self.measurements.collectives
            ],
            "steps": [
                {
                    "network": one.case.topology.name,
                    "case": one.case.name,
                    "seconds": one.seconds.round(6).tolist(),
                    "compute_s": one.compute_s.round(6).tolist(),
                }
                for one in self.measurements.steps
            ],
        }


def write_report(report: Report, folder: Path) -> None:
    """Write all files of a run into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(report.to_markdown(), encoding="utf-8")
    (folder / ROWS).write_text(report.to_csv(), encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    from validation.netlab.charts import write_lab_chart

    write_lab_chart(report, folder / CHART)


def _head(report: Report) -> list[str]:
    facts = report.facts
    machine = ", ".join(f"{name} {value}" for name, value in facts.machine.items())
    lines = [
        "# Network lab: real gloo on emulated networks",
        "",
        "Error is predicted / measured - 1. Constants of gloo over TCP were fitted on a flat network of 4 hosts; every",
        "other network, the skewed all-to-alls and the training steps are predicted by moesim's flow engine on the",
        "cluster profiles in `profiles/`.",
        "",
        f"{machine}. Links of {facts.rate / 1e6:g} Mb/s, {facts.repeats} repetitions, {facts.seconds:.0f} s; load "
        f"average {facts.load_before:.1f} at the start, {facts.load_after:.1f} at the end.",
        "",
        "| asked for | found | at most | met |",
        "| --- | --- | --- | --- |",
    ]
    for one in report.verdicts:
        lines.append(f"| {one.what} | {one.found:.1%} | {one.tolerance:.0%} | {'yes' if one.is_met else 'NO'} |")
    return lines


def _tables(rows: Sequence[Row]) -> list[str]:
    lines = []
    for part, heading in HEADINGS.items():
        chosen = sorted((row for row in rows if row.part == part), key=lambda row: -abs(row.error))
        if chosen:
            lines += ["", f"## {heading}", "", "| network | case | bytes | measured | spread | predicted | error |"]
            lines += ["| --- | --- | --- | --- | --- | --- | --- |", *(_line(row) for row in chosen)]
    return lines


def _line(row: Row) -> str:
    spread = f"{row.low_s * 1e3:.1f} to {row.high_s * 1e3:.1f}"
    times = f"{row.measured_s * 1e3:.1f} ms | {spread} | {row.predicted_s * 1e3:.1f} ms"
    return f"| {row.network} | {row.case} | {row.size} | {times} | {row.error:+.1%} |"


def _details(report: Report) -> list[str]:
    lines = ["", "## Link rates, by plain TCP", "", "| network | link | payload Mb/s | of its bucket |"]
    lines.append("| --- | --- | --- | --- |")
    for name, probes in report.measurements.probes.items():
        lines += [f"| {name} | {one.link} | {one.measured / 1e6:.1f} | {one.error:+.1%} |" for one in probes]
    lines += ["", "## Constants", "", "| constant | value |", "| --- | --- |"]
    for name, value in asdict(report.constants).items():
        text = f"{value * 1e3:.3f} ms" if name.endswith("_s") else f"{value:.4f}"
        lines.append(f"| {name.removesuffix('_s')} | {text} |")
    return lines
