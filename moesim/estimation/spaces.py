"""A space of scenarios: a base and axes; rows are their grid, last axis fastest.

An axis is one dotted path with its values, or several paths that vary together. Axes over numeric fields become
columns; any other field is structural: each combination of structural values is a scenario of its own, checked like a
file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moesim.describe.documents import Document, read_document
from moesim.errors import Problem, ScenarioError, nearest_name
from moesim.resources import find_scenario
from moesim.structure.columns import COLUMN_OF_PATH, IntArray

SPACE_KEYS = ("schema_version", "name", "description", "base", "axes")
LABEL = "label"
MAX_ROWS = 1_000_000_000


@dataclass(frozen=True)
class Axis:
    """Fields that vary together: dotted paths with value lists of one length."""

    name: str
    values: Mapping[str, Sequence[Any]]
    labels: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def is_numeric(self) -> bool:
        """Whether every field is a column."""
        return all(path in COLUMN_OF_PATH for path in self.values)


@dataclass(frozen=True)
class Space:
    """Grid of scenarios over a base document."""

    base: Document
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(len(axis) for axis in self.axes)

    def __len__(self) -> int:
        return prod(self.shape)

    @property
    def paths(self) -> list[str]:
        """Swept dotted paths, in order."""
        return [path for axis in self.axes for path in axis.values]

    def axis_indices(self, rows: IntArray) -> tuple[IntArray, ...]:
        """Position of each row along each axis."""
        if not self.axes:
            return ()
        return tuple(np.asarray(index, dtype=np.int64) for index in np.unravel_index(rows, self.shape))

    def row_values(self, row: int) -> dict[str, Any]:
        """Swept fields of one row."""
        indices = self.axis_indices(np.array([row]))
        return {
            path: values[int(index[0])]
            for axis, index in zip(self.axes, indices, strict=True)
            for path, values in axis.values.items()
        }


def grid(base: Document, axes: Mapping[str, Sequence[Any]]) -> Space:
    """Space of single-field axes over a base document."""
    return Space(base, tuple(Axis(path, {path: list(values)}) for path, values in axes.items()))


def read_space(path: str | Path) -> Space:
    """Read a space file: ``base`` (a scenario) and ``axes``.

    Raises
    ------
    FormatError
        If a file cannot be read.
    ScenarioError
        If the space is wrong; carries every problem found.
    """
    document = read_document(Path(path))
    problems = list(_key_problems(document))
    if problems:
        raise ScenarioError(problems)
    base_name = document.data["base"]
    beside = Path(path).parent / base_name
    base = read_document(beside if beside.exists() else find_scenario(base_name))
    axes = []
    for name, values in document.data["axes"].items():
        axis, found = _read_axis(document, name, values)
        problems += found
        if axis is not None:
            axes.append(axis)
    problems += _repeated_paths(document, axes)
    space = Space(base, tuple(axes))
    if not problems and len(space) > MAX_ROWS:
        message, remedy = f"the grid has {len(space)} rows", f"keep it below {MAX_ROWS}"
        problems.append(document.problem("E-SCN-007", "axes", message, remedy))
    if problems:
        raise ScenarioError(problems)
    return space


def _key_problems(document: Document) -> Iterator[Problem]:
    data = document.data
    for key in data:
        if key not in SPACE_KEYS:
            near = nearest_name(key, SPACE_KEYS)
            remedy = f"did you mean {near}?" if near else f"a space has {', '.join(SPACE_KEYS)}"
            yield document.problem("E-SCN-001", key, f"unknown key {key!r} in a space", remedy)
    if not isinstance(data.get("base"), str):
        yield document.problem("E-SCN-002", "base", "a space needs base: a scenario's file or name", "add base")
    axes = data.get("axes")
    if not isinstance(axes, dict) or not axes:
        yield document.problem(
            "E-SCN-002", "axes", "a space needs axes: a mapping of dotted paths to lists", "add at least one axis"
        )


def _read_axis(document: Document, name: str, values: Any) -> tuple[Axis | None, list[Problem]]:
    field = f"axes.{name}"
    if isinstance(values, list):
        values = {name: values}
    if not isinstance(values, dict):
        text = f"axis {name} is neither a list of values nor a mapping of paths to lists"
        return None, [document.problem("E-SCN-006", field, text, "write [value, value, ...]")]
    lengths = {len(listed) if isinstance(listed, list) else 0 for listed in values.values()}
    if lengths == set() or 0 in lengths:
        return None, [document.problem("E-SCN-006", field, f"axis {name} has an empty list", "give it values")]
    if len(lengths) > 1:
        text = f"the lists of axis {name} differ in length: {sorted(lengths)}"
        return None, [document.problem("E-SCN-011", field, text, "linked lists need one length")]
    labels = values.get(LABEL)
    paths = {path: listed for path, listed in values.items() if path != LABEL}
    if not paths:
        return None, [document.problem("E-SCN-002", field, f"axis {name} names no field", "add a dotted path")]
    return Axis(name, paths, [str(label) for label in labels] if labels else None), []


def _repeated_paths(document: Document, axes: Sequence[Axis]) -> list[Problem]:
    seen: set[str] = set()
    problems = []
    for axis in axes:
        for path in axis.values:
            if path in seen:
                text = f"{path} is swept by two axes"
                problems.append(document.problem("E-SCN-011", f"axes.{axis.name}", text, "sweep it once"))
            seen.add(path)
    return problems
