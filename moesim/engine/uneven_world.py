"""What makes ranks unequal in a simulated step: speeds of devices and links, late hosts; and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.communication_libraries import FabricRates
from moesim.cost.operators import Hardware
from moesim.describe.perturbations import FlappingLink, Perturbations, SlowLink
from moesim.structure.columns import FloatArray, IntArray

DEVICES_STREAM, FLAPPING_STREAM, HOST_STREAM = 2, 3, 4
"""Last words of seeds, after (seed, step, layer, group): those of ``token_loads`` are other."""
QUANTILES: dict[str, float] = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def device_factors(perturbations: Perturbations, num_ranks: int, seed: int) -> FloatArray:
    """How many times as long the kernels of each device take, shape (num_ranks,).

    A device keeps its speed: the spread is drawn once for a seed, the same for all draws of loads.
    """
    factors = np.ones(num_ranks)
    if perturbations.speed_spread:
        generator = np.random.default_rng([seed, 0, 0, 0, DEVICES_STREAM])
        factors = generator.lognormal(0.0, perturbations.speed_spread, num_ranks)
    for slow in perturbations.slow_ranks:
        factors[slow.rank] *= slow.factor
    return factors


def slow_share(link: FlappingLink, phase: FloatArray, step_s: float) -> FloatArray:
    """Share of a step of ``step_s`` seconds in which a flapping link is slow, for phases in [0, 1).

    The link is slow where frac(t / period + phase) < duty: all or nothing for a period much longer than the step, the
    duty itself for one much shorter.

    >>> link = FlappingLink("network", 0, factor=0.5, period_s=4.0, duty=0.25)
    >>> slow_share(link, np.array([0.0, 0.125, 0.5]), 1.0).tolist()
    [1.0, 0.5, 0.0]
    """

    def slow_until(position: FloatArray) -> FloatArray:
        whole = np.floor(position)
        return np.asarray(whole * link.duty + np.minimum(position - whole, link.duty))

    periods = step_s / link.period_s
    return np.asarray((slow_until(phase + periods) - slow_until(phase)) / periods)


def link_factors(
    perturbations: Perturbations, fabric: FabricRates, num_ranks: int, *, steps: Sequence[int], seed: int, step_s: float
) -> FloatArray:
    """Share of the bandwidth left to each rank on each level of links.

    Parameters
    ----------
    perturbations : Perturbations
        Slow and flapping links; several on one level multiply.
    fabric : FabricRates
        Its levels.
    num_ranks : int
        Ranks there are.
    steps : sequence of int
        Numbers of the draws. A flapping link has a phase of its own in each.
    seed : int
        Of all draws.
    step_s : float
        Seconds of an even step, over which a flapping link is averaged: it moves 1 - share + share * factor of the
        bytes that it would move otherwise. How transfers inside a step meet its slow spells takes the event heap.

    Returns
    -------
    ndarray of shape (n_draws, num_ranks, n_levels)
        One draw, which stands for all, where no link flaps.
    """
    number = {level.name: index for index, level in enumerate(fabric.levels)}
    draws = len(steps) if perturbations.flapping_links else 1
    factors = np.ones((draws, num_ranks, len(fabric.levels)))

    def ranks(link: SlowLink | FlappingLink) -> slice:
        return slice(None) if link.rank is None else slice(link.rank, link.rank + 1)

    for slow in perturbations.slow_links:
        factors[:, ranks(slow), number[slow.level]] *= slow.factor
    if perturbations.flapping_links:
        phases = np.stack([flapping_phases(perturbations, seed, step) for step in steps])
        for index, flapping in enumerate(perturbations.flapping_links):
            share = slow_share(flapping, phases[:, index], step_s)
            factors[:, ranks(flapping), number[flapping.level]] *= (1.0 - share * (1.0 - flapping.factor))[:, None]
    return factors


def flapping_phases(perturbations: Perturbations, seed: int, step: int) -> FloatArray:
    """Phases of the flapping links in a draw, shape (n_links,), in [0, 1): parts of a period, as in ``slow_share``."""
    generator = np.random.default_rng([seed, step, 0, 0, FLAPPING_STREAM])
    return generator.random(len(perturbations.flapping_links))


def degraded(hardware: Hardware, factors: Sequence[float]) -> Hardware:
    """Hardware with part of the bandwidth of each level: wire times grow, latencies and choices of protocol stay."""
    fabric = hardware.fabric
    levels = tuple(
        replace(
            level,
            bandwidth=level.bandwidth * factor,
            switch_s=level.switch_s / factor,
            in_switch_s=level.in_switch_s / factor,
        )
        for level, factor in zip(fabric.levels, factors, strict=True)
    )
    return replace(hardware, fabric=replace(fabric, levels=levels))


@dataclass(frozen=True)
class LinkCases:
    """Distinct sets of link factors of some process groups.

    Attributes
    ----------
    factors : ndarray of shape (n_cases, n_levels)
        Share of the bandwidth left, by level.
    case : ndarray of shape (n_draws, n_groups)
        Case of each group.
    """

    factors: FloatArray
    case: IntArray


def group_link_cases(factors: FloatArray, members: IntArray) -> LinkCases:
    """Links of process groups: on each level, a collective goes at the pace of its member with least bandwidth.

    Parameters
    ----------
    factors : ndarray of shape (n_draws, num_ranks, n_levels)
        From :func:`link_factors`.
    members : ndarray of shape (n_groups, size)
        Global ranks.
    """
    of_groups = factors[:, members, :].min(axis=2)
    distinct, case = np.unique(of_groups.reshape(-1, of_groups.shape[2]), axis=0, return_inverse=True)
    return LinkCases(distinct, case.reshape(of_groups.shape[:2]))


def host_jitter_s(
    perturbations: Perturbations, shape: tuple[int, ...], *, steps: Sequence[int], seed: int
) -> FloatArray:
    """Seconds that hosts are late, exponentially distributed.

    Parameters
    ----------
    perturbations : Perturbations
        The mean.
    shape : tuple of int
        What each draw has: ranks, and passes of each over its micro-batches.
    steps : sequence of int
        Numbers of the draws.
    seed : int
        Of all draws.

    Returns
    -------
    ndarray of shape (n_draws, *shape)
        Draws of a step do not depend on which others are drawn.
    """
    late = [np.random.default_rng([seed, step, 0, 0, HOST_STREAM]).exponential(size=shape) for step in steps]
    return np.asarray(np.stack(late) * perturbations.host_jitter_s)


def quantiles_s(step_time_s: FloatArray) -> dict[str, float]:
    """Quantiles p50, p95 and p99 of the draws' step times, linear between neighbours."""
    return {name: float(np.quantile(step_time_s, level)) for name, level in QUANTILES.items()}


@dataclass(frozen=True)
class LossAttribution:
    """Where the mean step time goes: parts that add up to it, seconds.

    Attributes
    ----------
    work_s : float
        The critical stage's own work, at even load and with nothing slow.
    bubble_s : float
        What that stage waits for others then.
    imbalance_s : float
        What the drawn loads add to that.
    stragglers_s : float
        What slow devices, slow links and late hosts add to that.
    contention_s : float
        What collectives that share healthy links add, found at even load.
    """

    work_s: float
    bubble_s: float
    imbalance_s: float
    stragglers_s: float
    contention_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Mean step time."""
        return self.work_s + self.bubble_s + self.imbalance_s + self.stragglers_s + self.contention_s


def loss_attribution(even_s: float, bubble_s: float, drawn_s: FloatArray, perturbed_s: FloatArray) -> LossAttribution:
    """Attribute the mean step time to work, bubble, imbalance and stragglers.

    Parameters
    ----------
    even_s : float
        Step at even load, with nothing slow.
    bubble_s : float
        What its critical stage waits.
    drawn_s : ndarray of shape (n_draws,)
        Steps at the drawn loads, with nothing slow.
    perturbed_s : ndarray of shape (n_draws,)
        Steps at the same loads, with what is slow.

    Returns
    -------
    LossAttribution
        Differences from one simulation to the next. Losses do not just add: with the order turned, stragglers first,
        what both cause together would count there.
    """
    drawn, perturbed = float(drawn_s.mean()), float(perturbed_s.mean())
    return LossAttribution(even_s - bubble_s, bubble_s, drawn - even_s, perturbed - drawn)
