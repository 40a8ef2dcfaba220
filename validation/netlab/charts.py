"""Chart of a run: predicted over measured, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.report.pages import Fact, write_chart
from moesim.report.styles import BLUE, FAINT, GREEN, MUTED, RULE, SMALL_FONT_SIZE, VERMILION, base_layout
from validation.netlab.results import MEDIAN_TOLERANCE, STEP_TOLERANCE, WORST_TOLERANCE, Row

if TYPE_CHECKING:
    from validation.netlab.reports import Report

ROW_PIXELS = 21
FONT = {"size": SMALL_FONT_SIZE}
STYLES = {
    "collective": ("Collectives, predicted", BLUE, "circle"),
    "step": ("Training steps, predicted", VERMILION, "square"),
    "fit": ("Collectives the constants were fitted on", GREEN, "diamond"),
}


def write_lab_chart(report: Report, path: Path) -> None:
    """Write the chart as one HTML file that needs nothing else."""
    facts = report.facts
    load = f"load average {facts.load_before:.1f} to {facts.load_after:.1f}"
    shown = [Fact(one.what.capitalize(), f"{one.found:.1%}", f"at most {one.tolerance:.0%}") for one in report.verdicts]
    write_chart(
        lab_figure(report.rows),
        path,
        title="Network lab: predicted over measured time",
        subtitle="Real gloo over real TCP on emulated networks; constants fitted on a flat network of 4 hosts only",
        facts=[*shown, Fact("Links", f"{facts.rate / 1e6:g} Mb/s", f"{facts.repeats} repetitions, {load}")],
    )


def lab_figure(rows: Sequence[Row]) -> Any:
    """Error of every case with the spread of its repetitions; shaded where collectives should be.

    Parameters
    ----------
    rows : sequence of Row
        Cases; those of a network stand together.
    """
    from plotly import graph_objects as go

    names = [_name(row) for row in rows]
    figure = go.Figure(layout=base_layout(150 + ROW_PIXELS * len(rows), left_margin=330, top_margin=70))
    widest = max(WORST_TOLERANCE, *(abs(row.error) for row in rows)) * 105
    for edge, opacity in ((WORST_TOLERANCE, 0.35), (STEP_TOLERANCE, 0.45), (MEDIAN_TOLERANCE, 0.6)):
        figure.add_vrect(x0=-100 * edge, x1=100 * edge, fillcolor=FAINT, opacity=opacity, line_width=0, layer="below")
    for part, (title, colour, symbol) in STYLES.items():
        chosen = [(row, name) for row, name in zip(rows, names, strict=True) if row.part == part]
        figure.add_scatter(
            x=[100 * row.error for row, _ in chosen],
            y=[name for _, name in chosen],
            mode="markers",
            name=title,
            marker={"color": colour, "symbol": symbol, "size": 9},
            error_x=_spread([row for row, _ in chosen], colour),
            text=[_hover(row) for row, _ in chosen],
            hovertemplate="%{y}<br>%{text}<extra></extra>",
        )
    figure.update_xaxes(
        title={"text": "Predicted over measured, less one, in %; bars: fastest and slowest repetition", "font": FONT},
        range=[-widest, widest],
        gridcolor=RULE,
        zerolinecolor=MUTED,
        zerolinewidth=2,
        tickfont=FONT,
    )
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], range=[-1, len(names)], tickfont=FONT)
    return figure


def _name(row: Row) -> str:
    return ", ".join(filter(None, (f"{row.network}: {row.case.replace('_', ' ')}", row.size)))


def _spread(rows: Sequence[Row], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [100 * (row.predicted_s / row.low_s - row.predicted_s / row.measured_s) for row in rows],
        "arrayminus": [100 * (row.predicted_s / row.measured_s - row.predicted_s / row.high_s) for row in rows],
        "symmetric": False,
        "color": colour,
        "thickness": 1,
        "width": 0,
    }


def _hover(row: Row) -> str:
    return f"measured {row.measured_s * 1e3:.1f} ms, predicted {row.predicted_s * 1e3:.1f} ms, {row.error:+.1%}"
