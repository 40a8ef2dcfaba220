"""What every collective algorithm offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np

from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic
from moesim.structure.columns import FloatArray
from moesim.structure.communication_plans import CommunicationPlan
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.step_graph import CollectiveKind

LinkStyle = Literal["switched", "torus"]
SWITCHED: tuple[LinkStyle, ...] = ("switched",)
TORUS: tuple[LinkStyle, ...] = ("torus",)
ANY_LINKS: tuple[LinkStyle, ...] = ("switched", "torus")


class AbstractAlgorithm(ABC):
    """One way to carry out some kinds of collectives: what it asks of each level of links, and an explicit plan.

    The two agree: a plan executed on idle links takes what ``ideal_time_s`` makes of the demand.

    Attributes
    ----------
    name : str
        Name within a kind, as in ``--algorithm``.
    kinds : tuple of str
        Collectives it can carry out.
    links : tuple of str
        Whether it runs on switched levels, on a torus, or both.
    phases_overlap : bool
        Whether an all-reduce spreads the first sums while it still reduces others. On a line without its closing link
        this decides: reduce-scatter fills the links that all-gather leaves idle.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[CollectiveKind, ...]]
    links: ClassVar[tuple[LinkStyle, ...]] = SWITCHED
    phases_overlap: ClassVar[bool] = True

    @abstractmethod
    def demand(self, kind: CollectiveKind, traffic: GroupTraffic, fabric: Fabric) -> CollectiveDemand:
        """Rounds, peers and wire bytes on each level.

        Parameters
        ----------
        kind : str
            One of ``kinds``.
        traffic : GroupTraffic
            Bytes and extents of the cases.
        fabric : Fabric
            Levels of links, as many as there are extents.

        Returns
        -------
        CollectiveDemand
            Arrays of shape (n_cases,).
        """

    @abstractmethod
    def plan(self, kind: CollectiveKind, num_bytes: float, layout: GroupLayout) -> CommunicationPlan:
        """Who sends which blocks to whom in which round, for one group.

        Parameters
        ----------
        kind : str
            One of ``kinds``.
        num_bytes : float
            As in ``GroupTraffic``.
        layout : GroupLayout
            Where the group's ranks stand.

        Returns
        -------
        CommunicationPlan
            Rounds of transfers between ranks of the group.
        """


def passes(kind: CollectiveKind) -> float:
    """How often a reduction's buffer goes round: twice for an all-reduce (reduce-scatter, then all-gather)."""
    return 2.0 if kind == "all_reduce" else 1.0


def closes(wraps: bool, size: int, extent: FloatArray) -> FloatArray:
    """Whether a group on a torus axis closes its ring: it fills the axis, and the axis wraps."""
    return np.asarray(wraps & (extent >= size))
