"""Constants of gloo over TCP from collectives on the flat network: latencies, and TCP's part of the bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import FloatArray
from validation.netlab.measurements import MeasuredCollective
from validation.netlab.predictions import LibraryConstants, Predictor

START = LibraryConstants(5e-4, 5e-4, 5e-4, 5e-4, 0.95, 0.95, 0.95)
MOST_LATENCY_S = 0.1


@dataclass(frozen=True)
class Fit:
    """Constants, and relative errors of the cases they were fitted on, (n_cases,)."""

    constants: LibraryConstants
    errors: FloatArray


def fit_library(measured: Sequence[MeasuredCollective]) -> Fit:
    """Least squares of relative errors, robust to single cases.

    Parameters
    ----------
    measured : sequence of MeasuredCollective
        Cases on a network whose links are not shared by several ranks.

    Returns
    -------
    Fit
        Seven constants: two latencies and a fraction of exchanges (one latency is that of a message), of reductions and
        of messages.
    """
    from scipy.optimize import least_squares

    seconds = np.array([one.typical_s for one in measured])
    names = list(START.__dataclass_fields__)
    start = np.array([getattr(START, name) for name in names])
    is_latency = np.array([name.endswith("_s") for name in names])
    lower, upper = np.where(is_latency, 1e-6, 0.3), np.where(is_latency, MOST_LATENCY_S, 1.0)
    scale = np.where(is_latency, 1e-3, 0.1)

    def errors(values: FloatArray) -> FloatArray:
        predictor = Predictor(constants=LibraryConstants(*np.clip(values, lower, upper).tolist()))
        return np.array([predicted_s(predictor, one) for one in measured]) / seconds - 1.0

    found = least_squares(errors, start, bounds=(lower, upper), x_scale=scale, loss="soft_l1", f_scale=0.05)
    return Fit(LibraryConstants(*found.x.tolist()), errors(found.x))


def predicted_s(predictor: Predictor, measured: MeasuredCollective) -> float:
    """Median over the orders of arrival that were measured."""
    network, case = predictor.network(measured.case.topology), measured.case
    pair_bytes = case.pair_bytes()
    if pair_bytes is None:
        return network.collective_s(case.kind, float(case.num_bytes))
    return float(np.median([network.exchange_s(pair_bytes, row).max() for row in measured.arrival_s]))
