"""What was timed on a device: one case of a suite with its shape, its time and how it was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.structure.columns import FloatArray

PASSES = ("forward", "dgrad", "wgrad", "backward", "step")
"""Passes of a record; ``backward`` holds all gradients, ``step`` both and the update."""


@dataclass(frozen=True)
class MeasuredCase:
    """One timed case; keys and units are those of ``validation/measurements/README.md``.

    ``shape`` names sizes and choices, ``loads`` are rows of each expert where there are experts. ``line`` is that of
    the file, ``peak_bytes`` what a case of memory held at most.
    """

    case: str
    suite: str
    operation: str
    pass_name: str
    dtype: str
    shape: Mapping[str, int | float | str]
    flops: float
    num_bytes: float
    median_s: float
    iqr_s: float
    samples: int
    timed_by: str
    implementation: str
    loads: tuple[int, ...] = ()
    line: int = 0
    min_s: float | None = None
    peak_bytes: float | None = None

    def size(self, name: str) -> float:
        """A size of the shape as a number."""
        return float(self.shape[name])

    def text(self, name: str) -> str:
        """A choice of the shape as text; empty if it has none of the name."""
        return str(self.shape.get(name, ""))

    @property
    def shape_key(self) -> str:
        """What all passes of one shape share: suite, operation and sizes, without pass and precision."""
        sizes = ",".join(f"{name}={value}" for name, value in sorted(self.shape.items()))
        return f"{self.suite}/{self.operation}/{sizes}"


@dataclass(frozen=True)
class Measurements:
    """All cases of a file, what was skipped (case and reason), and the fingerprints of its sessions."""

    cases: Sequence[MeasuredCase]
    skipped: Sequence[tuple[str, str]] = ()
    fingerprints: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def device_names(self) -> tuple[str, ...]:
        """Names that the devices gave themselves, without repetition."""
        return tuple(dict.fromkeys(str(one.get("device_name", "unknown device")) for one in self.fingerprints))

    def of_shortest_samples(self) -> Measurements:
        """Cases at their shortest sample instead of the median: what a machine shared with others takes undisturbed."""
        return replace(self, cases=tuple(replace(case, median_s=case.min_s or case.median_s) for case in self.cases))

    def medians_s(self) -> FloatArray:
        """Measured medians, of shape (n_cases,)."""
        return np.array([case.median_s for case in self.cases], dtype=np.float64)
