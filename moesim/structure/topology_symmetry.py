"""Symmetries of a topology under equal traffic of equal groups, as moves of single digits of the device number.

A device number is written in mixed radix along the fabric (place under a NIC, NIC of a node, node under a leaf, ... or
core, x, y, z). On a tree of equal parts any permutation of the values of a digit, applied everywhere at once, maps the
network, its routes and equal traffic of aligned groups onto themselves; on a torus the digits of closed axes may be
shifted and those of open axes reflected. One source per orbit then stands for all: its flows are listed, the rest are
a multiplicity, and links fall into classes of equal load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from moesim.errors import Problem, ScenarioError
from moesim.structure.columns import IntArray
from moesim.structure.topology import Channels

DigitKind = Literal["permutable", "fixed", "shift", "reflection"]


@dataclass(frozen=True)
class RankPattern:
    """All groups ``{r, r + stride, ..., r + (size - 1) stride}`` of ``num_ranks`` ranks at once; rank = device.

    Raises
    ------
    ScenarioError
        E-NET-003 if the groups do not fill the ranks.
    """

    num_ranks: int
    size: int
    stride: int = 1

    def __post_init__(self) -> None:
        if min(self.num_ranks, self.size, self.stride) < 1 or self.num_ranks % (self.size * self.stride):
            message = f"groups of {self.size} with stride {self.stride} do not fill {self.num_ranks} ranks"
            remedy = "size x stride must divide the ranks"
            raise ScenarioError([Problem(code="E-NET-003", message=message, remedy=remedy)])

    def peers(self, source: IntArray) -> IntArray:
        """Members of the group of each source, itself included: shape (n_sources, size)."""
        period = self.size * self.stride
        first = source // period * period + source % self.stride
        return first[:, None] + self.stride * np.arange(self.size)


@dataclass(frozen=True)
class Quotient:
    """Orbits of devices and channels under symmetries that keep network, routes and traffic.

    Attributes
    ----------
    source, multiplicity : ndarray of shape (n_orbits,)
        One device per orbit that is in use, and how many devices it stands for.
    channel_class : ndarray of shape (n_channels,)
        Orbit of each channel; -1 for channels of devices not in use.
    class_size, class_channel : ndarray of shape (n_classes,)
        Channels of each orbit, and the first of them.
    """

    source: IntArray
    multiplicity: IntArray
    channel_class: IntArray
    class_size: IntArray
    class_channel: IntArray


class AbstractSymmetry(Protocol):
    """What a topology knows about its own symmetries."""

    def quotient(self, channels: Channels, pattern: RankPattern) -> Quotient | None:
        """Orbits under traffic that is equal for all pairs of all groups; None if the groups fit no symmetry."""
        ...


@dataclass(frozen=True)
class Digit:
    """One digit of the device number and the moves of its values that keep the network."""

    radix: int
    kind: DigitKind


@dataclass(frozen=True)
class _DigitOrbits:
    """Orbit of each value of a digit (-1 if not used), one value per orbit, and the sizes of these orbits."""

    label: IntArray
    value: IntArray
    multiplicity: IntArray
    is_reflected: bool = False


@dataclass(frozen=True)
class DigitSymmetry:
    """Symmetry of a product of digits, innermost first.

    ``opposite_family`` maps the family of links that run down an axis to (the axis' digit, the family that runs up it):
    a reflection of an axis turns its links round.
    """

    digits: tuple[Digit, ...]
    opposite_family: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def quotient(self, channels: Channels, pattern: RankPattern) -> Quotient | None:
        """Orbits under equal traffic of all groups; see ``AbstractSymmetry``."""
        orbits = self._digit_orbits(pattern)
        if orbits is None:
            return None
        source, multiplicity = np.zeros(1, np.int64), np.ones(1, np.int64)
        unit = 1
        for digit, orbit in zip(self.digits, orbits, strict=True):
            source = (source[:, None] + unit * orbit.value).ravel()
            multiplicity = (multiplicity[:, None] * orbit.multiplicity).ravel()
            unit *= digit.radix
        label = self._channel_labels(channels, orbits)
        used = np.flatnonzero(label >= 0)
        _, first, index, size = np.unique(label[used], return_index=True, return_inverse=True, return_counts=True)
        channel_class = np.full(len(channels), -1)
        channel_class[used] = index
        return Quotient(source, multiplicity, channel_class, size, used[first])

    def _digit_orbits(self, pattern: RankPattern) -> list[_DigitOrbits] | None:
        """Orbits of every digit; None where the groups do not follow the digits.

        A digit's values in use split into (low, mid, high): groups differ in mid, the stride skips low, and high
        counts groups. Strides and sizes must end on digits or divide them.
        """
        ranks, stride, size = pattern.num_ranks, pattern.stride, pattern.size
        orbits = []
        for digit in self.digits:
            used = min(digit.radix, ranks)
            low = min(stride, used)
            if ranks % used or used % low or stride % low:
                return None
            ranks, stride = ranks // used, stride // low
            room = used // low
            mid = min(size, room) if stride == 1 else 1
            if room % mid or size % mid:
                return None
            size //= mid
            orbits.append(_orbits(digit, used, low * mid))
        return orbits if ranks == stride == size == 1 else None

    def _channel_labels(self, channels: Channels, orbits: list[_DigitOrbits]) -> IntArray:
        """One number per orbit of channels: family and the orbits of the anchor's digits; -1 where not in use."""
        family = channels.family.copy()
        turned = {}
        for down, (axis, up) in self.opposite_family.items():
            if orbits[axis].is_reflected:
                turned[down] = axis
                family[channels.family == down] = up
        label, unit, is_used = family, 1, np.ones(len(channels), np.bool_)
        along = {axis: {down, self.opposite_family[down][1]} for down, axis in turned.items()}
        for position, (digit, orbit) in enumerate(zip(self.digits, orbits, strict=True)):
            value = channels.anchor // unit % digit.radix
            orbit_of_value = orbit.label[value]
            if position in along:  # links of this axis: count their place from the end they start at, no folding
                own = np.isin(channels.family, list(along[position]))
                is_down = np.isin(channels.family, [down for down, axis in turned.items() if axis == position])
                orbit_of_value = np.where(own, np.where(is_down, digit.radix - 1 - value, value), orbit_of_value)
            is_used &= orbit_of_value >= 0
            label = label * digit.radix + orbit_of_value
            unit *= digit.radix
        return np.where(is_used, label, -1)


def _orbits(digit: Digit, used: int, block: int) -> _DigitOrbits:
    """Orbits of one digit of which ``used`` values are in use and whose groups repeat every ``block`` values."""
    value = np.arange(digit.radix)
    if digit.kind == "permutable":
        return _DigitOrbits(np.where(value < used, 0, -1), np.zeros(1, np.int64), np.array([used]))
    if digit.kind == "fixed" or used < digit.radix:
        return _DigitOrbits(value, value[:used], np.ones(used, np.int64))
    if digit.kind == "shift":
        step = 1 if block == used else block
        return _DigitOrbits(value % step, value[:step], np.full(step, digit.radix // step))
    half = (digit.radix + 1) // 2
    mirrored = digit.radix - 1 - value
    sizes = np.where(value == mirrored, 1, 2)[:half]
    return _DigitOrbits(np.minimum(value, mirrored), value[:half], sizes, is_reflected=True)


@dataclass(frozen=True)
class NoSymmetry:
    """A topology of which nothing is known: every device and every channel stands for itself."""

    def quotient(self, channels: Channels, pattern: RankPattern) -> Quotient | None:
        """Every device on its own; see ``AbstractSymmetry``."""
        devices, all_channels = np.arange(pattern.num_ranks), np.arange(len(channels))
        ones = np.ones(len(channels), np.int64)
        return Quotient(devices, np.ones(pattern.num_ranks, np.int64), all_channels, ones, all_channels)
