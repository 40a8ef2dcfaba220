"""Run a space to a CSV file: in chunks, atomically, resumable, with the funnel at its end."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, Problem
from moesim.estimation.spaces import Space, read_space
from moesim.estimation.tables import MEASURES, VERDICTS, EstimateTable, check_space, estimate_chunks

BEST_ROWS = 5
Advance = Callable[[int, int], None]


@dataclass
class SweepSummary:
    """What a sweep found.

    ``funnel`` counts rows tried, illegal, not fitting and costed; ``reasons`` rows by reason with one specimen each in
    ``specimens``; ``best`` the rows of highest throughput per device that fit.
    """

    output: str
    rows: int = 0
    resumed_rows: int = 0
    seconds: float = 0.0
    funnel: dict[str, int] = field(default_factory=lambda: {"tried": 0, "illegal": 0, "does_not_fit": 0, "costed": 0})
    reasons: dict[str, int] = field(default_factory=dict)
    specimens: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: list[dict[str, Any]] = field(default_factory=list)

    @property
    def configurations_per_s(self) -> float:
        """Rows estimated in this run per second, writing included."""
        return (self.rows - self.resumed_rows) / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Summary with the contract's keys."""
        return {
            "schema_version": 1,
            "output": self.output,
            "rows": self.rows,
            "resumed_rows": self.resumed_rows,
            "seconds": self.seconds,
            "configurations_per_s": self.configurations_per_s,
            "funnel": self.funnel,
            "reasons": self.reasons,
            "specimens": self.specimens,
            "best": self.best,
        }

    def add(self, table: EstimateTable) -> None:
        """Count the rows of one chunk."""
        counts = table.funnel()
        for name, value in (*counts.items(), ("costed", counts["ok"])):
            if name in self.funnel:
                self.funnel[name] += value
        self.rows += len(table)
        for reason, count in table.reason_counts().items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
            if reason not in self.specimens:
                first = int(np.argmax(table.reason_code == table.reasons.index(reason)))
                self.specimens[reason] = table.space.row_values(table.first_row + first)
        self._keep_best(table)

    def _keep_best(self, table: EstimateTable) -> None:
        fitting = np.flatnonzero(table.verdict == VERDICTS.index("ok"))
        rate = table["tokens_per_s"][fitting]
        order = fitting[np.argsort(-rate, kind="stable")[:BEST_ROWS]]
        rows = self.best + [table.row(int(index)) for index in order]
        self.best = sorted(rows, key=lambda row: -row["tokens_per_s"])[:BEST_ROWS]


def run_sweep(
    space_file: str | Path,
    output: Path,
    *,
    profiles: Sequence[Path] = (),
    workers: int | None = None,
    advance: Advance | None = None,
) -> SweepSummary:
    """Estimate a space into a CSV file.

    Rows go to ``OUTPUT.partial`` chunk by chunk; a run that was stopped continues there if the space is the same. The
    finished table replaces ``output`` in one move.

    Parameters
    ----------
    space_file : str or Path
        Space file.
    output : Path
        CSV file to write.
    profiles : sequence of Path
        Directories of hardware profiles that go before the shipped ones.
    workers : int, optional
        Processes.
    advance : callable, optional
        Called with rows done and rows in all after each chunk.

    Raises
    ------
    ScenarioError, FormatError
        If the space is wrong, or the output cannot be written.
    """
    space = read_space(space_file)
    if output.is_dir() or not output.absolute().parent.is_dir():
        problem = Problem(
            code="E-OUT-001",
            message=f"{output} cannot be written: it is a folder, or its folder does not exist",
            remedy="name a file in an existing folder",
            file=str(output),
        )
        raise FormatError([problem])
    check_space(space, profiles)
    journal = _Journal(space, output, profiles)
    summary = journal.resume()
    began = time.perf_counter()
    chunks = estimate_chunks(space, profiles=profiles, workers=workers, first_row=summary.rows)
    for table in chunks:
        journal.append(table, summary)
        summary.seconds = time.perf_counter() - began
        if advance is not None:
            advance(summary.rows, len(space))
    journal.finish()
    return summary


class _Journal:
    """The partial file of a sweep and what was counted so far."""

    def __init__(self, space: Space, output: Path, profiles: Sequence[Path]) -> None:
        self._space = space
        self._output = output
        self._partial = output.with_name(output.name + ".partial")
        self._state = output.with_name(output.name + ".partial.json")
        content = [space.base.data, [[axis.name, dict(axis.values)] for axis in space.axes], [str(p) for p in profiles]]
        self._digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def resume(self) -> SweepSummary:
        """Summary of a stopped run of the same space, or a new one with the header written."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            if state["digest"] == self._digest and self._partial.stat().st_size >= state["bytes"]:
                os.truncate(self._partial, state["bytes"])
                summary = SweepSummary(**state["summary"])
                summary.resumed_rows, summary.seconds = summary.rows, 0.0
                return summary
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no usable journal: start from the beginning
        header = [*self._space.paths, "verdict", "reason", *MEASURES]
        with self._partial.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerow(header)
        return SweepSummary(str(self._output))

    def append(self, table: EstimateTable, summary: SweepSummary) -> None:
        """Append a chunk, then note that it is complete."""
        with self._partial.open("a", newline="", encoding="utf-8") as stream:
            stream.write(table_csv(table))
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        summary.add(table)
        state = {"digest": self._digest, "bytes": size, "summary": asdict(summary)}
        pending = self._state.with_name(self._state.name + ".new")
        pending.write_text(json.dumps(state), encoding="utf-8")
        pending.replace(self._state)

    def finish(self) -> None:
        """Move the finished table to its place."""
        self._partial.replace(self._output)
        self._state.unlink(missing_ok=True)


def table_csv(table: EstimateTable) -> str:
    """Rows of a table as CSV text without header; numbers of illegal rows are empty."""
    rows = np.arange(table.first_row, table.first_row + len(table))
    columns: list[list[Any]] = []
    for axis, index in zip(table.space.axes, table.space.axis_indices(rows), strict=True):
        for values in axis.values.values():
            texts = [_cell(value) for value in values]
            columns.append([texts[position] for position in index.tolist()])
    columns.append([VERDICTS[code] for code in table.verdict.tolist()])
    columns.append([table.reasons[code] for code in table.reason_code.tolist()])
    for name in MEASURES:
        columns.append([repr(value) if value == value else "" for value in table[name].tolist()])
    text = io.StringIO()
    csv.writer(text).writerows(zip(*columns, strict=True))
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
