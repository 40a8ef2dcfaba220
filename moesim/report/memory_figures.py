"""Memory of the fullest device: its categories one after the other, against what is usable."""

from __future__ import annotations

from dataclasses import dataclass

from plotly import graph_objects as go

from moesim.estimation.step_estimate import MemoryAnswer, StepEstimate
from moesim.report.numbers import Scale, memory_scale, percent
from moesim.report.styles import (
    FONT_SIZE,
    GREY,
    INK,
    MEMORY_CATEGORIES,
    VERMILION,
    add_number,
    base_layout,
    row_axis,
    value_axis,
)

SUM_ROW, FREE_ROW, MISSING_ROW = "Together", "Free", "Missing"
ROW_PIXELS = 44
SIZE_PIXELS, SHARE_PIXELS = 100, 190
ROOM_FACTOR = 1.06


@dataclass(frozen=True)
class MemoryRow:
    """A category of memory and where its bar starts: at the end of the one before."""

    name: str
    colour: str
    start: int
    num_bytes: int


def memory_rows(memory: MemoryAnswer) -> list[MemoryRow]:
    """Categories that take memory, in their order, each starting where the one before ends."""
    rows: list[MemoryRow] = []
    start = 0
    for category, (name, colour) in MEMORY_CATEGORIES.items():
        num_bytes = int(getattr(memory, category))
        if num_bytes:
            rows.append(MemoryRow(name, colour, start, num_bytes))
            start += num_bytes
    return rows


def memory_figure(estimate: StepEstimate) -> go.Figure:
    """Draw the memory of the fullest device against what is usable.

    Parameters
    ----------
    estimate : StepEstimate
        One answer.

    Returns
    -------
    Figure
        A bar per category from the end of the one before, their stack, and what is free or missing. The traces of the
        categories have ``meta`` "category" and sum to the peak.
    """
    memory = estimate.memory
    rows = memory_rows(memory)
    last = FREE_ROW if estimate.fits else MISSING_ROW
    names = [*(row.name for row in rows), SUM_ROW, last]
    scale = memory_scale(memory.peak)
    figure = go.Figure(
        layout=base_layout(ROW_PIXELS * len(names) + 150, right_margin=220, top_margin=90, bottom_margin=60)
    )
    figure.update_layout(
        barmode="overlay", bargap=0.3, showlegend=False, title=_title(estimate, scale), yaxis=row_axis(names)
    )
    for row in rows:
        _add_bar(figure, row, row.name, memory, scale, meta="category")
    for row in rows:
        _add_bar(figure, row, SUM_ROW, memory, scale, meta="sum")
    _add_difference(figure, memory, last, scale)
    _add_capacity(figure, memory, scale)
    _add_numbers(figure, memory, rows, last, scale)
    figure.update_xaxes(value_axis("Memory of one device"), ticksuffix=" GiB")
    figure.update_xaxes(range=[0, max(memory.peak, memory.capacity) / scale.size * ROOM_FACTOR])
    return figure


def _title(estimate: StepEstimate, scale: Scale) -> dict[str, object]:
    memory, stages = estimate.memory, len(estimate.pipeline.stage_times_s)
    where = f", on pipeline stage {memory.peak_stage} of 0–{stages - 1}" if stages > 1 else ""
    text = f"Peak {scale.text(memory.peak)} of {scale.text(memory.capacity)} usable{where}"
    if not estimate.fits:
        text += (
            f": <span style='color:{VERMILION}'><b>does not fit, {scale.text(memory.deficit)} are missing</b></span>"
        )
    return {"text": text, "x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top", "font": {"size": FONT_SIZE + 3}}


def _add_bar(figure: go.Figure, row: MemoryRow, name: str, memory: MemoryAnswer, scale: Scale, *, meta: str) -> None:
    figure.add_bar(
        x=[row.num_bytes / scale.size],
        base=[row.start / scale.size],
        y=[name],
        orientation="h",
        meta=meta,
        marker={"color": row.colour, "line": {"color": "white", "width": 1 if meta == "sum" else 0}},
        hovertemplate=(
            f"<b>{row.name}</b><br>{row.num_bytes / scale.size:,.4f} GiB ({row.num_bytes:,} bytes)<br>"
            f"{percent(row.num_bytes / memory.peak)} of the peak<extra></extra>"
        ),
    )


def _add_difference(figure: go.Figure, memory: MemoryAnswer, name: str, scale: Scale) -> None:
    """Last row: what is free, or, hatched, what is missing."""
    size = abs(memory.capacity - memory.peak)
    colour = VERMILION if memory.deficit else GREY
    shape = "x" if memory.deficit else ""
    pattern = {"shape": shape, "fgcolor": colour, "bgcolor": "white", "size": 8, "solidity": 0.35}
    figure.add_bar(
        x=[size / scale.size],
        base=[min(memory.capacity, memory.peak) / scale.size],
        y=[name],
        orientation="h",
        meta="difference",
        marker={
            "color": colour if memory.deficit else "white",
            "pattern": pattern,
            "line": {"color": colour, "width": 1},
        },
        hovertemplate=f"<b>{name}</b><br>{size / scale.size:,.4f} GiB ({size:,} bytes)<extra></extra>",
    )


def _add_capacity(figure: go.Figure, memory: MemoryAnswer, scale: Scale) -> None:
    x = memory.capacity / scale.size
    is_right = memory.capacity > memory.peak / 2
    figure.add_shape(type="line", x0=x, x1=x, yref="y domain", y0=0, y1=1, line={"color": INK, "width": 2})
    figure.add_annotation(
        text=f"usable: {scale.text(memory.capacity)}",
        x=x,
        yref="y domain",
        y=1,
        yanchor="bottom",
        yshift=4,
        xanchor="right" if is_right else "left",
        showarrow=False,
        font={"size": FONT_SIZE},
    )


def _add_numbers(figure: go.Figure, memory: MemoryAnswer, rows: list[MemoryRow], last: str, scale: Scale) -> None:
    """Columns to the right of the bars: size, and share of what is usable."""
    sizes = [*((row.name, row.num_bytes) for row in rows), (SUM_ROW, memory.peak)]
    sizes.append((last, abs(memory.capacity - memory.peak)))
    for name, num_bytes in sizes:
        is_bold = name in (SUM_ROW, MISSING_ROW)
        size, share = scale.text(num_bytes), percent(num_bytes / memory.capacity)
        add_number(figure, f"<b>{size}</b>" if is_bold else size, row=name, axis="", pixels=SIZE_PIXELS)
        add_number(figure, f"<b>{share}</b>" if is_bold else share, row=name, axis="", pixels=SHARE_PIXELS)
    add_number(figure, "of usable", row=None, axis="", pixels=SHARE_PIXELS)
