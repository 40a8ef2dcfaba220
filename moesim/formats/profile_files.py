"""Profiles written as YAML: a shipped one with some figures replaced, everything else as its author left it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.describe.quantities import (
    BandwidthFigure,
    BytesFigure,
    Description,
    DurationFigure,
    Figure,
    FlopRateFigure,
    FrequencyFigure,
)
from moesim.units import Dimension, format_quantity

DIGITS = 4
DIMENSIONS: tuple[tuple[type[Figure], Dimension], ...] = (
    (BandwidthFigure, "bytes_per_s"),
    (BytesFigure, "bytes"),
    (DurationFigure, "seconds"),
    (FlopRateFigure, "flop_per_s"),
    (FrequencyFigure, "hertz"),
)


def write_profile(base: Path, target: Path, *, figures: Mapping[str, Figure], fields: Mapping[str, Any]) -> None:
    """Write a copy of a profile with other figures.

    Parameters
    ----------
    base : Path
        A profile's YAML file.
    target : Path
        The file to write; its name without the ending becomes the profile's id. An existing file is replaced at once.
    figures : mapping of str to Figure
        By dotted path.
    fields : mapping
        Plain fields of the top level to set, such as ``name`` and ``notes``.

    Raises
    ------
    OSError
        If a file cannot be read or written; nothing is left behind.
    """
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 118
    document = yaml.load(base.read_text(encoding="utf-8"))
    document["id"] = target.stem
    for name, value in fields.items():
        document[name] = value
    for path, figure in figures.items():
        *parents, last = path.split(".")
        node = document
        for name in parents:
            node = node[name]
        node[last] = _plain(figure)
    text = StringIO()
    yaml.dump(document, text)
    replace_text(target, text.getvalue())


def _plain(figure: Figure) -> dict[str, Any]:
    """A figure as a profile has it: the value as text with its unit, or a number."""
    dimension = next((name for kind, name in DIMENSIONS if isinstance(figure, kind)), None)
    value: str | float = float(f"{figure.value:.{DIGITS}g}")
    if dimension is not None:
        value = format_quantity(figure.value, dimension, digits=DIGITS)
    plain: dict[str, Any] = {"value": value, "kind": figure.kind, "source": figure.source}
    if figure.error_fraction is not None:
        plain["error_fraction"] = float(f"{figure.error_fraction:.2g}")
    return plain


def plain_fields(description: Description) -> dict[str, Any]:
    """Fields of a part of a profile as its YAML file has them: figures with their units, no nulls.

    Parameters
    ----------
    description : Description
        Such as a stack's tier of links.

    Returns
    -------
    dict
        Plain values.
    """
    fields: dict[str, Any] = {}
    for name in type(description).model_fields:
        value = getattr(description, name)
        if isinstance(value, Figure):
            fields[name] = _plain(value)
        elif isinstance(value, Description):
            fields[name] = plain_fields(value)
        elif value is not None:
            fields[name] = value
    return fields


def write_json(target: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document, replacing an existing file at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, json.dumps(document, indent=1, allow_nan=False) + "\n")


def replace_text(target: Path, text: str) -> None:
    """Write a text by way of a new file beside it, so that no reader ever sees half of it."""
    beside = target.with_name(f".{target.name}-{secrets.token_hex(6)}.tmp")
    try:
        with open(beside, "x", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
