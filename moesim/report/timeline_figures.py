"""What ran when: rows are the streams of the recorded ranks, colours the categories of a step; memory below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moesim.engine.memory_timeline import MemoryTimeline
from moesim.engine.timelines import COMPUTE_STREAM, STREAMS, Timeline
from moesim.report.numbers import Scale, memory_scale, time_scale
from moesim.report.styles import (
    BLUE,
    FAMILIES,
    FONT_SIZE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RULE,
    SKY,
    SMALL_FONT_SIZE,
    STEP_CATEGORIES,
    VERMILION,
    add_panel_title,
    base_layout,
    row_axis,
    value_axis,
)
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.step_graph import CATEGORIES

MAX_RANKS = 24
MAX_RANKS_NEAR = 2
EXACT_BARS = 3000
"""Operations up to which each is a bar of its own; of more, bars show what takes most of each short interval."""
INTERVALS = 1600
BUSY_SHARES = (0.02, 0.25, 0.6)
"""Busy shares of an interval from which on a summed bar is faint, half as strong, and full."""
STRENGTHS = (0.3, 0.6, 1.0)
NEAR_OPERATIONS = 60
"""Operations of the busiest row that the second panel shows."""
LEAST_LABELLED_SHARE = 0.02
ROW_PIXELS, MEMORY_PIXELS, GAP_PIXELS = 22, 220, 96
TOP_PIXELS, BOTTOM_PIXELS = 84, 60
LINE_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
STREAM_NAMES: Mapping[str, str] = {
    "compute": "compute",
    "all_to_all": "all-to-all",
    "tensor_parallel": "tensor parallel",
    "expert_tensor_parallel": "expert tensor par.",
    "context_parallel": "context parallel",
    "data_parallel": "data parallel",
    "pipeline_p2p": "transfers",
    "host": "host",
    "pcie": "PCIe",
}


@dataclass(frozen=True)
class _Bars:
    """Bars of a panel, arrays (n_bars,): row, ends, family, whether it is a forward pass, how strong, a first event."""

    row: IntArray
    start_s: FloatArray
    end_s: FloatArray
    family: IntArray
    is_forward: IntArray
    strength: FloatArray
    event: IntArray


def timeline_figure(
    timeline: Timeline,
    *,
    memory: MemoryTimeline | None = None,
    capacity_bytes: float | None = None,
    stage_of_rank: Mapping[int, int] | None = None,
) -> go.Figure:
    """Draw a timeline.

    Parameters
    ----------
    timeline : Timeline
        What ran when on the recorded ranks; the first ``MAX_RANKS`` of them are drawn.
    memory : MemoryTimeline, optional
        Bytes on the same ranks, drawn below.
    capacity_bytes : float, optional
        Usable memory of a device.
    stage_of_rank : mapping, optional
        Pipeline stage of each rank, for the names of rows.

    Returns
    -------
    Figure
        A panel with the whole step; with more operations than it can show, one of a short stretch in its middle; with
        memory, one of bytes over time. Forward passes are lighter. Traces have ``meta`` "whole", "near" or "memory".
    """
    ranks = timeline.ranks[:MAX_RANKS]
    shown = timeline.of_ranks(ranks.tolist())
    rows, stages = _rows(shown), stage_of_rank or {}
    near_rows = [row for row in rows if row[0] in ranks[:MAX_RANKS_NEAR]] if len(shown) > EXACT_BARS else []
    panels = [ROW_PIXELS * len(rows), ROW_PIXELS * len(near_rows), MEMORY_PIXELS * (memory is not None)]
    heights = [height for height in panels if height]
    inner = sum(heights) + GAP_PIXELS * (len(heights) - 1)
    spacing = GAP_PIXELS / inner if len(heights) > 1 else 0
    figure = make_subplots(rows=len(heights), cols=1, row_heights=heights, vertical_spacing=spacing)
    layout = base_layout(inner + TOP_PIXELS + BOTTOM_PIXELS, top_margin=TOP_PIXELS, bottom_margin=BOTTOM_PIXELS)
    figure.update_layout(layout, barmode="overlay", bargap=0.18)
    _add_legend(figure, shown)
    scale = time_scale(shown.end)
    bars = _exact_bars(shown, rows) if not near_rows else _summed_bars(shown, rows)
    _draw_panel(figure, shown, rows, bars, scale, stages, row=1, meta="whole")
    _label_passes(figure, shown, rows, scale)
    add_panel_title(figure, "Whole step" + (", numbers are micro-batches" if _has_labels(figure) else ""), axis="")
    if near_rows:
        near = _middle(shown, near_rows)
        bars = _exact_bars(near, near_rows)
        _draw_panel(figure, near, near_rows, bars, scale, stages, row=2, meta="near")
        add_panel_title(figure, "The middle of it, operation by operation", axis="2")
    if memory is not None:
        _draw_memory(figure, memory, ranks, scale, capacity_bytes, row=len(heights))
    return figure


def _rows(timeline: Timeline) -> list[tuple[int, int]]:
    """Rank and stream of each row that has operations, in order."""
    pairs = np.unique(np.stack([timeline.rank, timeline.stream.astype(np.int64)], axis=1), axis=0)
    return [(int(rank), int(stream)) for rank, stream in pairs]


def _row_of_event(timeline: Timeline, rows: list[tuple[int, int]]) -> IntArray:
    """Row of each operation; -1 where it has none."""
    keys = np.array([rank * len(STREAMS) + stream for rank, stream in rows])
    key = timeline.rank * len(STREAMS) + timeline.stream
    place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    return np.asarray(np.where(keys[place] == key, place, -1))


def _families(timeline: Timeline) -> IntArray:
    """Index into ``FAMILIES`` of each operation."""
    of_category = np.array([FAMILIES.index(STEP_CATEGORIES[name].family) for name in CATEGORIES])
    return of_category[timeline.category]


def _exact_bars(timeline: Timeline, rows: list[tuple[int, int]]) -> _Bars:
    """A bar per operation."""
    row = _row_of_event(timeline, rows)
    event = np.flatnonzero((row >= 0) & (timeline.end_s > timeline.start_s))
    is_forward = (timeline.phase == 0).astype(np.int64)
    return _Bars(
        row[event],
        timeline.start_s[event],
        timeline.end_s[event],
        _families(timeline)[event],
        is_forward[event],
        np.ones(len(event)),
        event,
    )


def _summed_bars(timeline: Timeline, rows: list[tuple[int, int]]) -> _Bars:
    """What takes most of each short interval of a row: its family, direction and micro-batch; equal neighbours join."""
    exact = _exact_bars(timeline, rows)
    width = timeline.end / INTERVALS
    first = np.floor(exact.start_s / width).astype(np.int64)
    last = np.minimum(np.floor(exact.end_s / width).astype(np.int64), INTERVALS - 1)
    spans = last - np.minimum(first, last) + 1
    bar = np.repeat(np.arange(len(spans)), spans)
    interval = first[bar] + np.arange(len(bar)) - np.repeat(np.cumsum(spans) - spans, spans)
    covered = np.minimum(exact.end_s[bar], (interval + 1) * width) - np.maximum(exact.start_s[bar], interval * width)
    micro_batch = timeline.micro_batch[exact.event].astype(np.int64) + 1
    kind = (micro_batch * len(FAMILIES) + exact.family) * 2 + exact.is_forward
    place = exact.row[bar] * INTERVALS + interval
    table, at, inverse = np.unique(np.stack([place, kind[bar]], axis=1), axis=0, return_index=True, return_inverse=True)
    seconds = np.bincount(inverse.reshape(-1), weights=covered)
    busy = np.bincount(table[:, 0], weights=seconds, minlength=len(rows) * INTERVALS)[table[:, 0]]
    order = np.lexsort((-seconds, table[:, 0]))
    is_most = np.append(True, np.diff(table[order, 0]) > 0)
    chosen = order[is_most]
    chosen = chosen[busy[chosen] > BUSY_SHARES[0] * width]
    place, kind = table[chosen, 0], table[chosen, 1]
    level = np.searchsorted(BUSY_SHARES, busy[chosen] / width) - 1
    differs = (np.diff(place) != 1) | (np.diff(kind) != 0) | (np.diff(level) != 0) | (place[1:] % INTERVALS == 0)
    begins = np.flatnonzero(np.append(True, differs))
    ends = np.append(begins[1:], len(place)) - 1
    source = bar[at[chosen[begins]]]
    return _Bars(
        exact.row[source],
        (place[begins] % INTERVALS) * width,
        (place[ends] % INTERVALS + 1) * width,
        exact.family[source],
        exact.is_forward[source],
        np.array(STRENGTHS)[level[begins]],
        exact.event[source],
    )


def _middle(timeline: Timeline, rows: list[tuple[int, int]]) -> Timeline:
    """Operations of some rows around the middle of the step: ``NEAR_OPERATIONS`` of the busiest row."""
    row = _row_of_event(timeline, rows)
    busiest = np.flatnonzero(row == np.bincount(row[row >= 0]).argmax())
    middle = int(np.searchsorted(timeline.start_s[busiest], timeline.end / 2))
    some = busiest[max(middle - NEAR_OPERATIONS // 2, 0) : middle + NEAR_OPERATIONS // 2]
    begin, end = timeline.start_s[some[0]], timeline.end_s[some].max()
    return timeline.take((row >= 0) & (timeline.end_s > begin) & (timeline.start_s < end))


def _colour(family: int, is_forward: int) -> str:
    """Colour of a family; forward passes are mixed with white."""
    colour = FAMILIES[family].colour
    if not is_forward:
        return colour
    mixed = (round(int(colour[i : i + 2], 16) * 0.6 + 255 * 0.4) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02X}" for part in mixed)


def _add_legend(figure: go.Figure, timeline: Timeline) -> None:
    for family in np.unique(_families(timeline)).tolist():
        figure.add_bar(
            x=[None],
            y=[None],
            orientation="h",
            name=FAMILIES[family].name,
            marker={"color": FAMILIES[family].colour},
            row=1,
            col=1,
        )


def _draw_panel(
    figure: go.Figure,
    timeline: Timeline,
    rows: list[tuple[int, int]],
    bars: _Bars,
    scale: Scale,
    stages: Mapping[int, int],
    *,
    row: int,
    meta: str,
) -> None:
    """Bars of one panel, a trace per colour, and its axes."""
    names = [f"{rank}/{stream}" for rank, stream in rows]
    for family, is_forward in np.unique(np.stack([bars.family, bars.is_forward], axis=1), axis=0).tolist():
        own = np.flatnonzero((bars.family == family) & (bars.is_forward == is_forward))
        figure.add_bar(
            base=(bars.start_s[own] / scale.size).tolist(),
            x=((bars.end_s[own] - bars.start_s[own]) / scale.size).tolist(),
            y=[names[index] for index in bars.row[own].tolist()],
            orientation="h",
            meta=meta,
            marker={
                "color": _colour(family, is_forward),
                "opacity": bars.strength[own].tolist(),
                "line": {"width": 0},
            },
            customdata=[_hover(timeline, bars, bar, scale) for bar in own.tolist()],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
    labels = []
    for index, (rank, stream) in enumerate(rows):
        is_first = index == 0 or rows[index - 1][0] != rank
        stage = f", stage {stages[rank]}" if rank in stages else ""
        title = f"<b>rank {rank}{stage}</b>  " if is_first else ""
        labels.append(title + STREAM_NAMES[STREAMS[stream]])
        if is_first and index:
            figure.add_hline(y=len(rows) - index - 0.5, line={"color": RULE, "width": 1}, row=row, col=1)
    figure.update_yaxes(row_axis(names), row=row, col=1)
    figure.update_yaxes(tickvals=names, ticktext=labels, tickfont={"size": SMALL_FONT_SIZE}, row=row, col=1)
    figure.update_xaxes(value_axis(""), ticksuffix=f" {scale.symbol}", fixedrange=False, row=row, col=1)
    if len(bars.row):
        begin = 0.0 if meta == "whole" else float(bars.start_s.min())
        figure.update_xaxes(range=[begin / scale.size, float(bars.end_s.max()) / scale.size], row=row, col=1)


def _hover(timeline: Timeline, bars: _Bars, bar: int, scale: Scale) -> str:
    event = int(bars.event[bar])
    category = STEP_CATEGORIES[CATEGORIES[int(timeline.category[event])]].name
    start_s, end_s = float(bars.start_s[bar]), float(bars.end_s[bar])
    place = [
        f"{name} {int(values[event])}"
        for name, values in (
            ("micro-batch", timeline.micro_batch),
            ("chunk", timeline.chunk),
            ("layer", timeline.layer),
        )
        if values[event] >= 0
    ]
    size = end_s - start_s
    begins = f"{start_s / scale.size:,.6g} – {end_s / scale.size:,.6g} {scale.symbol}"
    lasts = time_scale(size).text(size)
    name = timeline.names[int(timeline.name[event])]
    return "<br>".join([f"<b>{category}</b>: {name}", f"{begins} ({lasts})", ", ".join(place)])


def _label_passes(figure: go.Figure, timeline: Timeline, rows: list[tuple[int, int]], scale: Scale) -> None:
    """Number of the micro-batch in the middle of each pass that is wide enough, on the rows of compute."""
    own = np.flatnonzero((timeline.stream == COMPUTE_STREAM) & (timeline.micro_batch >= 0))
    keys = np.stack(
        [getattr(timeline, name)[own].astype(np.int64) for name in ("rank", "chunk", "micro_batch", "phase")], axis=1
    )
    passes, inverse = np.unique(keys, axis=0, return_inverse=True)
    begin, end = np.full(len(passes), np.inf), np.full(len(passes), -np.inf)
    np.minimum.at(begin, inverse.reshape(-1), timeline.start_s[own])
    np.maximum.at(end, inverse.reshape(-1), timeline.end_s[own])
    wide = np.flatnonzero(end - begin > LEAST_LABELLED_SHARE * timeline.end)
    if not len(wide):
        return
    names = {rank: f"{rank}/{stream}" for rank, stream in rows if stream == COMPUTE_STREAM}
    figure.add_scatter(
        x=(0.5 * (begin + end)[wide] / scale.size).tolist(),
        y=[names[rank] for rank in passes[wide, 0].tolist()],
        text=[str(micro_batch) for micro_batch in passes[wide, 2].tolist()],
        mode="text",
        textfont={"size": SMALL_FONT_SIZE, "color": INK},
        hoverinfo="skip",
        showlegend=False,
        meta="label",
        row=1,
        col=1,
    )


def _has_labels(figure: go.Figure) -> bool:
    return any(trace.meta == "label" for trace in figure.data)


def _draw_memory(
    figure: go.Figure, memory: MemoryTimeline, ranks: IntArray, scale: Scale, capacity_bytes: float | None, *, row: int
) -> None:
    """Bytes over time, a line per rank: of ranks with the same bytes the first, of many some."""
    largest = max(float(memory.total.max(initial=0.0)), capacity_bytes or 0.0)
    unit = memory_scale(largest)
    end_s = float(figure.layout.xaxis.range[1]) * scale.size
    lines: dict[str, tuple[FloatArray, FloatArray]] = {}
    for rank in ranks.tolist():
        own = memory.of_rank(rank)
        line = (np.append(own.time_s, end_s), np.append(own.total, own.total[-1:]))
        if not any(len(line[0]) == len(known[0]) and np.allclose(line, known) for known in lines.values()):
            lines[f"rank {rank}"] = line
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(len(lines), len(LINE_COLOURS))).round().astype(int))
    drawn = [list(lines.items())[index] for index in chosen.tolist()]
    for (name, (times, held)), colour in zip(drawn, LINE_COLOURS, strict=False):
        figure.add_scatter(
            x=(times / scale.size).tolist(),
            y=(held / unit.size).tolist(),
            mode="lines",
            line={"shape": "hv", "width": 2, "color": colour},
            name=name,
            meta="memory",
            showlegend=False,
            hovertemplate=f"<b>{name}</b><br>%{{x:,.6~g}} {scale.symbol}: %{{y:,.4~f}} GiB<extra></extra>",
            row=row,
            col=1,
        )
    for index, (name, (times, held)) in enumerate(drawn):
        at_s = end_s * (index + 0.5) / len(drawn)  # side by side, where lines lie close together
        figure.add_annotation(
            text=name,
            x=at_s / scale.size,
            y=held[max(int(np.searchsorted(times, at_s)) - 1, 0)] / unit.size,
            yanchor="bottom",
            showarrow=False,
            bgcolor="rgba(255,255,255,0.75)",
            font={"size": SMALL_FONT_SIZE, "color": LINE_COLOURS[index]},
            row=row,
            col=1,
        )
    if capacity_bytes:
        figure.add_hline(
            y=capacity_bytes / unit.size,
            line={"color": INK, "width": 1.5, "dash": "dot"},
            annotation={"text": f"usable {unit.text(capacity_bytes)}", "font": {"size": FONT_SIZE}},
            row=row,
            col=1,
        )
    figure.update_yaxes(value_axis(""), ticksuffix=" GiB", range=[0, 1.12 * largest / unit.size], row=row, col=1)
    figure.update_yaxes(ticklabelstandoff=8, row=row, col=1)
    figure.update_xaxes(value_axis(""), ticksuffix=f" {scale.symbol}", fixedrange=False, row=row, col=1)
    figure.update_xaxes(range=list(figure.layout.xaxis.range), ticklabelstandoff=8, row=row, col=1)
    add_panel_title(figure, "Memory of a device", axis=str(row))
