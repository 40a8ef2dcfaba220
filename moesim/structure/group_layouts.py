"""Where the ranks of one group stand on the levels of links, for plans of single groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesim.structure.columns import IntArray


@dataclass(frozen=True)
class GroupLayout:
    """A group of ranks that fills a block of its levels; rank 0 is first, the innermost level counts fastest.

    Attributes
    ----------
    extents : tuple of int
        Members along each level, innermost first; their product is the group's size.
    is_ring : tuple of bool
        Levels that are axes of a torus: links join neighbours only.
    closes : tuple of bool
        Axes on which the group closes its ring.

    Examples
    --------
    Two nodes of three:

    >>> layout = GroupLayout.switched(3, 2)
    >>> layout.coordinates[4].tolist()
    [1, 1]
    >>> [line.tolist() for line in layout.lines(1)]
    [[0, 3], [1, 4], [2, 5]]
    """

    extents: tuple[int, ...]
    is_ring: tuple[bool, ...]
    closes: tuple[bool, ...]

    @staticmethod
    def switched(*extents: int) -> GroupLayout:
        """Layout on levels that are switches."""
        return GroupLayout(extents, (False,) * len(extents), (False,) * len(extents))

    @staticmethod
    def torus(*extents: int, closes: bool) -> GroupLayout:
        """Layout on the axes of a torus (``closes``) or mesh, one device per chip."""
        return GroupLayout(extents, (True,) * len(extents), (closes,) * len(extents))

    @property
    def num_ranks(self) -> int:
        """Members of the group."""
        return math.prod(self.extents)

    @property
    def num_levels(self) -> int:
        """Levels of links."""
        return len(self.extents)

    @property
    def top(self) -> int:
        """Outermost level that the group spans; 0 for a group of one."""
        return max((level for level, extent in enumerate(self.extents) if extent > 1), default=0)

    @cached_property
    def coordinates(self) -> IntArray:
        """Position of each rank along each level, (num_ranks, n_levels)."""
        ranks = np.arange(self.num_ranks)
        return np.stack([ranks // stride % extent for stride, extent in self._strides()], axis=1).astype(np.int64)

    def stride(self, level: int) -> int:
        """Ranks between neighbours along a level."""
        return math.prod(self.extents[:level])

    def rank_of(self, coordinates: Sequence[int]) -> int:
        """Rank at a position."""
        return sum(int(digit) * self.stride(level) for level, digit in enumerate(coordinates))

    def lines(self, level: int) -> Iterator[IntArray]:
        """Ranks that differ in their position along one level only, line by line."""
        stride, extent = self.stride(level), self.extents[level]
        for first in range(self.num_ranks):
            if first // stride % extent == 0:
                yield first + stride * np.arange(extent)

    def _strides(self) -> Iterator[tuple[int, int]]:
        return ((self.stride(level), extent) for level, extent in enumerate(self.extents))
