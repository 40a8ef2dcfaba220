"""Max-min fair rates of flows that share links: water-filling, and the certificate that proves it.

Flows and links may be classes of equal ones: what counts is the load that one link of a class gets per unit of rate of
the flows of a class. A network and its quotient by symmetry are solved by the same lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.topology import sums

BoolArray = npt.NDArray[np.bool_]

TIE = 1e-12
"""Relative difference below which two shares of bandwidth are the same number, rounded differently."""


@dataclass(frozen=True)
class Incidence:
    """Which flows load which links: entries sorted by flow, every flow with at least one.

    Attributes
    ----------
    num_flows, num_links : int
        Classes of flows and of links.
    flow, link : ndarray of shape (n_entries,)
        Where the entries stand; a pair occurs once.
    weight : ndarray of shape (n_entries,)
        Load (bytes/s) of one link of the class per byte/s of each flow of the class.
    """

    num_flows: int
    num_links: int
    flow: IntArray
    link: IntArray
    weight: FloatArray

    def only(self, is_kept: BoolArray) -> Incidence:
        """Some of the flows, (n_flows,), numbered anew in their order."""
        kept = is_kept[self.flow]
        number = np.cumsum(is_kept) - 1
        size = int(is_kept.sum())
        return Incidence(size, self.num_links, number[self.flow[kept]], self.link[kept], self.weight[kept])

    @cached_property
    def starts(self) -> IntArray:
        """First entry of each flow, shape (n_flows,)."""
        return run_starts(self.flow)

    @cached_property
    def padded_links(self) -> IntArray:
        """Links of each flow in a column, ``num_links`` below them: shape (most links of a flow, n_flows).

        Minima down such columns take a third of the time of ``reduceat``.
        """
        place = np.arange(len(self.flow)) - self.starts[self.flow]
        padded = np.full((int(place.max(initial=-1)) + 1, self.num_flows), self.num_links)
        padded[place, self.flow] = self.link
        return padded

    def least_level(self, level: FloatArray) -> FloatArray:
        """Lowest level (n_links,) on each flow's links, shape (n_flows,)."""
        if not len(self.flow):
            return np.zeros(0)
        return np.asarray(np.append(level, np.inf)[self.padded_links].min(axis=0))

    def links_of(self, flows: IntArray) -> IntArray:
        """Links that some flows cross, with repetitions."""
        end = np.append(self.starts, len(self.flow))[1:]
        length = end[flows] - self.starts[flows]
        first = np.repeat(self.starts[flows] - np.cumsum(length) + length, length)
        return self.link[first + np.arange(len(first))]

    def load(self, rate: FloatArray) -> FloatArray:
        """Load of each link, (n_links,) bytes/s, at rates (n_flows,)."""
        return sums(self.link, self.weight * rate[self.flow], self.num_links)


@dataclass(frozen=True)
class Allocation:
    """Rates (n_flows,) in bytes/s, and the full link that holds each flow, on which none is faster."""

    rate: FloatArray
    bottleneck: IntArray


def max_min_rates(incidence: Incidence, capacity: FloatArray) -> FloatArray:
    """Rates such that no flow can be faster without slowing one that is not faster; see ``max_min_allocation``.

    Examples
    --------
    Two links of 1 and 2 bytes/s; one flow crosses both, one only the second: 1 and 1.

    >>> both = Incidence(2, 2, np.array([0, 0, 1]), np.array([0, 1, 1]), np.ones(3))
    >>> max_min_rates(both, np.array([1.0, 2.0])).tolist()
    [1.0, 1.0]
    """
    return max_min_allocation(incidence, capacity).rate


def max_min_allocation(incidence: Incidence, capacity: FloatArray) -> Allocation:
    """Water-filling from scratch.

    Parameters
    ----------
    incidence : Incidence
        Flows on links.
    capacity : ndarray of shape (n_links,)
        Bytes/s of one link of each class.

    Raises
    ------
    SimulationError
        If it does not end, which would be a defect.

    Notes
    -----
    Water-filling: a link's share is its free capacity over the weight of its flows that are not yet fixed. Where a
    link's share is the smallest for every one of these flows, it is a bottleneck: they get that rate for good. All such
    links are taken at once, since fixing flows elsewhere can only raise their share ("locally minimal"; the order of a
    global water-filling does not matter). Each pass fixes at least the links of globally smallest share.

    References
    ----------
    Bertsekas, Gallager, Data Networks (2nd ed.), section 6.5.2.
    """
    rate, bottleneck = np.zeros(incidence.num_flows), np.zeros(incidence.num_flows, np.int64)
    free = capacity.astype(np.float64)
    flow, link, weight = incidence.flow, incidence.link, incidence.weight
    by_link = np.argsort(link, kind="stable")
    while len(flow):
        demand = sums(link, weight, incidence.num_links)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.maximum(free, 0.0) / demand
        own = share[link]
        start = run_starts(flow)
        smallest = np.minimum.reduceat(own, start)  # of each flow
        length = np.diff(np.append(start, len(flow)))
        of_entry = np.repeat(smallest, length)
        link_start = run_starts(link[by_link])
        least = np.full(incidence.num_links, np.inf)  # of each link: the smallest share its flows see
        least[link[by_link[link_start]]] = np.minimum.reduceat(of_entry[by_link], link_start)
        is_bottleneck = least >= share * (1.0 - TIE)
        is_fixed = np.repeat(np.logical_or.reduceat(is_bottleneck[link], start), length)
        if not is_fixed.any():
            raise SimulationError("water-filling found no bottleneck")
        rate[flow[is_fixed]] = of_entry[is_fixed]
        holds = is_fixed & is_bottleneck[link]
        bottleneck[flow[holds]] = link[holds]
        free -= sums(link[is_fixed], (weight * of_entry)[is_fixed], incidence.num_links)
        rest = ~is_fixed
        place = np.cumsum(rest) - 1
        by_link = place[by_link[rest[by_link]]]
        flow, link, weight = flow[rest], link[rest], weight[rest]
    return Allocation(rate, bottleneck)


@dataclass(frozen=True)
class Certificate:
    """How far rates are from max-min fair (0 if they are, relative), and the link that holds each flow (n_flows,)."""

    slack: float
    bottleneck: IntArray


def bottleneck_slack(incidence: Incidence, capacity: FloatArray, rate: FloatArray) -> float:
    """How far rates are from max-min fair: 0 if they are, relative; see ``max_min_certificate``."""
    return max_min_certificate(incidence, capacity, rate).slack


def max_min_certificate(incidence: Incidence, capacity: FloatArray, rate: FloatArray) -> Certificate:
    """Judge rates, however they were found.

    The certificate: no link carries more than it can, and every flow crosses a link that is full and on which no flow
    is faster. The slack of a flow is the least over its links of the larger of the link's idle part and the
    lead of its fastest flow; the answer is the worst flow's, or the worst overload if that is larger.

    Parameters
    ----------
    incidence : Incidence
        Flows on links.
    capacity : ndarray of shape (n_links,)
        Bytes/s of one link of each class.
    rate : ndarray of shape (n_flows,)
        Bytes/s of each flow.
    """
    if not len(incidence.flow):
        return Certificate(0.0, np.zeros(0, np.int64))
    filled = incidence.load(rate) / capacity
    own = rate[incidence.flow]
    fastest = np.zeros(incidence.num_links)
    np.maximum.at(fastest, incidence.link, own)
    fastest_here = fastest[incidence.link]
    lead = 1.0 - np.divide(own, fastest_here, out=np.ones_like(own), where=fastest_here > 0)
    slack = np.maximum(1.0 - filled[incidence.link], lead)
    least = np.minimum.reduceat(slack, incidence.starts)
    holds = slack == least[incidence.flow]
    bottleneck = np.zeros(incidence.num_flows, np.int64)
    bottleneck[incidence.flow[holds]] = incidence.link[holds]
    return Certificate(max(float(least.max()), float(filled.max()) - 1.0, 0.0), bottleneck)


def run_starts(numbers: IntArray) -> IntArray:
    """Where each run of equal numbers begins."""
    if not len(numbers):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate(([True], numbers[1:] != numbers[:-1])))
