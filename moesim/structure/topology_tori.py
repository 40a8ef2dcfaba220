"""Tori and meshes of chips with dimension-order routing; two cores per chip on TPU v2 and v3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from moesim.structure.columns import IntArray
from moesim.structure.topology import Routes, routes_from_padded
from moesim.structure.topology_assembly import Assembly
from moesim.structure.topology_symmetry import Digit

AXES = "xyz"


@dataclass(frozen=True)
class TorusShape:
    """Chips along each axis (innermost first), which axes close, and devices that share a chip."""

    dimensions: tuple[int, ...]
    wraparound: tuple[bool, ...]
    devices_per_chip: int = 1

    @property
    def num_chips(self) -> int:
        """Chips of the torus."""
        return prod(self.dimensions)

    def neighbour(self, axis: int, step: int) -> IntArray:
        """Chip next to each chip along an axis, +1 or -1; -1 at the end of an open axis. Shape (n_chips,)."""
        chips, unit, size = np.arange(self.num_chips), prod(self.dimensions[:axis]), self.dimensions[axis]
        place = chips // unit % size
        moved = (place + step) % size
        exists = (size > 1) & (self.wraparound[axis] | (moved == place + step))
        return np.where(exists, chips + (moved - place) * unit, -1)


@dataclass(frozen=True)
class TorusRouting:
    """Dimension order, axis 0 first, the shorter way round; half each way where both are equally short.

    ``first_device`` and ``first_chip`` number this torus within a larger topology. ``channel_of`` (n_axes, 2, n_chips)
    is the channel that leaves a chip up or down an axis; ``chip_up`` and ``chip_down`` (n_devices,) join devices to
    their chip, and are empty where a device is a chip.
    """

    shape: TorusShape
    channel_of: IntArray
    chip_up: IntArray
    chip_down: IntArray

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of flows between devices of the torus; see ``AbstractRouting``."""
        per_chip = self.shape.devices_per_chip
        channels, shares = self._hops(source // per_chip, target // per_chip)
        if len(self.chip_up):
            moves = source != target
            ends = [np.where(moves, end, -1)[:, None] for end in (self.chip_up[source], self.chip_down[target])]
            channels = [ends[0], *channels, ends[1]]
            shares = [np.ones_like(ends[0], float), *shares, np.ones_like(ends[0], float)]
        return routes_from_padded(np.hstack(channels), np.hstack(shares))

    def _hops(self, source: IntArray, target: IntArray) -> tuple[list[IntArray], list[np.ndarray]]:
        """Tables (n_flows, n_hops) of channels and shares, one per axis and direction."""
        channels, shares = [], []
        here, unit = source, 1
        for axis, (size, wraps) in enumerate(zip(self.shape.dimensions, self.shape.wraparound, strict=True)):
            start, end = source // unit % size, target // unit % size
            ahead = (end - start) % size
            up_share = np.where(2 * ahead < size, 1.0, np.where(2 * ahead == size, 0.5, 0.0))
            if not wraps:
                up_share = (end >= start).astype(float)
            for direction, share, hops in ((0, up_share, ahead), (1, 1.0 - up_share, (size - ahead) % size)):
                length = np.where((share > 0) & (ahead > 0), hops, 0)
                step = np.arange(int(length.max(initial=0)))
                place = (start[:, None] + (step if direction == 0 else -step)) % size
                chip = here[:, None] + (place - start[:, None]) * unit
                is_hop = step < length[:, None]
                channels.append(np.where(is_hop, self.channel_of[axis, direction, np.where(is_hop, chip, 0)], -1))
                shares.append(np.broadcast_to(share[:, None], is_hop.shape))
            here = here + (end - start) * unit
            unit *= size
        return channels, shares


def add_torus(
    assembly: Assembly,
    shape: TorusShape,
    *,
    link: tuple[float, float],
    on_chip: tuple[float, float],
    first_device: int = 0,
    prefix: str = "",
) -> TorusRouting:
    """Add chips and links of one torus whose devices exist already.

    Parameters
    ----------
    assembly : Assembly
        Topology being built.
    shape : TorusShape
        Chips and axes.
    link, on_chip : tuple of float
        Bandwidth (bytes/s) and latency (s) of a link between chips, and between a device and its chip.
    first_device : int
        Number of the torus' first device.
    prefix : str
        Begin of the chips' names.
    """
    per_chip = shape.devices_per_chip
    chips = first_device + np.arange(shape.num_chips)
    devices = first_device + np.arange(shape.num_chips * per_chip)
    up = down = np.zeros(0, np.int64)
    if per_chip > 1:
        chips = assembly.add_vertices("chip", [f"{prefix}chip {chip}" for chip in range(shape.num_chips)])
        owner = chips[(devices - first_device) // per_chip]
        up = assembly.add_links(devices, owner, link=on_chip, tier="torus", family="device to chip", anchor=devices)
        down = assembly.add_links(owner, devices, link=on_chip, tier="torus", family="chip to device", anchor=devices)
    channel_of = np.full((len(shape.dimensions), 2, shape.num_chips), -1)
    for axis in range(len(shape.dimensions)):
        for direction, step in enumerate((1, -1)):
            target = shape.neighbour(axis, step)
            there = np.flatnonzero(target >= 0)
            channel_of[axis, direction, there] = assembly.add_links(
                chips[there],
                chips[target[there]],
                link=link,
                tier="torus",
                family=torus_family(axis, direction),
                anchor=first_device + there * per_chip,
            )
    return TorusRouting(shape, channel_of, up, down)


def torus_family(axis: int, direction: int) -> str:
    """Family of the links up (0) or down (1) an axis.

    Examples
    --------
    >>> torus_family(1, 0)
    '+y link'
    """
    return f"{'+-'[direction]}{AXES[axis]} link"


def torus_digits(shape: TorusShape) -> list[Digit]:
    """Digits of the device number: cores of a chip are alike, closed axes shift, open axes reflect."""
    kinds: Sequence[Digit] = [
        Digit(size, "shift" if wraps else "reflection")
        for size, wraps in zip(shape.dimensions, shape.wraparound, strict=True)
    ]
    return [Digit(shape.devices_per_chip, "permutable"), *kinds]
