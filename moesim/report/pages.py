"""One figure as one HTML file that works offline: what was asked above it, what to know below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from plotly import graph_objects as go

from moesim import __version__
from moesim.report.styles import FONT_FAMILY, INK, MUTED, RULE, VERMILION
from moesim.resources import replaced_file

# No request leaves the page, whatever the script of the charts would like to load.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
CONFIGURATION = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "toImageButtonOptions": {"format": "png", "scale": 2},
}
STYLE = f"""
body {{
  font: 15px/1.45 {FONT_FAMILY}; color: {INK}; background: #fff;
  max-width: 1280px; margin: 0 auto; padding: 14px 24px;
}}
h1 {{ font-size: 21px; line-height: 1.25; margin: 0; }}
.subtitle {{ color: {MUTED}; margin: 2px 0 8px; }}
dl {{
  display: flex; flex-wrap: wrap; gap: 4px 30px; margin: 0; padding: 6px 0;
  border: solid {RULE}; border-width: 1px 0;
}}
dt {{ font-size: 13px; color: {MUTED}; }}
dd {{ margin: 0; font-weight: 600; overflow-wrap: anywhere; }}
dd small {{ display: block; font-size: 13px; font-weight: 400; line-height: 1.3; white-space: pre-line; }}
.alarm {{ margin: 8px 0 0; padding: 5px 12px; border-left: 4px solid {VERMILION}; background: #FDF0E9; }}
h2 {{ font-size: 16px; margin: 16px 0 4px; }}
ul {{ margin: 0; padding-left: 20px; }}
li {{ overflow-wrap: anywhere; }}
code {{ font: 13px ui-monospace, Menlo, Consolas, monospace; }}
footer {{ margin-top: 22px; font-size: 13px; color: {MUTED}; }}
"""


@dataclass(frozen=True)
class Fact:
    """A value of the header; ``detail`` is written smaller below it, line by line."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """A list below the chart; each entry is a short key, which may be empty, and a sentence."""

    heading: str
    entries: Sequence[tuple[str, str]]


def write_chart(
    figure: go.Figure,
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    facts: Sequence[Fact] = (),
    alarm: str = "",
    notes: Sequence[Note] = (),
) -> None:
    """Write a figure as one HTML file that needs nothing else; an existing file is replaced in one go.

    Parameters
    ----------
    figure : Figure
        What to draw.
    path : str or Path
        The file. Its folder must exist.
    title, subtitle : str
        Plain text, as all text here: it is escaped.
    facts : sequence of Fact
        Values below the title.
    alarm : str
        A sentence that must not be missed, or nothing.
    notes : sequence of Note
        Lists below the chart; a note without entries is left out.

    Raises
    ------
    OSError
        If the file cannot be written; what was there before is untouched.
    """
    page = chart_page(figure, title=title, subtitle=subtitle, facts=facts, alarm=alarm, notes=notes)
    replace_file(Path(path), page)


def chart_page(
    figure: go.Figure,
    *,
    title: str,
    subtitle: str,
    facts: Sequence[Fact],
    alarm: str,
    notes: Sequence[Note],
) -> str:
    """Text of the page; see ``write_chart``."""
    chart = figure.to_html(full_html=False, include_plotlyjs=True, config=CONFIGURATION)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="subtitle">{escape(subtitle)}</p>',
        f"<dl>{''.join(_fact_html(fact) for fact in facts)}</dl>" if facts else "",
        f'<p class="alarm">{escape(alarm)}</p>' if alarm else "",
        chart,
        *(_note_html(note) for note in notes if note.entries),
        f"<footer>moesim {escape(__version__)}</footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _fact_html(fact: Fact) -> str:
    detail = f"<small>{escape(fact.detail)}</small>" if fact.detail else ""
    return f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}{detail}</dd></div>"


def _note_html(note: Note) -> str:
    entries = "".join(
        f"<li>{f'<code>{escape(key)}</code>: ' if key else ''}{escape(text)}</li>" for key, text in note.entries
    )
    return f"<h2>{escape(note.heading)}</h2>\n<ul>{entries}</ul>"


def replace_file(path: Path, text: str) -> None:
    """Write a text file by way of a new one beside it, so that no reader ever sees half of it.

    Parameters
    ----------
    path : Path
        A regular file or nothing yet; of a link, what it points to is replaced.
    text : str
        Written as UTF-8.

    Raises
    ------
    OSError
        If that is not possible; it names ``path``, and nothing is left behind.
    """
    with replaced_file(path) as stream:
        stream.write(text.encode("utf-8"))
