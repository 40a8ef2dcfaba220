"""New max-min rates from the old ones: after an event most flows are still held by the link that held them.

Given which link holds each flow, the levels of the holding links follow from one linear system. Flows that cross a link
of lower level, or a link that would be overfull, change over, and so on until nothing changes: then the certificate
holds. This is Newton's method on a piecewise linear system (policy iteration); a few rounds do after an event, where
water-filling needs as many passes as there are levels.
"""

from __future__ import annotations

import numpy as np

from moesim.engine.flow_network import TIE, Allocation, Incidence, max_min_allocation
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.topology import sums

ROUNDS = 30
REFINEMENTS, RESIDUAL, DIVERGING = 10, 1e-14, 1e3
"""Substitutions before elimination, the part of a capacity left over that is rounding, and that which is hopeless."""
MOST_LINKS = 1024
"""Beyond this many holding links the dense system costs more than water-filling."""


def updated_allocation(incidence: Incidence, capacity: FloatArray, guess: Allocation) -> Allocation:
    """Max-min rates, from a guess of which link holds each flow.

    Parameters
    ----------
    incidence : Incidence
        Flows on links.
    capacity : ndarray of shape (n_links,)
        Bytes/s of one link of each class.
    guess : Allocation
        A link of each flow and its rate, such as those before an event; link -1 where there is no guess.

    Notes
    -----
    The answer does not depend on the guess: it is returned only when every flow is held by a full link on which
    none is faster and no link is overfull; else water-filling starts from scratch.
    """
    if (guess.bottleneck >= 0).all():
        held, level = guess.bottleneck.copy(), np.zeros(incidence.num_links)
        level[held] = guess.rate
        demand = sums(incidence.link, incidence.weight, incidence.num_links)
        least = np.divide(capacity, demand, out=np.zeros_like(demand), where=demand > 0)
        for _ in range(ROUNDS):
            solved = _levels(incidence, capacity, held, level)
            if solved is None:
                break
            is_sound = bool((solved >= least * (1.0 - TIE)).all())
            level = np.maximum(solved, least)  # a link's even share is the least its level can be
            rate = level[held]
            changed = _change_over(incidence, capacity, level, rate, held)
            if is_sound and not changed:
                return Allocation(rate, held)
    return max_min_allocation(incidence, capacity)


def _levels(incidence: Incidence, capacity: FloatArray, held: IntArray, before: FloatArray) -> FloatArray | None:
    """Level of each link, infinite where it holds nobody: the links that hold flows are full.

    For each holding link l: sum over its flows f of weight(l, f) level(link that holds f) = capacity(l). A wrong guess
    may give any number, also negative ones. ``before`` (n_links,) are levels whose order is about right.
    """
    holds = np.zeros(incidence.num_links, np.bool_)
    holds[held] = True
    holding = np.flatnonzero(holds)
    size = len(holding)
    if size > MOST_LINKS:
        return None
    holding = holding[np.argsort(before[holding], kind="stable")]
    number = np.full(incidence.num_links, size)  # links that hold nobody share a last row, which is dropped
    number[holding] = np.arange(size)
    cell = (number * size)[incidence.link] + number[held][incidence.flow]
    matrix = sums(cell, incidence.weight, (size + 1) * size).reshape(size + 1, size)[:size]
    solved = _solved_in_order(matrix, capacity[holding])
    if solved is None:
        return None
    level = np.full(incidence.num_links, np.inf)
    level[holding] = solved
    return level


def _solved_in_order(matrix: FloatArray, right: FloatArray) -> FloatArray | None:
    """Solve a system that is nearly lower triangular: a link's level depends on lower ones only, but for a wrong guess.

    Forward substitution, repeated on what is left over; elimination if that does not converge.
    """
    from scipy.linalg import solve_triangular

    solved: FloatArray = np.zeros_like(right)
    rest = right
    for _ in range(REFINEMENTS):
        solved = solved + solve_triangular(matrix, rest, lower=True, check_finite=False)
        rest = right - matrix @ solved
        error = float(np.abs(rest / right).max())
        if error <= RESIDUAL:
            return solved
        if not error < DIVERGING:
            break
    try:
        solved = np.asarray(np.linalg.solve(matrix, right), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    return solved if np.isfinite(solved).all() else None


def _change_over(
    incidence: Incidence, capacity: FloatArray, level: FloatArray, rate: FloatArray, held: IntArray
) -> bool:
    """Let flows be held by what is tighter, in place; whether any changed."""
    load = incidence.load(rate)
    overfull = np.flatnonzero(np.isinf(level) & (load > capacity * (1.0 + TIE)))
    for link in overfull:
        entries = np.flatnonzero(incidence.link == link)
        flows = incidence.flow[entries]
        is_cut = rate[flows] > _cut_level(rate[flows], incidence.weight[entries], float(capacity[link]))
        held[flows[is_cut]] = link
    lower = np.flatnonzero(incidence.least_level(level) < rate * (1.0 - TIE))
    if len(lower):
        links = incidence.padded_links[:, lower]
        tightest = np.append(level, np.inf)[links].argmin(axis=0)
        held[lower] = links[tightest, np.arange(len(lower))]
    return bool(len(overfull) or len(lower))


def _cut_level(rate: FloatArray, weight: FloatArray, capacity: float) -> float:
    """Level to which the fastest flows of a link must come down so that the link is just full.

    Examples
    --------
    >>> _cut_level(np.array([1.0, 5.0, 9.0]), np.ones(3), 7.0)
    3.0
    """
    order = np.argsort(rate)
    rate, weight = rate[order], weight[order]
    below = np.concatenate(([0.0], np.cumsum(rate * weight)[:-1]))
    above = np.cumsum(weight[::-1])[::-1]
    level = (capacity - below) / above  # if the flows from here on are cut
    first = int(np.argmax(level <= rate))
    return float(level[first])
