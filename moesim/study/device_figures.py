"""Figures of a device profile by dotted path: read one, and make a profile with another value in its place."""

from __future__ import annotations

from typing import Any

from moesim.describe.hardware import Device
from moesim.describe.quantities import Figure, FigureKind, NumberFigure


def figure_at(device: Device, path: str) -> Figure | None:
    """Figure at a path such as ``kernels.gemm.fixed_time``; None where the profile has none.

    Parameters
    ----------
    device : Device
        The profile.
    path : str
        Dotted; a precision is a key of ``peak_flop_rate``.

    Returns
    -------
    Figure or None
        With value, kind and source.
    """
    found: Any = device
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else getattr(found, name)
        if found is None:
            return None
    assert isinstance(found, Figure)
    return found


def with_value(device: Device, path: str, value: float) -> Device:
    """Device with another value at a path; kind and source stay, a figure that is missing becomes an assumed one."""
    known = figure_at(device, path)
    figure = known.model_copy(update={"value": value}) if known else _new_figure(value, "assumed", "to be fitted", None)
    return with_figure(device, path, figure)


def fitted_figure(device: Device, path: str, value: float, *, source: str, error_fraction: float) -> Device:
    """Device with a fitted value at a path, its source and its relative standard error."""
    known = figure_at(device, path)
    changes = {"value": value, "kind": "fitted", "source": source, "error_fraction": error_fraction}
    figure = known.model_copy(update=changes) if known else _new_figure(value, "fitted", source, error_fraction)
    return with_figure(device, path, figure)


def _new_figure(value: float, kind: FigureKind, source: str, error_fraction: float | None) -> Figure:
    return NumberFigure(value=value, kind=kind, source=source, error_fraction=error_fraction)


def with_figure(device: Device, path: str, figure: Figure) -> Device:
    """Device with a figure at a path."""
    changed: Device = _replaced(device, path.split("."), figure)
    return changed


def _replaced(node: Any, names: list[str], figure: Figure) -> Any:
    name, *rest = names
    if isinstance(node, dict):
        return {**node, name: figure if not rest else _replaced(node[name], rest, figure)}
    return node.model_copy(update={name: figure if not rest else _replaced(getattr(node, name), rest, figure)})
