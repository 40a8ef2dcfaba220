"""Latency and bandwidth of each level of links, from measured collectives of one level each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import Fabric, FabricLevel, GroupTraffic
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CollectiveKind
from moesim.study.measured_cases import MeasuredCase
from moesim.study.robust_fits import Parameter, RobustFit, Values, fit_robustly

ALGORITHM_OF: dict[CollectiveKind, str] = {
    "all_reduce": "ring",
    "all_gather": "ring",
    "reduce_scatter": "ring",
    "all_to_all": "direct",
    "point_to_point": "send",
}
"""The algorithm whose rounds and bytes a kind is fitted with: what libraries do with large messages on one level."""
KINDS_OF_FILES = {"ping_pong": "point_to_point"}
"""Records' own names; ping-pong is one message between two ranks, one way. Pairs at once share what lies between."""
SIZE_NAMES = ("size", "bytes")
ALPHA, BETA = "alpha_s", "beta_bytes_per_s"
RANGES = {ALPHA: (1e-8, 1.0), BETA: (1e5, 1e14)}
DEFAULT_LEVEL = "links"
NEEDED_SPAN = 8.0
"""Largest message over smallest: less does not tell a latency from a bandwidth."""


@dataclass(frozen=True)
class LinkCase:
    """One collective of a level: bytes as in ``structure.step_graph.Collective``."""

    level: str
    kind: CollectiveKind
    ranks: int
    num_bytes: float
    time_s: float


@dataclass(frozen=True)
class FittedLevel:
    """Alpha and beta of one kind of collectives on a level.

    Alpha in seconds per round, of an exchange per peer; beta in bytes/s per device, one direction.
    """

    level: str
    family: str
    fit: RobustFit
    held_out: FloatArray

    @property
    def alpha_s(self) -> float | None:
        """Latency of a round; None where nothing fixes it."""
        return None if ALPHA in self.fit.refused else self.fit.values[ALPHA]

    @property
    def beta_bytes_per_s(self) -> float | None:
        """Bandwidth; None where nothing fixes it."""
        return None if BETA in self.fit.refused else self.fit.values[BETA]


def link_cases(cases: Sequence[MeasuredCase]) -> list[LinkCase]:
    """Collectives among measured cases: suite ``collectives``, shape ``ranks`` and ``size``, maybe ``kind``, ``level``.

    Uneven exchanges and several collectives at once are no measure of one link and are left out.
    """
    found = []
    for case in cases:
        kind = KINDS_OF_FILES.get(case.text("kind") or case.operation, case.text("kind") or case.operation)
        size = next((name for name in SIZE_NAMES if name in case.shape), None)
        if case.suite != "collectives" or kind not in ALGORITHM_OF or size is None or "ranks" not in case.shape:
            continue
        if case.text("preset") not in ("", "W0"):
            continue
        ranks, num_bytes = case.size("ranks"), case.size(size)
        if ranks >= 2 and num_bytes > 0:
            level = case.text("level") or DEFAULT_LEVEL
            found.append(LinkCase(level, kind, int(ranks), num_bytes, case.median_s))
    return found


def fit_links(cases: Sequence[LinkCase]) -> list[FittedLevel]:
    """Fit alpha and beta of reductions and of exchanges on each level.

    Parameters
    ----------
    cases : sequence of LinkCase
        Messages of several sizes.

    Returns
    -------
    list of FittedLevel
        One per level and family (``reductions``, ``exchanges``); what is not determined is refused by name.

    Notes
    -----
    t = rounds alpha + wire bytes / beta, with rounds (peers) and bytes of the ring or the direct exchange
    (:mod:`moesim.cost.collective_algorithms`). Left out in turn for the held-out error: every number of ranks, or
    every other size where there is one number only.
    """
    groups: dict[tuple[str, str], list[LinkCase]] = {}
    for case in cases:
        family = "reductions" if ALGORITHM_OF[case.kind] == "ring" else "exchanges"
        groups.setdefault((case.level, family), []).append(case)
    return [_fit_level(*key, some) for key, some in groups.items()]


def _fit_level(level: str, family: str, cases: Sequence[LinkCase]) -> FittedLevel:
    fit = _fit(cases)
    held_out = np.zeros(0)
    for inside, outside in _parts(cases):
        part = _fit(inside)
        if not part.refused:
            held_out = np.concatenate([held_out, _log_ratios(outside, part.values)])
    return FittedLevel(level, family, fit, held_out)


def _parts(cases: Sequence[LinkCase]) -> list[tuple[list[LinkCase], list[LinkCase]]]:
    ranks = sorted({case.ranks for case in cases})
    sizes = {size: index for index, size in enumerate(sorted({case.num_bytes for case in cases}))}
    keys = [case.ranks if len(ranks) > 1 else sizes[case.num_bytes] % 2 for case in cases]
    return [
        (
            [case for case, key in zip(cases, keys, strict=True) if key != left],
            [case for case, key in zip(cases, keys, strict=True) if key == left],
        )
        for left in sorted(set(keys))
    ]


def _fit(cases: Sequence[LinkCase]) -> RobustFit:
    rounds, wire = _demands(cases)
    times = np.array([case.time_s for case in cases])
    start_alpha = float(np.clip((times / np.maximum(rounds, 1.0)).min(), *RANGES[ALPHA]))
    start_beta = float(np.clip((wire / times).max(), *RANGES[BETA]))
    parameters = [Parameter(ALPHA, start_alpha, *RANGES[ALPHA]), Parameter(BETA, start_beta, *RANGES[BETA])]
    sizes = [case.num_bytes for case in cases]
    fit = fit_robustly(parameters, lambda values: _log_ratios(cases, values), num_cases=len(cases))
    if max(sizes) < NEEDED_SPAN * min(sizes) and ALPHA not in fit.refused:
        reason = f"messages of {min(sizes):g} to {max(sizes):g} bytes do not tell a latency from a bandwidth"
        return RobustFit(fit.values, {}, fit.covariance[:0, :0], fit.spread, {ALPHA: reason, BETA: reason}, len(cases))
    return fit


def _demands(cases: Sequence[LinkCase]) -> tuple[FloatArray, FloatArray]:
    """Rounds (of a direct exchange: peers) and wire bytes of each case, arrays (n_cases,)."""
    rounds, wire = np.zeros(len(cases)), np.zeros(len(cases))
    for index, case in enumerate(cases):
        links = FabricLevel("links", case.ranks, 1.0, False, False, False, 0.0)
        traffic = GroupTraffic(np.array([case.num_bytes]), np.array([[float(case.ranks)]]))
        algorithm = algorithms_of(case.kind)[ALGORITHM_OF[case.kind]]
        (demand,) = algorithm.demand(case.kind, traffic, Fabric((links,), 1)).levels
        steps = demand.peers if demand.peers[0] > 0 else demand.rounds
        rounds[index], wire[index] = float(steps[0]), float(demand.wire_bytes[0])
    return np.maximum(rounds, 1.0), wire


def _log_ratios(cases: Sequence[LinkCase], values: Values) -> FloatArray:
    rounds, wire = _demands(cases)
    times = np.array([case.time_s for case in cases])
    return np.asarray(np.log((rounds * values[ALPHA] + wire / values[BETA]) / times))
