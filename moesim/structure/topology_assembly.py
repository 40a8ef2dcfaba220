"""Put a topology together: vertices, links and channels, added in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.topology import TIERS, BoolArray, Channels, Links, Tier, VertexKind, sums

LinkFigures = tuple[float, float]
"""Bandwidth (bytes/s) and latency (s) of a link."""


@dataclass
class _Run:
    """Links added together."""

    source: IntArray
    target: IntArray
    bandwidth: FloatArray
    latency_s: float
    tier: int
    channel: IntArray


@dataclass
class Assembly:
    """A topology being built; devices are added first."""

    names: list[str] = field(default_factory=list)
    kinds: list[VertexKind] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    _runs: list[_Run] = field(default_factory=list)
    _anchors: list[IntArray] = field(default_factory=list)
    _family: list[IntArray] = field(default_factory=list)
    _redundant: list[BoolArray] = field(default_factory=list)
    _families: list[str] = field(default_factory=list)
    _num_channels: int = 0

    def add_vertices(self, kind: VertexKind, names: Sequence[str]) -> IntArray:
        """Add vertices of one kind and return their numbers."""
        first = len(self.names)
        self.names.extend(names)
        self.kinds.extend([kind] * len(names))
        return np.arange(first, first + len(names))

    def add_links(
        self,
        source: IntArray,
        target: IntArray,
        *,
        link: LinkFigures | tuple[FloatArray, float],
        tier: Tier,
        family: str,
        anchor: IntArray,
        is_redundant: bool = False,
        channel: IntArray | None = None,
    ) -> IntArray:
        """Add directed links and their channels; returns the channels, shape (n_new_channels,).

        Parameters
        ----------
        source, target : ndarray of shape (n_links,)
            Vertices.
        link : tuple
            Bandwidth (bytes/s; one, or one per link) and latency (s).
        tier : str
            One of ``TIERS``.
        family : str
            Role of the channels.
        anchor : ndarray of shape (n_new_channels,)
            Device that stands for the place of each channel.
        is_redundant : bool
            Whether other channels always keep these from being full.
        channel : ndarray of shape (n_links,), optional
            Channel of each link among the new ones; by default each link has its own.
        """
        index = np.arange(len(source)) if channel is None else channel
        first, count = self._num_channels, len(anchor)
        self._num_channels += count
        bandwidth = np.broadcast_to(np.asarray(link[0], dtype=np.float64), np.shape(source))
        self._runs.append(_Run(source, target, bandwidth, link[1], TIERS.index(tier), first + index))
        if family not in self._families:
            self._families.append(family)
        self._anchors.append(np.asarray(anchor))
        self._family.append(np.full(count, self._families.index(family)))
        self._redundant.append(np.full(count, is_redundant))
        return np.arange(first, first + count)

    def family(self, name: str) -> int:
        """Number of a family of channels."""
        return self._families.index(name)

    @property
    def families(self) -> Sequence[str]:
        """Names of the families so far."""
        return self._families

    def links_and_channels(self) -> tuple[Links, Channels]:
        """Arrays of everything that was added."""
        runs = self._runs
        links = Links(
            _joined([run.source for run in runs]),
            _joined([run.target for run in runs]),
            np.concatenate([run.bandwidth for run in runs]) if runs else np.zeros(0),
            np.concatenate([np.full(len(run.source), run.latency_s) for run in runs]) if runs else np.zeros(0),
            _joined([np.full(len(run.source), run.tier) for run in runs]),
            _joined([run.channel for run in runs]),
        )
        latency, tier = np.zeros(self._num_channels), np.zeros(self._num_channels, np.int64)
        latency[links.channel], tier[links.channel] = links.latency_s, links.tier
        channels = Channels(
            bandwidth=sums(links.channel, links.bandwidth, self._num_channels),
            latency_s=latency,
            tier=tier,
            family=_joined(self._family),
            anchor=_joined(self._anchors),
            is_redundant=np.concatenate(self._redundant) if runs else np.zeros(0, np.bool_),
            family_names=tuple(self._families),
        )
        return links, channels


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
