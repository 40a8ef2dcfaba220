"""Classes of flows and links: flows that network and traffic cannot tell apart are simulated once.

Two steps, both exact. *Colour refinement* (the coarsest equitable partition): flows of equal bytes and start, links of
equal capacity; told apart as long as flows cross differently coloured links, or links carry differently coloured flows.
Members of a class have equal rates for ever. *Same links*: a max-min rate is the level of the flow's bottleneck, so
flows that cross the same classes of links at the same time with the same bytes are one, whatever their shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.engine.flow_network import Incidence, run_starts
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.topology import sums

Hashes = npt.NDArray[np.uint64]
OWN, LINK = np.uint64(1 << 61), np.uint64(1 << 60)
"""Added to what is hashed, so that colours of owners, of links and of flows are different things."""


@dataclass(frozen=True)
class Entries:
    """Flows on links, entries sorted by flow: ``weight`` is the load of a link per unit of rate."""

    num_flows: int
    num_links: int
    flow: IntArray
    link: IntArray
    weight: FloatArray


@dataclass(frozen=True)
class Partition:
    """Class of each flow (n_flows,) and of each link (n_links,)."""

    flow_class: IntArray
    link_class: IntArray


def refined(entries: Entries, flow_colour: IntArray, link_colour: IntArray) -> Partition:
    """Coarsest partition of flows and links that is finer than their colours and equitable.

    Parameters
    ----------
    entries : Entries
        Which flows cross which links.
    flow_colour, link_colour : ndarray of shape (n_flows,), (n_links,)
        Numbers; what differs in them is never merged.

    Notes
    -----
    Colours of neighbours are compared as sums of 64-bit hashes: with n flows two different ones collide with a
    probability of about n^2 / 2^65 per round, 1e-10 for 65,000 flows.
    """
    flows, links = _numbered(flow_colour), _numbered(link_colour)
    by_link = np.argsort(entries.link, kind="stable")
    link_starts, flow_starts = run_starts(entries.link[by_link]), run_starts(entries.flow)
    weight = _mixed(entries.weight.view(np.uint64))
    sizes = (-1, -1)
    while (flows.max(initial=-1), links.max(initial=-1)) != sizes:
        sizes = (int(flows.max(initial=-1)), int(links.max(initial=-1)))
        if sizes[0] == entries.num_flows - 1:  # every flow on its own: links may stay apart too
            return Partition(flows, np.arange(entries.num_links))
        seen = _mixed(_mixed(flows.astype(np.uint64))[entries.flow] ^ weight)
        links = _split(links, entries.link[by_link], seen[by_link], link_starts)
        seen = _mixed(_mixed(links.astype(np.uint64) + LINK)[entries.link] ^ weight)
        flows = _split(flows, entries.flow, seen, flow_starts)
    return Partition(flows, links)


def same_link_classes(incidence: Incidence, flow_colour: IntArray) -> IntArray:
    """Number flows so that those of equal colour on the same set of links are one; shape (n_flows,)."""
    starts = run_starts(incidence.flow)
    seen = _mixed(incidence.link.astype(np.uint64))
    return _split(_numbered(flow_colour), incidence.flow, seen, starts)


def summed_incidence(num_flows: int, num_links: int, flow: IntArray, link: IntArray, weight: FloatArray) -> Incidence:
    """Incidence of entries in any order, those of the same flow and link added."""
    pair, index = np.unique(flow * num_links + link, return_inverse=True)
    return Incidence(num_flows, num_links, pair // num_links, pair % num_links, sums(index, weight, len(pair)))


def _split(colour: IntArray, owner: IntArray, seen: Hashes, starts: IntArray) -> IntArray:
    """Colours told apart by the sum of what each owner sees; ``owner`` is sorted, runs begin at ``starts``."""
    total = np.zeros(len(colour), np.uint64)
    if len(owner):
        total[owner[starts]] = np.add.reduceat(seen, starts)
    own = _mixed(colour.astype(np.uint64) + OWN)  # apart from what is seen: a colour 5 is not a neighbour 5
    return _numbered(_mixed(own + total))


def _numbered(colour: npt.NDArray[np.generic]) -> IntArray:
    index: IntArray = np.unique(colour, return_inverse=True)[1]
    return index


def _mixed(value: Hashes) -> Hashes:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit changes half of the output bits."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
