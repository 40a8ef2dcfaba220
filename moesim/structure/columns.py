"""Scenario fields as arrays: one row per scenario, priced once per distinct case.

A table of scenarios shares everything but a few numeric fields. Each of these is a column; an operation reads only
some of them, so its distinct cases are few. ``Columns.distinct`` finds them and the row -> case index to gather with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

COLUMN_OF_PATH: dict[str, str] = {
    "devices": "devices",
    "parallelism.data": "data",
    "parallelism.tensor": "tensor",
    "parallelism.sequence": "sequence",
    "parallelism.context": "context",
    "parallelism.pipeline.stages": "stages",
    "parallelism.pipeline.virtual_stages": "virtual_stages",
    "parallelism.expert": "expert",
    "parallelism.expert_tensor": "expert_tensor",
    "parallelism.zero_stage": "zero_stage",
    "parallelism.recompute": "recompute",
    "workload.sequences_per_micro_batch": "micro_batch",
    "workload.sequences_per_step": "step_sequences",
    "workload.sequence_length": "target_length",
    "workload.source_length": "source_length",
    "workload.target_length": "target_length",
    "model.moe.router.capacity_factor": "capacity_factor",
    "model.moe.router.group_tokens": "group_tokens",
}
RECOMPUTE_CODES: dict[str, int] = {"none": 0, "selective": 1, "full": 2}
AUTO_DEGREE = 0
DROPLESS = 0.0
WHOLE_RANK_GROUP = 0.0
MAX_TABLE_CELLS = 4_000_000


@dataclass(frozen=True)
class Distinct:
    """Distinct cases: ``rows`` (n_cases,) are representatives, ``inverse`` (n_rows,) maps a row to its case."""

    rows: IntArray
    inverse: IntArray


@dataclass(frozen=True)
class Columns:
    """Numeric fields of many scenarios.

    Attributes
    ----------
    values : mapping of str to ndarray of shape (n_rows,)
        Field values as float64 (degrees, lengths, codes).
    codes : mapping of str to ndarray of shape (n_rows,)
        Index of the row's value among the column's distinct values.
    cardinalities : mapping of str to int
        Number of distinct values of each column.
    """

    values: Mapping[str, FloatArray]
    codes: Mapping[str, IntArray]
    cardinalities: Mapping[str, int]

    @staticmethod
    def from_levels(
        n_rows: int, constants: Mapping[str, float], swept: Mapping[str, tuple[Sequence[float], IntArray]]
    ) -> Columns:
        """Build columns from constants, and from (values, index of each row's value) of the swept ones."""
        zeros = np.broadcast_to(np.zeros(1, dtype=np.int64), n_rows)
        values: dict[str, FloatArray] = {
            name: np.broadcast_to(np.array([value], dtype=np.float64), n_rows) for name, value in constants.items()
        }
        codes = dict.fromkeys(values, zeros)
        cardinalities = dict.fromkeys(values, 1)
        for name, (levels, index) in swept.items():
            values[name] = np.asarray(levels, dtype=np.float64)[index]
            codes[name], cardinalities[name] = index, max(len(levels), 1)
        return Columns(values, codes, cardinalities)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, name: str) -> FloatArray:
        return self.values[name]

    def take(self, rows: npt.NDArray[np.integer]) -> Columns:
        """Columns of some rows only; codes keep their meaning. Constant columns stay views of one value."""

        def taken(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return array[rows] if self.cardinalities[name] > 1 else np.broadcast_to(array[:1], len(rows))

        return Columns(
            {name: taken(name, array) for name, array in self.values.items()},
            {name: taken(name, array) for name, array in self.codes.items()},
            self.cardinalities,
        )

    def with_derived(self, name: str, reads: Sequence[str], function: Callable[[Columns], FloatArray]) -> Columns:
        """Columns with one more, worked out on the distinct cases of the columns it reads."""
        cases = self.distinct(reads)
        levels, codes = np.unique(np.asarray(function(self.take(cases.rows)), dtype=np.float64), return_inverse=True)
        row_codes = codes[cases.inverse]
        return Columns(
            {**self.values, name: levels[row_codes]},
            {**self.codes, name: row_codes},
            {**self.cardinalities, name: len(levels)},
        )

    def joint_code(self, names: Sequence[str]) -> tuple[IntArray, int]:
        """Mixed-radix code of some columns together and the number of possible codes."""
        joint = np.zeros(len(self), dtype=np.int64)
        size = 1
        for name in names:
            if self.cardinalities[name] == 1:
                continue
            joint = joint * self.cardinalities[name] + self.codes[name]
            size *= self.cardinalities[name]
            if size > MAX_TABLE_CELLS:
                levels, joint = np.unique(joint, return_inverse=True)
                size = len(levels)
        return joint, size

    def distinct(self, names: Sequence[str]) -> Distinct:
        """Distinct cases of some columns, in the order of their joint code.

        A code space of at most ``MAX_TABLE_CELLS`` is searched by table in O(rows + cells) instead of by sorting.
        """
        joint, size = self.joint_code(names)
        return distinct_codes(joint, size)


def distinct_codes(joint: IntArray, size: int) -> Distinct:
    """Distinct values of a code in ``range(size)`` by table look-up: O(rows + size)."""
    n_rows = len(joint)
    if size == 1:
        return Distinct(np.zeros(1, dtype=np.int64), np.zeros(n_rows, dtype=np.int64))
    if size > 8 * n_rows + 64:
        _, rows, inverse = np.unique(joint, return_index=True, return_inverse=True)
        return Distinct(rows.astype(np.int64), inverse.reshape(n_rows).astype(np.int64))
    representative = np.full(size, -1, dtype=np.int64)
    representative[joint[::-1]] = np.arange(n_rows - 1, -1, -1, dtype=np.int64)
    present = representative >= 0
    rank = np.cumsum(present) - 1
    return Distinct(representative[present], rank[joint])
