"""What the reports of kernel validations share: how errors are written, tables, and surfaces as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.cost.attention_surface import AttentionTimeSurface
from moesim.cost.moe_surface import MoeTimeSurface
from moesim.study.kernel_tables import ErrorStatistics

TABLE_SOURCE = "NVIDIA aiconfigurator kernel tables (Apache-2.0)"
LEVEL = 0.9
"""Share of rows an interval is to cover."""
COVERAGE_RANGE = (0.85, 0.95)
"""Share it may cover."""


def errors_text(found: ErrorStatistics) -> str:
    """Median and 90th percentile in per cent; a dash without rows."""
    return f"{100 * found.median:.1f} / {100 * found.p90:.1f} %" if found.count else "-"


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, at least one, as CSV."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(stream.getvalue(), encoding="utf-8")


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object on one line."""
    path.write_text(json.dumps(document, separators=(", ", ": ")) + "\n", encoding="utf-8")


def residual_document(surface: AttentionTimeSurface | MoeTimeSurface) -> dict[str, Any]:
    """Grids, domain and interval of a surface, as JSON holds them."""
    return {
        "grids": [
            {
                "axes": list(grid.axes),
                "knots": [axis.tolist() for axis in grid.knots],
                "values": np.round(grid.values.ravel(), 5).tolist(),
            }
            for grid in surface.grids
        ],
        "domain": {name: list(limits) for name, limits in surface.domain.items()},
        "interval": {
            "level": LEVEL,
            "edges_s": [float(f"{edge:.6g}") for edge in surface.interval_edges_s],
            "half_widths": np.round(surface.interval_half_widths, 4).tolist(),
        },
    }
