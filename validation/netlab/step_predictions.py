"""Predicted time of a training step: compute that was measured alone, messages that are predicted, rank by rank."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from moesim.structure.columns import FloatArray, IntArray
from validation.netlab.cases import rows_of_pairs
from validation.netlab.moe_steps import StepShape
from validation.netlab.predictions import Network

FLOAT_BYTES = 4
DRAWS = 7
JITTER_S = 1e-4
"""In which order ranks of equal loads get a core is chance: when a sleeping thread wakes scatters by this much."""
PASSES = 3
SLICE_S = 0.004
"""Linux takes a core away at a tick, of which there are 250 a second."""


@dataclass(frozen=True)
class StepPrediction:
    """Seconds of a step, and those of them that the slowest rank computes."""

    seconds: float
    compute_s: float


def shared_cores(start_s: FloatArray, work_s: FloatArray, cores: int) -> FloatArray:
    """When threads that take turns on the cores of a machine are through.

    Parameters
    ----------
    start_s, work_s : ndarray of shape (n,)
        When each begins, and its seconds on a core of its own.
    cores : int
        Of the machine. A thread keeps one for at most ``SLICE_S`` while others wait, and then stands last.

    Returns
    -------
    ndarray of shape (n,)
        End of each.

    Examples
    --------
    Three threads of 1, 1 and 4 ms on two cores: the third begins when the first two have ended.

    >>> shared_cores(np.zeros(3), np.array([0.001, 0.001, 0.004]), 2).tolist()
    [0.001, 0.001, 0.005]
    """
    end, left = start_s + 0.0, work_s + 0.0
    by_start = sorted((at, rank) for rank, at in enumerate(start_s.tolist()))
    waiting = [(float(at), order, rank) for order, (at, rank) in enumerate(by_start)]
    free = [float(start_s.min())] * cores
    turns = len(waiting)
    heapq.heapify(waiting)
    heapq.heapify(free)
    while waiting:
        ready, _, rank = heapq.heappop(waiting)
        begin = max(heapq.heappop(free), ready)
        span = min(float(left[rank]), SLICE_S)
        left[rank] -= span
        heapq.heappush(free, begin + span)
        end[rank] = begin + span
        if left[rank] > 0:
            heapq.heappush(waiting, (begin + span, turns, rank))
            turns += 1
    return end


def predicted_step(
    network: Network, tokens: IntArray, shape: StepShape, compute_s: FloatArray, cores: int
) -> StepPrediction:
    """Walk through the step of all ranks: compute on shared cores, exchanges in the order of arrival, one all-reduce.

    Parameters
    ----------
    network : Network
        Wires and library.
    tokens : ndarray of shape (n_ranks, n_experts)
        Who sends how much where.
    shape : StepShape
        Sizes.
    compute_s : ndarray of shape (n_ranks, n_segments)
        Compute before, between and after the messages, measured alone.
    cores : int
        Of the machine that emulates the hosts.

    Returns
    -------
    StepPrediction
        Median over random orders in which ranks of equal clocks arrive.
    """
    ranks = len(tokens)
    forth: FloatArray = np.asarray(rows_of_pairs(tokens, ranks), np.float64) * (shape.hidden * FLOAT_BYTES)
    exchanges: list[FloatArray] = [forth, forth.T] * (2 * shape.layers)
    shared = shape.layers * shape.hidden * (shape.hidden + tokens.shape[1]) * FLOAT_BYTES
    reduction_s = network.collective_s("all_reduce", float(shared))
    generator, ends = np.random.default_rng(0), []
    for _ in range(DRAWS):
        jitter_s = generator.uniform(0.0, JITTER_S, (len(exchanges), ranks))
        clock = _through_exchanges(network, exchanges, compute_s, jitter_s, cores)
        clock = shared_cores(clock, compute_s[:, len(exchanges)], cores)
        clock = np.full(ranks, clock.max() + reduction_s)
        ends.append(float(shared_cores(clock, compute_s[:, -1], cores).max()))
    return StepPrediction(float(np.median(ends)), float(compute_s.sum(axis=1).max()))


def _through_exchanges(
    network: Network, exchanges: list[FloatArray], compute_s: FloatArray, jitter_s: FloatArray, cores: int
) -> FloatArray:
    """When each rank is through with the last exchange, (n_ranks,).

    A rank that is through early goes on and calls the next exchange, whose bytes share the wires with what is left of
    the one before; that one then ends later, and with it the others call later: a few passes settle it.
    """
    arrivals: list[FloatArray] = []
    through = np.zeros((1, len(jitter_s[0])))
    for index in range(len(exchanges)):
        first = max(index - 1, 0)
        arrivals.append(np.zeros(0))
        before = through[-1]
        for _ in range(PASSES):
            arrivals[index] = shared_cores(before + jitter_s[index], compute_s[:, index], cores)
            through = network.exchanges_s(exchanges[first : index + 1], arrivals[first:])
            before = through[0] if index else before
    return np.asarray(through[-1])
