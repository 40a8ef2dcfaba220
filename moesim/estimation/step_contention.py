"""What a step loses where its collectives share links, and how busy these are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesim.describe.perturbations import Perturbations
from moesim.engine.contended_steps import ContendedStep, contended_step
from moesim.engine.link_faults import link_faults
from moesim.engine.step_passes import PreparedStep
from moesim.structure.columns import FloatArray

ROUNDING = 1e-12


@dataclass(frozen=True)
class BusyLink:
    """A rank's share of a level of links on one stage: how long it would be full with what it sends in a step."""

    stage: int
    level: str
    busy_s: float
    busy_fraction: float


@dataclass(frozen=True)
class Contention:
    """The step at even load with every collective on links of its own, and with all of a rank's on the same ports.

    Attributes
    ----------
    closed_step_time_s, step_time_s : float
        On links of their own, and on shared ones with what is slow there.
    sharing_s, faults_s : float
        What sharing healthy links adds, and what slow and flapping links add to that.
    busiest_links : tuple of BusyLink
        All that carry anything, the busiest first.
    added_s : mapping of str to ndarray of shape (stages,)
        By category of the breakdown; sums to all that is added, on every stage.
    """

    closed_step_time_s: float
    step_time_s: float
    sharing_s: float
    faults_s: float
    busiest_links: tuple[BusyLink, ...]
    added_s: Mapping[str, FloatArray]

    @property
    def contention_s(self) -> float:
        """All that is added."""
        return self.sharing_s + self.faults_s

    def to_json(self) -> dict[str, Any]:
        """Answer ready for ``json.dumps``."""
        return {
            "closed_step_time_s": self.closed_step_time_s,
            "step_time_s": self.step_time_s,
            "sharing_s": self.sharing_s,
            "faults_s": self.faults_s,
            "relative_difference": self.contention_s / self.closed_step_time_s,
            "busiest_links": [asdict(link) for link in self.busiest_links],
        }

    def added_to(self, exposed_s: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Parts of a step, (stages, columns) each, with what is added; their sum grows by ``contention_s``.

        Waiting that becomes shorter becomes no less than nothing: where drawn loads left less of it, the rest is taken
        from what becomes longer.
        """
        added = {name: np.broadcast_to(self.added_s[name][:, None], part.shape) for name, part in exposed_s.items()}
        limited = {name: np.maximum(added[name], -np.maximum(part, 0.0)) for name, part in exposed_s.items()}
        longer = sum(np.maximum(part, 0.0) for part in limited.values())
        excess = sum(limited[name] - added[name] for name in added)
        kept = 1.0 - np.divide(excess, longer, out=np.zeros_like(longer), where=longer > 0.0)
        return {
            name: np.asarray(part + np.where(limited[name] > 0.0, kept * limited[name], limited[name]))
            for name, part in exposed_s.items()
        }


def find_contention(step: PreparedStep, perturbations: Perturbations, *, seed: int) -> Contention:
    """Run a prepared step on shared links, healthy and with what is slow.

    Parameters
    ----------
    step : PreparedStep
        At even load.
    perturbations : Perturbations
        Of which slow and flapping links matter.
    seed : int
        Of the phases of flapping links.

    Raises
    ------
    ScenarioError
        If two links flap on one port.
    """
    faults = link_faults(step, perturbations, seed=seed)
    healthy = contended_step(step.system, step.columns)
    found = contended_step(step.system, step.columns, faults=faults) if faults else healthy
    closed_s = healthy.closed_step_time_s
    return Contention(
        closed_step_time_s=closed_s,
        step_time_s=found.step_time_s,
        sharing_s=_unless_rounding(healthy.contention_s, closed_s),
        faults_s=_unless_rounding(found.step_time_s - healthy.step_time_s, closed_s),
        busiest_links=_busiest(step, found),
        added_s={name: np.where(abs(part) > ROUNDING * closed_s, part, 0.0) for name, part in found.added_s.items()},
    )


def _unless_rounding(seconds: float, step_s: float) -> float:
    return seconds if abs(seconds) > ROUNDING * step_s else 0.0


def _busiest(step: PreparedStep, found: ContendedStep) -> tuple[BusyLink, ...]:
    levels = [level.name for level in step.system.hardware.fabric.levels]
    links = [
        BusyLink(stage, levels[level], busy_s, busy_s / found.step_time_s)
        for stage, of_stage in enumerate(found.link_busy_s.tolist())
        for level, busy_s in enumerate(of_stage)
        if busy_s > 0.0
    ]
    return tuple(sorted(links, key=lambda link: -link.busy_s))
