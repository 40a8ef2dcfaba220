"""Where a step goes: exposed and hidden time by category, bounds, and the times of the pipeline's stages."""

from __future__ import annotations

from dataclasses import dataclass

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moesim.estimation.step_estimate import StepEstimate
from moesim.report.numbers import Scale, percent, time_scale
from moesim.report.styles import (
    BLUE,
    FAMILIES,
    FONT_SIZE,
    GREY,
    INK,
    MUTED,
    SKY,
    SMALL_FONT_SIZE,
    STEP_CATEGORIES,
    Family,
    add_number,
    add_panel_title,
    base_layout,
    row_axis,
    value_axis,
)

NEGLIGIBLE = 1e-9
"""Share of a step below which a category is rounding, not time."""
STEP_ROWS = ("Step", "Bounds", "Interval")
ROW_PIXELS, STAGE_PIXELS, GAP_PIXELS = 27, 130, 78
TOP_PIXELS = 104  # three rows of the legend, on a narrow window
BOTTOM_PIXELS = {False: 34, True: 56}  # with a title of the last axis
RIGHT_PIXELS = {False: 180, True: 270}
MANY_STAGES = 16
COLUMNS_PIXELS = {"exposed": 88, "share": 160, "hidden": 248}


@dataclass(frozen=True)
class BreakdownRow:
    """One category of a step, in seconds."""

    category: str
    exposed_s: float
    hidden_s: float

    @property
    def name(self) -> str:
        """Name for people."""
        return STEP_CATEGORIES[self.category].name

    @property
    def family(self) -> Family:
        """What it is coloured as."""
        return STEP_CATEGORIES[self.category].family


def breakdown_rows(estimate: StepEstimate) -> list[BreakdownRow]:
    """Categories that take time, most exposed first."""
    rows = [
        BreakdownRow(name, estimate.exposed_s.get(name, 0.0), estimate.hidden_s.get(name, 0.0))
        for name in STEP_CATEGORIES
    ]
    threshold = NEGLIGIBLE * estimate.step_time_s
    shown = [row for row in rows if max(row.exposed_s, row.hidden_s) > threshold]
    return sorted(shown, key=lambda row: (-row.exposed_s, -row.hidden_s))


def breakdown_figure(estimate: StepEstimate) -> go.Figure:
    """Draw where the time of a step goes.

    Parameters
    ----------
    estimate : StepEstimate
        One answer.

    Returns
    -------
    Figure
        A panel with the whole step, its bounds and its interval; one with a bar per category, exposed time solid and
        hidden time hatched behind it; with a pipeline, one with the time of each stage. The traces of the exposed
        bars have ``meta`` "exposed" and sum to the step time, those of the hidden ones "hidden".
    """
    rows = breakdown_rows(estimate)
    scale = time_scale(estimate.step_time_s)
    has_stages = len(estimate.pipeline.stage_times_s) > 1
    heights = [ROW_PIXELS * len(STEP_ROWS), ROW_PIXELS * len(rows), *([STAGE_PIXELS] if has_stages else [])]
    inner = sum(heights) + GAP_PIXELS * (len(heights) - 1)
    figure = make_subplots(
        rows=len(heights), cols=1, row_heights=heights, vertical_spacing=GAP_PIXELS / inner if len(heights) > 1 else 0
    )
    has_hidden = any(row.hidden_s > 0 for row in rows)
    margins = {"top_margin": TOP_PIXELS, "bottom_margin": BOTTOM_PIXELS[has_stages]}
    layout = base_layout(inner + sum(margins.values()), right_margin=RIGHT_PIXELS[has_hidden], **margins)
    figure.update_layout(layout, barmode="stack", bargap=0.28, legend_traceorder="normal")
    _draw_step(figure, estimate, rows, scale)
    _draw_categories(figure, estimate, rows, scale)
    if has_stages:
        _draw_stages(figure, estimate)
    return figure


def _draw_step(figure: go.Figure, estimate: StepEstimate, rows: list[BreakdownRow], scale: Scale) -> None:
    """First panel: the whole step by family, the bounds and the interval below it."""
    for family in FAMILIES:
        total_s = sum(row.exposed_s for row in rows if row.family == family)
        if total_s > 0:
            hover = (
                f"<b>{family.name}</b><br>{scale.text(total_s)}, {percent(total_s / estimate.step_time_s)} of the step"
            )
            figure.add_bar(
                x=[total_s / scale.size],
                y=[STEP_ROWS[0]],
                orientation="h",
                name=family.name,
                meta="family",
                marker={"color": family.colour, "line": {"color": "white", "width": 1}},
                hovertemplate=f"{hover}<extra></extra>",
                row=1,
                col=1,
            )
    interval = estimate.interval_s
    ranges = {
        STEP_ROWS[1]: (
            estimate.lower_s,
            estimate.upper_s,
            "lower: peak rates and perfect overlap<br>upper: no overlap",
        ),
        STEP_ROWS[2]: (interval.low, interval.high, f"{interval.level:.0%} of the errors of the calibrated figures"),
    }
    for name, (low_s, high_s, meaning) in ranges.items():
        _draw_range(figure, name, low_s, high_s, scale, meaning)
        add_number(figure, f"{scale.number(low_s)} – {scale.text(high_s)}", row=name, axis="", pixels=160)
    figure.add_shape(
        type="line",
        xref="x",
        yref="y domain",
        x0=estimate.step_time_s / scale.size,
        x1=estimate.step_time_s / scale.size,
        y0=0,
        y1=1,
        line={"color": INK, "width": 1.5, "dash": "dot"},
    )
    add_number(figure, f"<b>{scale.text(estimate.step_time_s)}</b>", row=STEP_ROWS[0], axis="", pixels=160)
    add_panel_title(figure, "Whole step", axis="")
    figure.update_yaxes(row_axis(list(STEP_ROWS)), row=1, col=1)
    figure.update_yaxes(
        tickvals=list(STEP_ROWS),
        ticktext=["Step", "Bounds", f"{interval.level:.0%}".replace("%", " %") + " interval"],
        row=1,
        col=1,
    )
    figure.update_xaxes(value_axis(""), ticksuffix=f" {scale.symbol}", row=1, col=1)


def _draw_range(figure: go.Figure, name: str, low_s: float, high_s: float, scale: Scale, meaning: str) -> None:
    figure.add_scatter(
        x=[low_s / scale.size, high_s / scale.size],
        y=[name, name],
        mode="lines+markers",
        line={"color": MUTED, "width": 3},
        marker={"symbol": "line-ns", "size": 12, "color": MUTED, "line": {"color": MUTED, "width": 3}},
        hovertemplate=f"<b>%{{x:,.4~r}} {scale.symbol}</b><br>{meaning}<extra></extra>",
        showlegend=False,
        meta="range",
        row=1,
        col=1,
    )


def _draw_categories(figure: go.Figure, estimate: StepEstimate, rows: list[BreakdownRow], scale: Scale) -> None:
    """Second panel: one bar per category, and its numbers beside it."""
    for family in FAMILIES:
        members = [row for row in rows if row.family == family]
        if members:
            _draw_bars(figure, estimate, members, scale, is_hidden=False)
    for family in FAMILIES:
        members = [row for row in rows if row.family == family and row.hidden_s > 0]
        if members:
            _draw_bars(figure, estimate, members, scale, is_hidden=True)
    has_hidden = any(row.hidden_s > 0 for row in rows)
    for title, pixels in COLUMNS_PIXELS.items():
        if title != "hidden" or has_hidden:
            heading = "of step" if title == "share" else title
            add_number(figure, heading, row=None, axis="2", pixels=pixels)
    for row in rows:
        add_number(figure, scale.text(row.exposed_s), row=row.name, axis="2", pixels=COLUMNS_PIXELS["exposed"])
        share = percent(row.exposed_s / estimate.step_time_s)
        add_number(figure, share, row=row.name, axis="2", pixels=COLUMNS_PIXELS["share"])
        if row.hidden_s > 0:
            add_number(figure, scale.text(row.hidden_s), row=row.name, axis="2", pixels=COLUMNS_PIXELS["hidden"])
    if has_hidden:
        figure.add_bar(
            x=[None],
            y=[rows[0].name],
            orientation="h",
            name="Hidden, not in the step",
            marker=_marker(GREY, is_hidden=True),
            row=2,
            col=1,
        )
    title = "Parts of the step"
    if len(estimate.pipeline.stage_times_s) > 1:
        title += ", seen from the critical stage"
    add_panel_title(figure, title, axis="2")
    figure.update_yaxes(row_axis([row.name for row in rows]), row=2, col=1)
    figure.update_xaxes(value_axis(""), ticksuffix=f" {scale.symbol}", row=2, col=1)


def _draw_bars(
    figure: go.Figure, estimate: StepEstimate, rows: list[BreakdownRow], scale: Scale, *, is_hidden: bool
) -> None:
    times = [row.hidden_s if is_hidden else row.exposed_s for row in rows]
    hover = [
        f"<b>{row.name}</b><br>exposed {row.exposed_s / scale.size:,.6g} {scale.symbol}, "
        f"{row.exposed_s / estimate.step_time_s:.3%} of the step<br>"
        f"hidden {row.hidden_s / scale.size:,.6g} {scale.symbol}"
        for row in rows
    ]
    figure.add_bar(
        x=[time_s / scale.size for time_s in times],
        y=[row.name for row in rows],
        orientation="h",
        showlegend=False,
        meta="hidden" if is_hidden else "exposed",
        marker=_marker(rows[0].family.colour, is_hidden=is_hidden),
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        row=2,
        col=1,
    )


def _marker(colour: str, *, is_hidden: bool) -> dict[str, object]:
    """Solid where time is exposed, hatched on white where it is hidden."""
    if not is_hidden:
        return {"color": colour, "line": {"width": 0}}
    pattern = {"shape": "/", "fgcolor": colour, "bgcolor": "white", "size": 7, "solidity": 0.25}
    return {"color": colour, "pattern": pattern, "line": {"color": colour, "width": 1}}


def _draw_stages(figure: go.Figure, estimate: StepEstimate) -> None:
    """Third panel: the time of a micro-batch on each stage."""
    times = estimate.pipeline.stage_times_s
    critical = estimate.pipeline.critical_stage
    scale = time_scale(max(times))
    labelled = range(len(times)) if len(times) <= MANY_STAGES else [critical]
    figure.add_bar(
        x=list(range(len(times))),
        y=[time_s / scale.size for time_s in times],
        marker={"color": [BLUE if stage == critical else SKY for stage in range(len(times))]},
        text=[scale.number(times[stage]) if stage in labelled else "" for stage in range(len(times))],
        textposition="outside",
        textfont={"size": SMALL_FONT_SIZE},
        textangle=0,
        cliponaxis=False,
        hovertemplate=f"<b>Stage %{{x}}</b><br>%{{y:,.6~g}} {scale.symbol}<extra></extra>",
        showlegend=False,
        meta="stages",
        row=3,
        col=1,
    )
    passes = "forward and backward" if estimate.kind == "training" else "forward"
    title = f"One micro-batch on each stage, {passes} (stage {critical} is critical)"
    add_panel_title(figure, title, axis="3")
    step = max(1, -(-len(times) // MANY_STAGES))
    figure.update_xaxes(
        title={"text": "Pipeline stage", "font": {"size": FONT_SIZE}},
        tickvals=list(range(0, len(times), step)),
        tickfont={"size": SMALL_FONT_SIZE},
        fixedrange=True,
        row=3,
        col=1,
    )
    figure.update_yaxes(value_axis(""), ticksuffix=f" {scale.symbol}", nticks=4, row=3, col=1)
    figure.update_yaxes(range=[0, max(times) / scale.size * 1.2], row=3, col=1)
    idle = percent(estimate.pipeline.bubble_fraction)
    add_number(figure, f"idle over busy {idle}", row=None, axis="3", pixels=160)
