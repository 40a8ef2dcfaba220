"""Slow and flapping links of a command line as faults of the ports that a step's collectives share."""

from __future__ import annotations

from collections.abc import Iterator

from moesim.describe.perturbations import FlappingLink, Perturbations, SlowLink
from moesim.engine import shared_links
from moesim.engine.contended_steps import LinkFault
from moesim.engine.step_passes import PreparedStep
from moesim.engine.step_transfers import Ports, stage_ports
from moesim.engine.uneven_world import flapping_phases
from moesim.errors import Problem, ScenarioError


def link_faults(step: PreparedStep, perturbations: Perturbations, *, seed: int) -> list[LinkFault]:
    """Faults of ports, for :func:`moesim.engine.contended_steps.contended_step`.

    Parameters
    ----------
    step : PreparedStep
        Where its ranks are.
    perturbations : Perturbations
        Slow and flapping links; that of one rank holds up its whole stage, whose ranks are alike.
    seed : int
        Of the phase of each flapping link: that of the first draw.

    Returns
    -------
    list of LinkFault
        One for each port concerned.

    Raises
    ------
    ScenarioError
        If two links flap on one port.
    """
    fabric = step.system.hardware.fabric
    ports = stage_ports(step.system.cluster, fabric, step.ranks)
    number = {level.name: index for index, level in enumerate(fabric.levels)}
    faults = [
        LinkFault(stage, number[slow.level], slow.factor)
        for slow in perturbations.slow_links
        for stage in _stages(step, ports, slow, number[slow.level])
    ]
    flapping: dict[int, FlappingLink] = {}
    for link, phase in zip(perturbations.flapping_links, flapping_phases(perturbations, seed, 0), strict=True):
        level = number[link.level]
        for stage in _stages(step, ports, link, level):
            port = int(ports.of(stage, level)[0])
            if port in flapping:
                raise ScenarioError([_second_flapping_link(link, stage)])
            flapping[port] = link
            faults.append(_flapping_fault(stage, level, link, float(phase)))
    return faults


def _stages(step: PreparedStep, ports: Ports, link: SlowLink | FlappingLink, level: int) -> Iterator[int]:
    """Stages whose ports a link is, one for each port."""
    if link.rank is not None:
        yield int(step.ranks.place([link.rank])[0][0])
        return
    seen: set[int] = set()
    for stage in range(step.stages):
        port = int(ports.of(stage, level)[0])
        if port not in seen:
            seen.add(port)
            yield stage


def _flapping_fault(stage: int, level: int, link: FlappingLink, phase: float) -> LinkFault:
    if link.duty >= 1.0:
        return LinkFault(stage, level, link.factor)
    low_s, first_s = link.duty * link.period_s, -phase * link.period_s
    return LinkFault(stage, level, flapping=shared_links.FlappingLink(link.period_s, low_s, link.factor, first_s))


def _second_flapping_link(link: FlappingLink, stage: int) -> Problem:
    message = f"two links flap on level {link.level} of stage {stage}, whose ranks share the simulated port"
    remedy = "give one of them, or leave out --network shared"
    return Problem("E-CLI-001", message, remedy, field="--flapping-link")
