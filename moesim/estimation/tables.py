"""Many estimates: a space or a list of scenarios to a table of verdicts and times."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.surface_transfer import device_surfaces
from moesim.describe.consistency import hardware_mismatches, inconsistencies
from moesim.describe.documents import Document, assign
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.scenario import Scenario
from moesim.engine.analytical import System, evaluate, model_flops
from moesim.errors import FormatError, Problem, ScenarioError
from moesim.estimation.estimate import scenario_document, tokens_per_row
from moesim.estimation.loading import build_system, validated_scenario
from moesim.estimation.spaces import Axis, Space, read_space
from moesim.structure.columns import COLUMN_OF_PATH, Columns, FloatArray, IntArray
from moesim.structure.group_tables import encode_value, group_columns_table
from moesim.structure.legality import first_broken_rule, legality_rules, resolve_columns

VERDICTS: tuple[str, ...] = ("ok", "illegal", "does_not_fit")
OK, ILLEGAL, DOES_NOT_FIT = range(3)
ROWS_PER_CHUNK = 65_536
MEASURES: tuple[str, ...] = (
    "step_time_s",
    "lower_s",
    "upper_s",
    "tokens_per_s",
    "mfu_fraction",
    "memory_peak_bytes",
)


@dataclass(frozen=True)
class EstimateTable:
    """Estimates of consecutive rows of a space.

    Attributes
    ----------
    space : Space
        Where the rows come from.
    first_row : int
        Number of the first row.
    verdict : ndarray of int8, shape (n_rows,)
        Index into ``VERDICTS``.
    reason_code : ndarray of int32, shape (n_rows,)
        Index into ``reasons``; 0 is no reason.
    reasons : tuple of str
        Distinct reasons.
    measures : mapping of str to ndarray of shape (n_rows,)
        ``MEASURES``; NaN where a row is illegal. Rows that do not fit are costed all the same.
    """

    space: Space
    first_row: int
    verdict: npt.NDArray[np.int8]
    reason_code: npt.NDArray[np.int32]
    reasons: tuple[str, ...]
    measures: Mapping[str, FloatArray]

    def __len__(self) -> int:
        return len(self.verdict)

    def __getitem__(self, name: str) -> FloatArray:
        return self.measures[name]

    def row(self, index: int) -> dict[str, Any]:
        """One row as the contract's columns: swept paths, verdict, reason, measures."""
        measures = {name: float(values[index]) for name, values in self.measures.items()}
        return {
            **self.space.row_values(self.first_row + index),
            "verdict": VERDICTS[self.verdict[index]],
            "reason": self.reasons[self.reason_code[index]],
            **measures,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in order."""
        return (self.row(index) for index in range(len(self)))

    def funnel(self) -> dict[str, int]:
        """How many rows were tried, are illegal, do not fit, are fine."""
        counts = np.bincount(self.verdict, minlength=len(VERDICTS))
        return {
            "tried": len(self),
            "illegal": int(counts[ILLEGAL]),
            "does_not_fit": int(counts[DOES_NOT_FIT]),
            "ok": int(counts[OK]),
        }

    def reason_counts(self) -> dict[str, int]:
        """Rows by reason, most frequent first."""
        counts = np.bincount(self.reason_code, minlength=len(self.reasons))
        order = np.argsort(-counts)
        return {self.reasons[index]: int(counts[index]) for index in order if index and counts[index]}


def estimate_many(
    scenarios: Space | Sequence[Scenario] | str | Path,
    *,
    profiles: Sequence[Path] = (),
    workers: int | None = None,
) -> EstimateTable:
    """Estimate every scenario of a space, of a space file, or of a list.

    Parameters
    ----------
    scenarios : Space, sequence of Scenario, str or Path
        A grid, a list, or a space file.
    profiles : sequence of Path
        Directories of hardware profiles that go before the shipped ones.
    workers : int, optional
        Processes; by default one per core for large grids, else one.

    Returns
    -------
    EstimateTable
        Illegal and oversized configurations are rows with a verdict and a reason; numbers equal ``estimate``'s.

    Raises
    ------
    ScenarioError, FormatError
        If the base or an axis is wrong in itself.
    """
    if isinstance(scenarios, str | Path):
        scenarios = read_space(scenarios)
    space = scenarios if isinstance(scenarios, Space) else _listed_space(scenarios)
    tables = list(estimate_chunks(space, profiles=profiles, workers=workers))
    return joined_tables(space, tables)


def _listed_space(scenarios: Sequence[Scenario]) -> Space:
    """A list of scenarios as a space with one linked axis over every top-level field."""
    documents = [scenario_document(scenario).data for scenario in scenarios]
    if not documents:
        raise ValueError("no scenarios to estimate")
    values = {key: [document[key] for document in documents] for key in documents[0]}
    return Space(Document(scenarios[0].name, documents[0], {}), (Axis("scenario", values),))


def joined_tables(space: Space, tables: Sequence[EstimateTable]) -> EstimateTable:
    """Consecutive tables as one; reasons are merged."""
    if len(tables) == 1:
        return tables[0]
    reasons = tuple(dict.fromkeys(reason for table in tables for reason in table.reasons))
    number = {reason: index for index, reason in enumerate(reasons)}
    codes = [np.array([number[reason] for reason in table.reasons], dtype=np.int32) for table in tables]
    return EstimateTable(
        space,
        tables[0].first_row,
        np.concatenate([table.verdict for table in tables]),
        np.concatenate([code[table.reason_code] for code, table in zip(codes, tables, strict=True)]),
        reasons,
        {name: np.concatenate([table[name] for table in tables]) for name in MEASURES},
    )


def estimate_chunks(
    space: Space, *, profiles: Sequence[Path] = (), workers: int | None = None, first_row: int = 0
) -> Iterator[EstimateTable]:
    """Estimate a space chunk by chunk, in order, from ``first_row`` on; raises as ``estimate_many``."""
    check_space(space, profiles)
    bounds = _chunk_bounds(first_row, len(space))
    if workers is None:
        workers = min(len(bounds), os.cpu_count() or 1)
    if workers <= 1 or len(bounds) <= 1:
        estimator = SpaceEstimator(space, profiles)
        yield from (estimator.estimate_rows(start, stop) for start, stop in bounds)
        return
    estimator = SpaceEstimator(portable_space(space), profiles)
    estimator.estimate_rows(first_row, first_row + 1)  # reads the first profiles once, before the fork
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_adopt, initargs=(estimator,)) as pool:
        for verdict, codes, reasons, measures, start in pool.map(_estimate_in_worker, bounds):
            yield EstimateTable(space, start, verdict, codes, reasons, measures)


def _chunk_bounds(first_row: int, end: int) -> list[tuple[int, int]]:
    """Bounds of chunks of nearly equal size, at most ``ROWS_PER_CHUNK`` rows each."""
    rows = end - first_row
    chunks = -(-rows // ROWS_PER_CHUNK)
    edges = [first_row + rows * index // chunks for index in range(chunks)] + [end] if chunks else []
    return list(itertools.pairwise(edges))


def portable_space(space: Space) -> Space:
    """A space that can be sent to another process: its base without lines."""
    return Space(Document(space.base.file, space.base.data, {}), space.axes)


_ADOPTED: list[SpaceEstimator] = []
"""The estimator of a worker process, set once when it starts: a forked worker inherits it instead of unpickling it."""


def _adopt(estimator: SpaceEstimator) -> None:
    _ADOPTED[:] = [estimator]


def _estimate_in_worker(bounds: tuple[int, int]) -> tuple[Any, ...]:
    table = _ADOPTED[0].estimate_rows(*bounds)
    return table.verdict, table.reason_code, table.reasons, table.measures, table.first_row


def check_space(space: Space, profiles: Sequence[Path] = ()) -> None:
    """Check the base and every value of every numeric axis on its own.

    Raises
    ------
    ScenarioError
        With all problems; combinations are not checked here.
    """
    HardwareLibrary(profiles)
    problems: list[Problem] = []
    for axis in space.axes:
        for position in range(len(axis)):
            document = space.base
            for path, values in axis.values.items():
                document = assign(document, path, values[position])
            try:
                validated_scenario(document)
            except ScenarioError as error:
                problems += [item for item in error.problems if item not in problems]
    if problems:
        raise ScenarioError(problems)


class SpaceEstimator:
    """Estimates rows of a space; systems of structural combinations are built once."""

    def __init__(self, space: Space, profiles: Sequence[Path] = ()) -> None:
        self._space = space
        self._library = HardwareLibrary(profiles)
        self._systems: dict[tuple[int, ...], System | str] = {}
        self._structural = [position for position, axis in enumerate(space.axes) if not axis.is_numeric]
        self._levels = {
            path: [encode_value(path, value) for value in values]
            for axis in space.axes
            if axis.is_numeric
            for path, values in axis.values.items()
        }

    def estimate_rows(self, start: int, stop: int) -> EstimateTable:
        """Rows ``start`` to ``stop`` - 1."""
        rows = np.arange(start, stop)
        indices = self._space.axis_indices(rows)
        n_rows = len(rows)
        verdict = np.zeros(n_rows, dtype=np.int8)
        codes = np.zeros(n_rows, dtype=np.int32)
        measures = {name: np.full(n_rows, np.nan) for name in MEASURES}
        reasons: dict[str, int] = {"": 0}
        for combination, members in self._combinations(indices, n_rows):
            system = self._system(combination)
            if isinstance(system, str):
                verdict[members], codes[members] = ILLEGAL, reasons.setdefault(system, len(reasons))
                continue
            swept = self._swept(indices, members)
            part = _evaluate_group(system, group_columns_table(system.scenario, swept, len(members)))
            verdict[members] = part.verdict
            translate = [reasons.setdefault(reason, len(reasons)) for reason in part.reasons]
            codes[members] = np.array(translate, dtype=np.int32)[part.reason_code]
            for name in MEASURES:
                measures[name][members] = part.measures[name]
        return EstimateTable(self._space, start, verdict, codes, tuple(reasons), measures)

    def _combinations(self, indices: tuple[IntArray, ...], n_rows: int) -> Iterator[tuple[tuple[int, ...], IntArray]]:
        """Structural combinations that occur, and the rows of each."""
        if not self._structural:
            yield (), np.arange(n_rows)
            return
        stacked = np.stack([indices[position] for position in self._structural])
        distinct, inverse = np.unique(stacked, axis=1, return_inverse=True)
        for number in range(distinct.shape[1]):
            combination = tuple(int(value) for value in distinct[:, number])
            yield combination, np.flatnonzero(inverse.reshape(-1) == number)

    def _system(self, combination: tuple[int, ...]) -> System | str:
        """System of a structural combination, or the reason why there is none."""
        if combination not in self._systems:
            self._systems[combination] = self._build(combination)
        return self._systems[combination]

    def _build(self, combination: tuple[int, ...]) -> System | str:
        document = self._space.base
        for position, index in zip(self._structural, combination, strict=True):
            for path, values in self._space.axes[position].values.items():
                document = assign(document, path, values[index])
        for axis in self._space.axes:
            if axis.is_numeric:  # which lengths are given matters, not how long they are
                for path, values in axis.values.items():
                    document = assign(document, path, values[0])
        try:
            scenario = validated_scenario(document)
            cluster = self._library.cluster(scenario.cluster)
            device, stack = self._library.device(cluster.device), self._library.stack(scenario.stack)
        except (ScenarioError, FormatError) as error:
            return error.problems[0].message
        found = [*inconsistencies(scenario), *hardware_mismatches(scenario, device, cluster, stack)]
        if found:
            return found[0].message
        return build_system(scenario, device, cluster, stack, surfaces=device_surfaces(device, self._library))

    def _swept(self, indices: tuple[IntArray, ...], members: IntArray) -> dict[str, tuple[Sequence[float], IntArray]]:
        return {
            COLUMN_OF_PATH[path]: (self._levels[path], indices[position][members])
            for position, axis in enumerate(self._space.axes)
            if axis.is_numeric
            for path in axis.values
        }


@dataclass(frozen=True)
class _GroupResult:
    verdict: npt.NDArray[np.int8]
    reason_code: npt.NDArray[np.int32]
    reasons: tuple[str, ...]
    measures: dict[str, FloatArray]


def _evaluate_group(system: System, columns: Columns) -> _GroupResult:
    """Verdicts and measures of rows that share a system."""
    n_rows = len(columns)
    columns = resolve_columns(columns)
    rules = list(legality_rules(system.scenario, system.cluster, columns))
    broken = first_broken_rule(rules, n_rows)
    reasons = ("", "memory", *(rule.name for rule in rules))
    verdict = np.where(broken >= 0, ILLEGAL, OK).astype(np.int8)
    reason_code = np.where(broken >= 0, broken + 2, 0).astype(np.int32)
    measures = {name: np.full(n_rows, np.nan) for name in MEASURES}
    legal = np.flatnonzero(broken < 0)
    if len(legal):
        at_legal = columns if len(legal) == n_rows else columns.take(legal)
        values = _measures(system, at_legal)
        for name in MEASURES:
            measures[name][legal] = values[name]
        too_large = legal[values["memory_peak_bytes"] > system.device.usable_memory.value]
        verdict[too_large], reason_code[too_large] = DOES_NOT_FIT, 1
    return _GroupResult(verdict, reason_code, reasons, measures)


def _measures(system: System, columns: Columns) -> dict[str, FloatArray]:
    """Measures of legal rows."""
    values = {name: np.empty(len(columns)) for name in MEASURES}
    for part in evaluate(system, columns):
        values["step_time_s"][part.rows] = part.step_time_s
        values["lower_s"][part.rows] = part.lower_s
        values["upper_s"][part.rows] = part.upper_s
        values["memory_peak_bytes"][part.rows] = np.rint(part.memory.peak)
    step_time_s = values["step_time_s"]
    peak = system.device.peak_flop_rate[system.scenario.precision.compute].value
    values["tokens_per_s"] = tokens_per_row(system.scenario, columns) / step_time_s
    values["mfu_fraction"] = model_flops(system, columns) / (step_time_s * columns["devices"] * peak)
    return values
