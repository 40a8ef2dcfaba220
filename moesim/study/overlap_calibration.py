"""How much of a collective hides beside compute, from records of each alone and of both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import FloatArray
from moesim.study.measured_cases import MeasuredCase

PARTS = ("compute", "collective", "together")
SMALLEST_SHARE = 0.2
"""Shorter of the two over the longer: below, hiding all or nothing of it differs by less than a measurement does."""
FEWEST_PAIRS = 3
MEDIAN_TO_DEVIATION = 1.4826
MEDIAN_EFFICIENCY = 1.2533
"""Standard error of a median over that of a mean of normal values."""


@dataclass(frozen=True)
class HiddenShare:
    """Share of the shorter of compute and a collective that hides beside the longer: 1 all, 0 one after the other.

    ``share`` is the median over pairs; below 0 both at once take longer than one after the other. ``refused`` says why
    there is none.
    """

    collective: str
    share: float
    standard_error: float
    num_pairs: int
    refused: str = ""


def hidden_shares(cases: Sequence[MeasuredCase]) -> list[HiddenShare]:
    """Hidden share of each kind of collective.

    Parameters
    ----------
    cases : sequence of MeasuredCase
        Any; of the suite ``overlap`` the operations ``compute``, ``collective`` and ``together`` of one shape belong
        to each other.

    Returns
    -------
    list of HiddenShare
        By collective; h = (compute + collective - together) / min(compute, collective).
    """
    triples: dict[tuple[str, str], dict[str, float]] = {}
    for case in cases:
        if case.suite == "overlap" and case.operation in PARTS:
            sizes = ",".join(f"{name}={value}" for name, value in sorted(case.shape.items()))
            triples.setdefault((case.text("collective"), sizes), {})[case.operation] = case.median_s
    shares: dict[str, list[float]] = {}
    for (collective, _), times in triples.items():
        found = shares.setdefault(collective, [])
        if set(times) == set(PARTS):
            compute, communicate, together = (times[part] for part in PARTS)
            shorter, longer = sorted((compute, communicate))
            if shorter >= SMALLEST_SHARE * longer:
                found.append((compute + communicate - together) / shorter)
    return [_share(collective, np.array(found)) for collective, found in shares.items()]


def _share(collective: str, found: FloatArray) -> HiddenShare:
    if len(found) < FEWEST_PAIRS:
        reason = f"{len(found)} pairs whose parts are of like length; {FEWEST_PAIRS} are needed"
        return HiddenShare(collective, float("nan"), float("nan"), len(found), reason)
    middle = float(np.median(found))
    spread = float(np.median(np.abs(found - middle))) * MEDIAN_TO_DEVIATION
    return HiddenShare(collective, middle, spread / float(np.sqrt(len(found))) * MEDIAN_EFFICIENCY, len(found))
