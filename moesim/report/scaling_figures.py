"""Step time, throughput and cost against the number of devices, weak and strong, with perfect scaling dashed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moesim.report.numbers import Scale, percent, time_scale
from moesim.report.styles import (
    BLUE,
    FAINT,
    FONT_SIZE,
    INK,
    MUTED,
    RULE,
    SMALL_FONT_SIZE,
    VERMILION,
    add_panel_title,
    base_layout,
)
from moesim.structure.columns import FloatArray
from moesim.study.scaling import Scaling, ScalingCurve

HEIGHT = 520
MAX_DEVICE_LABELS = 7
MIN_VALUE_RATIO = 4.0
PADDING_RATIO = 1.35
TICK_DIGITS = ((1, 10), (1, 2, 5, 10), (1, 1.5, 2, 3, 4, 5, 6, 8, 10))
MIN_TICKS, MAX_TICKS = 3, 8
ABBREVIATED_FROM = 1e5
LINE_WIDTH = 2.5
IDEAL_LINE = {"color": MUTED, "width": 1.5, "dash": "dash"}
HOLLOW = "white"  # the ground of a panel: filled, so that no line shows through as it does through an "-open" symbol


@dataclass(frozen=True)
class CurveStyle:
    """How one way of scaling is drawn; the second of two equal points stays visible on the first."""

    name: str
    colour: str
    symbol: str
    size: int


STYLES = {
    "weak": CurveStyle("Weak: sequences per device kept", BLUE, "circle", 12),
    "strong": CurveStyle("Strong: sequences per step kept", VERMILION, "square", 8),
}


@dataclass(frozen=True)
class Panel:
    """One quantity of the curves: its fields, and what one of its axis is in SI units."""

    title: str
    field: str
    ideal_field: str
    unit_size: float


def scaling_figure(scaling: Scaling) -> go.Figure:
    """Draw a scenario on fewer and on more devices.

    Parameters
    ----------
    scaling : Scaling
        Both curves.

    Returns
    -------
    Figure
        Three panels over the number of devices, all axes logarithmic. Points that do not fit in memory are hollow,
        illegal ones are left out. The traces of the curves have ``meta`` "<mode> <field>", those of perfect scaling
        "ideal <mode> <field>".
    """
    unit = time_scale(max(float(np.nanmax(curve.step_time_s)) for curve in scaling.curves))
    panels = _panels(unit)
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.08)
    figure.update_layout(base_layout(HEIGHT, left_margin=65, right_margin=30))
    has_price = scaling.base.cost.usd_per_billion_tokens is not None
    for number, panel in enumerate(panels, start=1):
        if panel.field == "usd_per_billion_tokens" and not has_price:
            _draw_missing_price(figure, scaling, number)
            continue
        for curve in scaling.curves:
            _draw_ideal(figure, curve, panel, number)
        for curve in scaling.curves:
            _draw_curve(figure, scaling, curve, panel, unit, number)
        _set_axes(figure, scaling, panel, number)
    _draw_legend(figure, scaling)
    for number, panel in enumerate(panels, start=1):
        add_panel_title(figure, panel.title, axis=_axis(number))
    return figure


def _panels(unit: Scale) -> tuple[Panel, ...]:
    cost = "usd_per_billion_tokens"
    return (
        Panel(f"Step time in {unit.symbol}", "step_time_s", "ideal_step_time_s", unit.size),
        Panel("Throughput in tokens/s", "tokens_per_s", "ideal_tokens_per_s", 1.0),
        Panel("Cost in USD per billion tokens", cost, f"ideal_{cost}", 1.0),
    )


def legal_devices(scaling: Scaling) -> list[int]:
    """Numbers of devices at which at least one way of scaling is legal, ascending."""
    legal = {int(curve.devices[row]) for curve in scaling.curves for row in legal_rows(curve)}
    return sorted(legal)


def legal_rows(curve: ScalingCurve) -> list[int]:
    """Positions of the points that have numbers."""
    return [row for row, point in enumerate(curve.points) if point.verdict != "illegal"]


def has_point_that_does_not_fit(scaling: Scaling) -> bool:
    """Whether some point has numbers and no room in memory."""
    return any(point.verdict == "does_not_fit" for curve in scaling.curves for point in curve.points)


def _draw_legend(figure: go.Figure, scaling: Scaling) -> None:
    """Write the legend with traces of its own: plotly would draw a curve's as its first point, often a hollow one."""
    for curve in scaling.curves:
        style = STYLES[curve.mode]
        marker = {"symbol": style.symbol, "size": style.size, "color": style.colour}
        line = {"color": style.colour, "width": LINE_WIDTH}
        _draw_entry(figure, name=style.name, mode="lines+markers", marker=marker, line=line)
    if has_point_that_does_not_fit(scaling):
        marker = {"symbol": "circle", "size": 11, "color": HOLLOW, "line": {"width": LINE_WIDTH, "color": MUTED}}
        _draw_entry(figure, name="Hollow: does not fit in memory", mode="markers", marker=marker)
    _draw_entry(figure, name="Perfect scaling", mode="lines", line=IDEAL_LINE)


def _draw_entry(figure: go.Figure, **settings: object) -> None:
    figure.add_scatter(x=[None], y=[None], showlegend=True, row=1, col=1, **settings)


def _draw_ideal(figure: go.Figure, curve: ScalingCurve, panel: Panel, number: int) -> None:
    rows = legal_rows(curve)
    figure.add_scatter(
        x=[int(curve.devices[row]) for row in rows],
        y=[float(getattr(curve, panel.ideal_field)[row]) / panel.unit_size for row in rows],
        mode="lines",
        line=IDEAL_LINE,
        hoverinfo="skip",
        showlegend=False,
        meta=f"ideal {curve.mode} {panel.field}",
        row=1,
        col=number,
    )


def _draw_curve(
    figure: go.Figure, scaling: Scaling, curve: ScalingCurve, panel: Panel, unit: Scale, number: int
) -> None:
    style = STYLES[curve.mode]
    rows = legal_rows(curve)
    figure.add_scatter(
        x=[int(curve.devices[row]) for row in rows],
        y=[float(getattr(curve, panel.field)[row]) / panel.unit_size for row in rows],
        mode="lines+markers",
        line={"color": style.colour, "width": LINE_WIDTH},
        marker={
            "symbol": style.symbol,
            "size": style.size,
            "color": [style.colour if curve.points[row].verdict == "ok" else HOLLOW for row in rows],
            "line": {"width": LINE_WIDTH, "color": style.colour},
        },
        customdata=[_hover(scaling, curve, row, unit) for row in rows],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
        meta=f"{curve.mode} {panel.field}",
        row=1,
        col=number,
    )


def _hover(scaling: Scaling, curve: ScalingCurve, row: int, unit: Scale) -> str:
    step, low, high = (
        f"{values[row] / unit.size:,.6g}" for values in (curve.step_time_s, curve.lower_s, curve.upper_s)
    )
    lines = [
        f"<b>{int(curve.devices[row]):,} devices, {curve.mode}</b>",
        f"step {step} {unit.symbol}, bounds {low} – {high} {unit.symbol}",
        f"{curve.tokens_per_s[row]:,.0f} tokens/s, {percent(float(curve.efficiency_fraction[row]))} of perfect scaling",
    ]
    if scaling.base.cost.usd_per_billion_tokens is not None:
        lines.append(f"{curve.usd_per_billion_tokens[row]:,.2f} USD per billion tokens")
    if curve.expert_degrees.max() > 1:
        lines.append(f"expert degree {curve.expert_degrees[row]}")
    if curve.points[row].reason:
        lines.append(f"<b>does not fit:</b> {curve.points[row].reason}")
    return "<br>".join(lines)


def _set_axes(figure: go.Figure, scaling: Scaling, panel: Panel, number: int) -> None:
    devices = legal_devices(scaling)
    labels = device_labels(devices, scaling.base.num_devices)
    line = {"showline": True, "linecolor": RULE, "gridcolor": FAINT, "fixedrange": True, "zeroline": False}
    figure.update_xaxes(
        type="log",
        range=[math.log10(devices[0] / 1.4), math.log10(devices[-1] * 1.4)],
        tickvals=devices,
        ticktext=labels,
        tickangle=0,
        tickfont={"size": SMALL_FONT_SIZE},
        title={"text": "Devices", "font": {"size": FONT_SIZE}},
        **line,
        row=1,
        col=number,
    )
    low, high = _value_range(scaling, panel)
    ticks = log_ticks(low, high)
    figure.update_yaxes(
        type="log",
        range=[math.log10(low), math.log10(high)],
        tickvals=ticks,
        ticktext=tick_texts(ticks),
        tickfont={"size": SMALL_FONT_SIZE},
        **line,
        row=1,
        col=number,
    )


def _value_range(scaling: Scaling, panel: Panel) -> tuple[float, float]:
    """Range that shows every point and the perfect line, at least ``MIN_VALUE_RATIO`` from end to end."""
    fields = (panel.field, panel.ideal_field)
    values: FloatArray = np.concatenate(
        [getattr(curve, field)[legal_rows(curve)] for curve in scaling.curves for field in fields]
    )
    low, high = float(np.nanmin(values)) / panel.unit_size, float(np.nanmax(values)) / panel.unit_size
    widening = max(PADDING_RATIO, math.sqrt(MIN_VALUE_RATIO / (high / low)))
    return low / widening, high * widening


def device_labels(devices: Sequence[int], base: int) -> list[str]:
    """Texts of the ticks: at most seven and always the base's, which is bold; the others are empty.

    Examples
    --------
    >>> device_labels([8, 16, 32], 16)
    ['8', '<b>16</b>', '32']
    """
    every = -(-len(devices) // MAX_DEVICE_LABELS)
    position = devices.index(base)
    labels = [str(count) if (row - position) % every == 0 else "" for row, count in enumerate(devices)]
    labels[position] = f"<b>{base}</b>"
    return labels


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis: as few digits as give at least three ticks.

    Examples
    --------
    >>> log_ticks(3.0, 40.0)
    [5.0, 10.0, 20.0]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in TICK_DIGITS:
        # Through text: 5e-3 rather than 5 * 10**-3, which is not the nearest double.
        candidates = {float(f"{digit}e{decade}") for decade in decades for digit in digits}
        ticks = sorted(tick for tick in candidates if low <= tick <= high)
        if len(ticks) >= MIN_TICKS:
            break
    every = -(-len(ticks) // MAX_TICKS)
    return ticks[::every]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Texts of ascending ticks: thousands in one way all along an axis, abbreviated if it reaches 100,000.

    Examples
    --------
    >>> tick_texts([500.0, 1000.0, 2000.0]), tick_texts([500.0, 1000.0, 2e6])
    (['500', '1,000', '2,000'], ['500', '1k', '2M'])
    """
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if ticks[-1] >= ABBREVIATED_FROM else ()
    units = [next(((size, symbol) for size, symbol in sizes if tick >= size), (1.0, "")) for tick in ticks]
    return [f"{tick / size:,g}{symbol}" for tick, (size, symbol) in zip(ticks, units, strict=True)]


def _draw_missing_price(figure: go.Figure, scaling: Scaling, number: int) -> None:
    axis = _axis(number)
    figure.update_xaxes(visible=False, row=1, col=number)
    figure.update_yaxes(visible=False, row=1, col=number)
    figure.add_annotation(
        text=f"No cost: neither cluster {scaling.base.cluster}<br>nor device {scaling.base.device} has a price.",
        xref=f"x{axis} domain",
        yref=f"y{axis} domain",
        x=0.5,
        y=0.5,
        showarrow=False,
        font={"size": FONT_SIZE, "color": INK},
    )
    figure.add_scatter(x=[None], y=[None], showlegend=False, row=1, col=number)


def _axis(number: int) -> str:
    """Number of a panel's axes as plotly writes it."""
    return "" if number == 1 else str(number)
