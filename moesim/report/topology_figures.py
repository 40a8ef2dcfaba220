"""A drawing of a network: tori on their grid, meshes on a circle, trees in rows of switches."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from plotly import graph_objects as go

from moesim.report.pages import Fact, Note, write_chart
from moesim.report.styles import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, base_layout
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.topology import TIERS, Topology, VertexKind
from moesim.structure.topology_metrics import TopologySummary
from moesim.structure.topology_pieces import Piece, representative_piece
from moesim.structure.topology_symmetry import DigitSymmetry
from moesim.units import format_quantity

HEIGHT = 620
TIER_COLOURS: Mapping[str, str] = {"scale_up": BLUE, "scale_out": VERMILION, "torus": GREEN}
VERTEX_STYLES: Mapping[VertexKind, tuple[str, str, int]] = {
    "device": ("square", INK, 11),
    "chip": ("circle", GREY, 8),
    "nic": ("diamond", PURPLE, 9),
    "switch": ("hexagon", ORANGE, 13),
}
ROWS: Mapping[str, float] = {"PCIe switch": -1, "PCIe root": -2, "backplane": -2, "NIC": 1, "leaf": 2, "core": 4}
"""Row of what is not two or three stages above the devices; a scale-up switch stands below them."""
ARC_POINTS = 13
ROW_COLUMNS, GRID_COLUMNS = 3, 5
"""Columns of places in rows (x, y, row) and on a grid (x, y and three coordinates)."""


def write_topology_chart(topology: Topology, summary: TopologySummary, path: str | Path) -> None:
    """Draw a topology, or a piece of a large one, into one HTML file that works offline.

    Parameters
    ----------
    topology : Topology
        What to draw.
    summary : TopologySummary
        Its figures, printed above the drawing.
    path : str or Path
        The file.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    piece = representative_piece(topology)
    figure = topology_figure(topology, piece)
    least, most = summary.degree
    facts = [
        Fact("Devices", f"{summary.num_devices:,}"),
        Fact("Links of a device", f"{least}" if least == most else f"{least} to {most}"),
        Fact("Diameter", f"{summary.diameter} hops"),
        Fact("Bisection bandwidth", format_quantity(summary.bisection_bandwidth, "bytes_per_s"), "one direction"),
    ]
    subtitle = "All vertices"
    if not piece.is_whole:
        drawn = int((piece.vertices < topology.num_devices).sum())
        subtitle = (
            f"A piece: {drawn:,} of {topology.num_devices:,} devices and some of the switches they lead to "
            f"({len(piece.vertices):,} of {len(topology.vertex_names):,} vertices)"
        )
    notes = [Note("Assumed", [("", sentence) for sentence in topology.assumptions])]
    write_chart(figure, path, title=f"{topology.name}: network", subtitle=subtitle, facts=facts, notes=notes)


def topology_figure(topology: Topology, piece: Piece) -> go.Figure:
    """Vertices and links of a piece of a topology; a line stands for both directions."""
    place = _places(topology, piece.vertices)
    figure = go.Figure(layout=base_layout(HEIGHT, left_margin=20, right_margin=20, bottom_margin=20))
    for trace in _link_traces(topology, piece.vertices, place):
        figure.add_trace(trace)
    kinds = np.array([topology.vertex_kinds[vertex] for vertex in piece.vertices])
    for kind, (symbol, colour, size) in VERTEX_STYLES.items():
        chosen = np.flatnonzero(kinds == kind)
        if len(chosen):
            figure.add_trace(
                go.Scatter(
                    x=place[chosen, 0],
                    y=place[chosen, 1],
                    mode="markers+text" if len(piece.vertices) <= 40 else "markers",
                    text=[_short_name(topology, int(piece.vertices[number])) for number in chosen],
                    textposition="top center",
                    hovertext=[topology.vertex_names[piece.vertices[number]] for number in chosen],
                    hoverinfo="text",
                    marker={"symbol": symbol, "color": colour, "size": size, "line": {"width": 1, "color": "white"}},
                    name=kind,
                )
            )
    hidden = {"visible": False, "showgrid": False}
    figure.update_layout(xaxis=hidden, yaxis=hidden)
    return figure


def _short_name(topology: Topology, vertex: int) -> str:
    return str(vertex) if vertex < topology.num_devices else topology.vertex_names[vertex]


def _link_traces(topology: Topology, vertices: IntArray, place: FloatArray) -> list[go.Scatter]:
    """One trace per tier and bandwidth; wider lines for faster links of a tier."""
    position = np.full(len(topology.vertex_names), -1)
    position[vertices] = np.arange(len(vertices))
    links = topology.links
    start, end = position[links.source], position[links.target]
    shown = np.flatnonzero((start >= 0) & (end > start))
    keys = sorted({(int(links.tier[link]), float(links.bandwidth[link])) for link in shown})
    traces = []
    for tier, bandwidth in keys:
        chosen = shown[(links.tier[shown] == tier) & (links.bandwidth[shown] == bandwidth)]
        rank = [key[1] for key in keys if key[0] == tier].index(bandwidth)
        points = np.concatenate([_line(place[start[link]], place[end[link]]) for link in chosen])
        traces.append(
            go.Scatter(
                x=points[:, 0],
                y=points[:, 1],
                mode="lines",
                hoverinfo="skip",
                opacity=0.75,
                line={"width": 1.2 + 1.6 * min(rank, 3), "color": TIER_COLOURS.get(TIERS[tier], SKY)},
                name=f"{TIERS[tier]} {format_quantity(bandwidth, 'bytes_per_s')}",
            )
        )
    return traces


def _line(start: FloatArray, end: FloatArray) -> FloatArray:
    """Points of a link, ended by a gap.

    Links that would hide others are bowed: those that close a row of a torus, and those between devices of one row.
    """
    along, gap = end - start, np.full((1, 2), np.nan)
    closes_row = len(start) == GRID_COLUMNS and np.abs(along[2:]).max() > 1
    lies_in_row = len(start) == ROW_COLUMNS and along[1] == 0
    if not (closes_row or lies_in_row):
        return np.concatenate((start[None, :2], end[None, :2], gap))
    bow = 0.5 * (start + end)[:2] + 0.10 * np.array([-along[1], along[0]])
    if lies_in_row:
        bow[1] = start[1] - 0.14 * np.abs(along[0]) - 0.1
    step = np.linspace(0.0, 1.0, ARC_POINTS)[:, None]
    curve = (1 - step) ** 2 * start[:2] + 2 * step * (1 - step) * bow + step**2 * end[:2]
    return np.concatenate((curve, gap))


def _places(topology: Topology, vertices: IntArray) -> FloatArray:
    """Where to draw the vertices: (n_chosen, 2), on tori with the grid coordinates behind, in rows with the row."""
    symmetry = topology.symmetry
    digits = symmetry.digits if isinstance(symmetry, DigitSymmetry) else ()
    if any(digit.kind in ("shift", "reflection") for digit in digits):
        sides = [digit.radix for digit in digits if digit.kind in ("shift", "reflection")]
        return _grid(topology, vertices, digits[0].radix, sides)
    if all(kind == "device" for kind in topology.vertex_kinds) or not digits:
        angle = np.pi / 2 - 2 * np.pi * np.arange(len(vertices)) / len(vertices)
        return np.stack((np.cos(angle), np.sin(angle)), axis=1)
    return _rows(topology, vertices)


def _grid(topology: Topology, vertices: IntArray, per_chip: int, sides: list[int]) -> FloatArray:
    """Chips at their coordinates, the third axis aslant; cores round their chip; pods side by side below a switch."""
    is_device = vertices < topology.num_devices
    is_switch = np.array([topology.vertex_kinds[vertex] == "switch" for vertex in vertices])
    chip = np.where(is_device, vertices // per_chip, vertices - topology.num_devices)
    axes = [chip // prod(sides[:axis]) % side for axis, side in enumerate(sides)]
    grid = np.stack([*axes, *[np.zeros_like(chip)] * (3 - len(axes))], axis=1).astype(np.float64)
    place = np.stack((grid[:, 0] + 0.42 * grid[:, 2], -grid[:, 1] - 0.27 * grid[:, 2]), axis=1)
    if per_chip > 1:
        aside = np.where(is_device, (vertices % per_chip + 0.5) / per_chip - 0.5, 0.0)
        place[:, 0] += 0.55 * aside
        place[:, 1] += np.where(is_device, 0.27, 0.0)
    place[:, 0] += chip // prod(sides) * (np.ptp(place[~is_switch, 0]) + 1.5)
    if is_switch.any():
        place[is_switch] = [place[~is_switch, 0].mean(), 1.5]
        grid[is_switch] = np.nan
    return np.concatenate((place, grid), axis=1)


def _rows(topology: Topology, vertices: IntArray) -> FloatArray:
    """Devices in a row, switches in rows above and below, each near the middle of what it joins."""
    place = np.zeros((len(vertices), 2))
    position = np.full(len(topology.vertex_names), -1)
    position[vertices] = np.arange(len(vertices))
    row = np.array([_row(topology, int(vertex)) for vertex in vertices])
    devices = np.flatnonzero(row == 0)
    place[devices, 0] = np.arange(len(devices))
    links = topology.links
    start, end = position[links.source], position[links.target]
    shown = (start >= 0) & (end >= 0)
    start, end = start[shown], end[shown]
    for level in sorted(set(row.tolist()) - {0}, key=abs):
        members = np.flatnonzero(row == level)
        for member in members:
            inner = start[(end == member) & (np.abs(row[start]) < abs(level))]
            place[member, 0] = place[inner, 0].mean() if len(inner) else 0.0
        order = members[np.lexsort((members, place[members, 0]))]
        width = max(len(devices) - 1.0, 1.0)
        span = np.ptp(place[order, 0])
        if len(order) > 1 and (span < width / 2 or np.diff(place[order, 0]).min() < 0.6):
            place[order, 0] = (np.arange(len(order)) + 0.5) / len(order) * (width + 1) - 0.5
    place[:, 1] = row
    return np.column_stack((place, row))


def _row(topology: Topology, vertex: int) -> float:
    """Row of a vertex by what it is."""
    if vertex < topology.num_devices:
        return 0.0
    name = topology.vertex_names[vertex]
    role = name.rsplit(" ", 1)[0]
    if role in ROWS:
        return ROWS[role]
    if role in ("spine", "aggregation"):
        return 3.0
    return -1.0 if role.endswith("switch") else 5.0
