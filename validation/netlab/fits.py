"""Constants of gloo over TCP from collectives on the flat network: latencies, and TCP's part of the bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.structure.columns import FloatArray
from validation.netlab.measurements import MeasuredCollective
from validation.netlab.predictions import LibraryConstants, Predictor

START = LibraryConstants(5e-4, 5e-4, 5e-4, 5e-4, 0.95, 0.95, 0.95)
NOISE = 0.01
"""Relative error beyond which a case counts less and less: medians of repetitions scatter by this much."""
MOST_LATENCY_S, LEAST_FRACTION = 0.1, 0.3
STAGES = (
    (("point_to_point",), ("message_s", "message_fraction")),
    (("all_reduce", "all_gather"), ("base_s", "round_s", "reduce_fraction")),
    (("all_to_all",), ("peer_s", "exchange_fraction")),
)
"""Kinds of collectives and the constants they tell; an exchange starts as a message does, which is known by then."""


@dataclass(frozen=True)
class Fit:
    """Constants, and relative errors of the cases they were fitted on, (n_cases,)."""

    constants: LibraryConstants
    errors: FloatArray


def fit_library(measured: Sequence[MeasuredCollective]) -> Fit:
    """Least squares of relative errors, robust to single cases, kind by kind.

    Parameters
    ----------
    measured : sequence of MeasuredCollective
        Cases on a network whose links are not shared by several ranks.

    Returns
    -------
    Fit
        Two constants of messages, three of reductions and gathers, two of exchanges.
    """
    constants = START
    for kinds, names in STAGES:
        cases = [one for one in measured if one.case.kind in kinds]
        if cases:
            constants = _fitted(constants, names, cases)
    return Fit(constants, _errors(constants, measured))


def _fitted(
    constants: LibraryConstants, names: Sequence[str], measured: Sequence[MeasuredCollective]
) -> LibraryConstants:
    """Some constants; the others stay."""
    from scipy.optimize import least_squares

    is_latency = np.array([name.endswith("_s") for name in names])
    bounds = np.where(is_latency, 1e-6, LEAST_FRACTION), np.where(is_latency, MOST_LATENCY_S, 1.0)
    start = [getattr(constants, name) for name in names]

    def errors(values: FloatArray) -> FloatArray:
        inside = np.clip(values, *bounds).tolist()
        return _errors(replace(constants, **dict(zip(names, inside, strict=True))), measured)

    scale = np.where(is_latency, 1e-3, 0.1)
    found = least_squares(errors, start, bounds=bounds, x_scale=scale, loss="cauchy", f_scale=NOISE)
    return replace(constants, **dict(zip(names, found.x.tolist(), strict=True)))


def _errors(constants: LibraryConstants, measured: Sequence[MeasuredCollective]) -> FloatArray:
    predictor = Predictor(constants=constants)
    return np.array([predicted_s(predictor, one) / one.typical_s - 1.0 for one in measured])


def predicted_s(predictor: Predictor, measured: MeasuredCollective) -> float:
    """Median over the orders of arrival that were measured."""
    network, case = predictor.network(measured.case.topology), measured.case
    pair_bytes = case.pair_bytes()
    if pair_bytes is None:
        return network.collective_s(case.kind, float(case.num_bytes))
    return float(np.median([network.exchange_s(pair_bytes, row) for row in measured.arrival_s]))
