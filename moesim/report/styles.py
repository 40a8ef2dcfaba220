"""Names, colours and fonts of all charts: one look, safe for colour-blind readers.

Colours are those of Okabe and Ito (Color Universal Design, 2008).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plotly import graph_objects as go

BLUE, SKY, GREEN, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
VERMILION, PURPLE, GREY = "#D55E00", "#CC79A7", "#999999"
INK, MUTED, RULE, FAINT = "#1F2933", "#52606D", "#CBD2D9", "#E9ECEF"

FONT_FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
FONT_SIZE = 14
SMALL_FONT_SIZE = 13


@dataclass(frozen=True)
class Family:
    """Categories that a person thinks of together, and their colour."""

    name: str
    colour: str


@dataclass(frozen=True)
class CategoryStyle:
    """What a category is called and how it is coloured."""

    name: str
    family: Family


DENSE = Family("Dense layers", BLUE)
EXPERTS = Family("Expert layers", ORANGE)
COMMUNICATION = Family("Communication", VERMILION)
UPKEEP = Family("Recompute, memory, update", GREEN)
WAITING = Family("Waiting", PURPLE)
FAMILIES: tuple[Family, ...] = (DENSE, EXPERTS, COMMUNICATION, UPKEEP, WAITING)

STEP_CATEGORIES: Mapping[str, CategoryStyle] = {
    "attention": CategoryStyle("Attention", DENSE),
    "dense_ffn": CategoryStyle("Dense FFN", DENSE),
    "embedding_head_loss": CategoryStyle("Embedding, head, loss", DENSE),
    "router": CategoryStyle("Router", EXPERTS),
    "dispatch_combine": CategoryStyle("Dispatch and combine", EXPERTS),
    "expert_gemm": CategoryStyle("Expert GEMMs", EXPERTS),
    "all_to_all": CategoryStyle("All-to-all", COMMUNICATION),
    "tensor_parallel": CategoryStyle("Tensor parallel", COMMUNICATION),
    "context_parallel": CategoryStyle("Context parallel", COMMUNICATION),
    "data_parallel": CategoryStyle("Data parallel", COMMUNICATION),
    "pipeline_p2p": CategoryStyle("Pipeline transfers", COMMUNICATION),
    "memory_bound": CategoryStyle("Element-wise kernels", UPKEEP),
    "recompute": CategoryStyle("Recompute", UPKEEP),
    "optimizer": CategoryStyle("Optimizer", UPKEEP),
    "host": CategoryStyle("Host", WAITING),
    "imbalance": CategoryStyle("Load imbalance", WAITING),
    "pipeline_bubble": CategoryStyle("Pipeline bubble", WAITING),
}
"""Every category of a step's breakdown."""

MEMORY_CATEGORIES: Mapping[str, tuple[str, str]] = {
    "weights": ("Weights", BLUE),
    "gradients": ("Gradients", SKY),
    "optimizer": ("Optimizer", UPKEEP.colour),
    "activations": ("Activations", ORANGE),
    "buffers": ("Buffers", COMMUNICATION.colour),
    "other": ("Runtime, fragmentation", GREY),
}
"""Name and colour of every category of memory; the colour is the family's where a step has the same category."""


def base_layout(
    height: int, *, right_margin: int = 40, left_margin: int = 190, top_margin: int = 80, bottom_margin: int = 50
) -> go.Layout:
    """Layout every figure starts from: fonts, margins, white ground.

    Parameters
    ----------
    height : int
        Whole figure, in pixels; the width follows the window.
    right_margin, left_margin, top_margin, bottom_margin : int
        Pixels kept free for columns of numbers, names of rows, and titles.
    """
    return go.Layout(
        height=height,
        font={"family": FONT_FAMILY, "size": FONT_SIZE, "color": INK},
        margin={"l": left_margin, "r": right_margin, "t": top_margin, "b": bottom_margin},
        plot_bgcolor="white",
        paper_bgcolor="white",
        hoverlabel={"font": {"size": FONT_SIZE, "family": FONT_FAMILY}, "align": "left", "bgcolor": "white"},
        legend={
            "orientation": "h",
            "font": {"size": SMALL_FONT_SIZE},
            "itemclick": False,
            "itemdoubleclick": False,
            "xref": "container",
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0.995,
            "yanchor": "top",
        },
    )


def value_axis(title: str) -> dict[str, object]:
    """Settings of a linear axis that starts at zero."""
    return {
        "title": {"text": title, "font": {"size": FONT_SIZE}},
        "rangemode": "tozero",
        "gridcolor": FAINT,
        "zeroline": True,
        "zerolinecolor": RULE,
        "tickfont": {"size": SMALL_FONT_SIZE},
        "separatethousands": True,
        "fixedrange": True,
    }


def row_axis(names: list[str]) -> dict[str, object]:
    """Settings of an axis of named rows, first row on top."""
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": names[::-1],
        "range": [-0.6, len(names) - 0.4],
        "tickfont": {"size": FONT_SIZE},
        "ticks": "",
        "ticklabelstandoff": 8,
        "fixedrange": True,
        "showgrid": False,
    }


def add_panel_title(figure: go.Figure, text: str, *, axis: str) -> None:
    """Write the title of a panel above it, flush with its left edge.

    Parameters
    ----------
    figure : Figure
        Changed in place.
    text : str
        The title.
    axis : str
        Number of the panel's axes as plotly writes it: "" for the first, "2" for the second.
    """
    figure.add_annotation(
        text=f"<b>{text}</b>",
        xref=f"x{axis} domain",
        yref=f"y{axis} domain",
        x=0,
        y=1,
        xanchor="left",
        yanchor="bottom",
        yshift=8,
        showarrow=False,
        font={"size": FONT_SIZE},
    )


def add_number(figure: go.Figure, text: str, *, row: str | None, axis: str, pixels: int) -> None:
    """Write a number in a column to the right of a panel.

    Parameters
    ----------
    figure : Figure
        Changed in place.
    text : str
        The number with what belongs to it.
    row : str or None
        Name of its row; None writes the head of the column.
    axis : str
        Number of the panel's axes, as in ``add_panel_title``.
    pixels : int
        Right edge of the column, from the panel's right edge.
    """
    place: dict[str, object] = {"yref": f"y{axis}", "y": row, "yanchor": "middle"}
    if row is None:
        place = {"yref": f"y{axis} domain", "y": 1, "yanchor": "bottom", "yshift": 8}
    figure.add_annotation(
        text=text,
        xref=f"x{axis} domain",
        x=1,
        xanchor="right",
        xshift=pixels,
        showarrow=False,
        align="right",
        font={"size": SMALL_FONT_SIZE, "color": MUTED if row is None else INK},
        **place,
    )
