"""What every collective algorithm offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from moesim.cost.collective_demands import CollectiveDemand, Fabric, GroupTraffic
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import CollectiveKind


class AbstractAlgorithm(ABC):
    """One way to carry out some kinds of collectives: what it asks of each level of links.

    Attributes
    ----------
    name : str
        Name within a kind, as in ``--algorithm``.
    kinds : tuple of str
        Collectives it can carry out.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[CollectiveKind, ...]]

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


def passes(kind: CollectiveKind) -> float:
    """How often a reduction's buffer goes round: twice for an all-reduce (reduce-scatter, then all-gather)."""
    return 2.0 if kind == "all_reduce" else 1.0


def closes(wraps: bool, size: int, extent: FloatArray) -> FloatArray:
    """Whether a group on a torus axis closes its ring: it fills the axis, and the axis wraps."""
    return np.asarray(wraps & (extent >= size))
