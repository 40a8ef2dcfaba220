"""Predicted over measured, case by case: one panel, a colour for each suite."""

from __future__ import annotations

from pathlib import Path

from plotly import graph_objects as go

from moesim.report.pages import Fact, Note, write_chart
from moesim.report.styles import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, base_layout
from moesim.study.compared_cases import ComparedCase
from moesim.study.measurement_comparison import Comparison

HEIGHT = 640
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY, INK)
SYMBOLS = ("circle", "diamond", "square")
TWENTY_PERCENT = 0.2
WORST_LISTED = 12
MICRO = 1e-6


def comparison_figure(comparison: Comparison) -> go.Figure:
    """Ratio of predicted to measured time over measured time, both on logarithmic axes."""
    figure = go.Figure(layout=base_layout(HEIGHT, left_margin=80, top_margin=90, bottom_margin=60))
    for index, ((suite,), cases) in enumerate(comparison.groups(lambda case: (case.suite,)).items()):
        colour = COLOURS[index % len(COLOURS)]
        symbol = SYMBOLS[index // len(COLOURS) % len(SYMBOLS)]
        figure.add_trace(
            go.Scatter(
                x=[one.case.median_s / MICRO for one in cases],
                y=[one.predicted_s / one.case.median_s for one in cases],
                mode="markers",
                name=suite,
                marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.75},
                text=[_hover(one) for one in cases],
                hoverinfo="text",
            )
        )
    figure.add_hline(y=1.0, line={"color": INK, "width": 1})
    figure.add_hrect(
        y0=1.0 / (1.0 + TWENTY_PERCENT), y1=1.0 + TWENTY_PERCENT, fillcolor=FAINT, line_width=0, layer="below"
    )
    figure.update_xaxes(type="log", title="measured, µs", gridcolor=FAINT, fixedrange=True)
    figure.update_yaxes(type="log", title="predicted / measured", gridcolor=FAINT, fixedrange=True, dtick="D2")
    return figure


def _hover(one: ComparedCase) -> str:
    return (
        f"{one.case.case}<br>measured {one.case.median_s / MICRO:.2f} µs, predicted {one.predicted_s / MICRO:.2f} µs "
        f"({one.error:+.1%})"
    )


def write_comparison_chart(comparison: Comparison, path: str | Path, *, source: str) -> None:
    """Write the figure with the errors of each suite into one HTML file that works offline.

    Parameters
    ----------
    comparison : Comparison
        What to draw.
    path : str or Path
        The HTML file.
    source : str
        Name of the file of measurements.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    facts = [
        Fact(suite, f"{errors.median:.1%}", f"90th percentile {errors.p90:.1%}\nbias {errors.bias:+.1%}")
        for suite, errors in comparison.by_suite().items()
    ]
    worst = [(one.case.case, f"{one.error:+.1%}") for one in comparison.worst()[:WORST_LISTED]]
    write_chart(
        comparison_figure(comparison),
        path,
        title=f"{source}: predicted against measured",
        subtitle=f"{comparison.device} under {comparison.stack}; median error of each suite; grey within 20 %",
        facts=facts,
        notes=[Note("Worst cases", worst)],
    )
