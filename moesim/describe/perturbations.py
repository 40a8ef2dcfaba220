"""What goes wrong in a simulated step: slow devices, slow and flapping links, a late host. All off by default."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moesim.errors import Problem, ScenarioError, UnitError, nearest_name
from moesim.units import parse_quantity

COMMAND_LINE = "E-CLI-001"
LARGEST_SPREAD = 2.0
"""Of the logarithm: beyond it one device in twenty is 50 times slower than the middle one."""


@dataclass(frozen=True)
class SlowRank:
    """A device whose kernels take ``factor`` times as long."""

    rank: int
    factor: float


@dataclass(frozen=True)
class SlowLink:
    """Links of one level with ``factor`` of their bandwidth: those of one rank's device, or of all (rank None)."""

    level: str
    rank: int | None
    factor: float


@dataclass(frozen=True)
class FlappingLink:
    """A slow link that comes and goes: slow during a share ``duty`` of every ``period_s``."""

    level: str
    rank: int | None
    factor: float
    period_s: float
    duty: float


@dataclass(frozen=True)
class Perturbations:
    """Everything that makes ranks unequal beside their loads.

    Attributes
    ----------
    slow_ranks : tuple of SlowRank
        Devices named one by one.
    speed_spread : float
        Deviation of the logarithm of how long each device's kernels take, drawn once per device; the median is 1.
    slow_links : tuple of SlowLink
        Links with part of their bandwidth for the whole step.
    flapping_links : tuple of FlappingLink
        Links with part of their bandwidth part of the time.
    host_jitter_s : float
        Mean of what each host is late for each micro-batch's pass, exponentially distributed.
    """

    slow_ranks: tuple[SlowRank, ...] = ()
    speed_spread: float = 0.0
    slow_links: tuple[SlowLink, ...] = ()
    flapping_links: tuple[FlappingLink, ...] = ()
    host_jitter_s: float = 0.0

    @property
    def is_none(self) -> bool:
        """Whether nothing goes wrong."""
        return self == Perturbations()

    @property
    def is_drawn(self) -> bool:
        """Whether one step differs from the next: where links flap or hosts are late."""
        return bool(self.flapping_links) or self.host_jitter_s > 0


Part = TypeVar("Part")


def read_perturbations(
    *,
    slow_ranks: Sequence[str] = (),
    speed_spread: float = 0.0,
    slow_links: Sequence[str] = (),
    flapping_links: Sequence[str] = (),
    host_jitter: str | None = None,
    num_ranks: int,
    levels: Sequence[str],
) -> Perturbations:
    """Read perturbations from the texts of a command line.

    Parameters
    ----------
    slow_ranks : sequence of str
        ``RANK=FACTOR``: how many times as long its kernels take.
    speed_spread : float
        Deviation of the logarithm of all devices' factors.
    slow_links : sequence of str
        ``LEVEL:RANK=FACTOR``, or ``LEVEL=FACTOR`` for every rank: the share of the bandwidth that is left.
    flapping_links : sequence of str
        ``LEVEL:RANK=FACTOR,PERIOD,DUTY``: slow for a share DUTY of every PERIOD.
    host_jitter : str, optional
        A time with its unit.
    num_ranks : int
        Ranks there are.
    levels : sequence of str
        Names of the cluster's levels of links.

    Returns
    -------
    Perturbations
        SI.

    Raises
    ------
    ScenarioError
        If texts are wrong; all problems at once.

    Examples
    --------
    >>> found = read_perturbations(slow_ranks=["3=1.2"], host_jitter="5 us", num_ranks=8, levels=["node"])
    >>> found.slow_ranks[0].factor, found.host_jitter_s
    (1.2, 5e-06)
    """
    problems: list[Problem] = []

    def read(option: str, texts: Iterable[str], reader: Callable[[str], Part]) -> tuple[Part, ...]:
        parts: list[Part] = []
        for text in texts:
            try:
                parts.append(reader(text))
            except _TextError as error:
                problems.append(Problem(COMMAND_LINE, f"{text!r}: {error.message}", error.remedy, field=option))
        return tuple(parts)

    found = Perturbations(
        read("--slow-rank", slow_ranks, lambda text: _slow_rank(text, num_ranks)),
        speed_spread,
        read("--slow-link", slow_links, lambda text: _slow_link(text, num_ranks, levels)),
        read("--flapping-link", flapping_links, lambda text: _flapping_link(text, num_ranks, levels)),
        sum(read("--host-jitter", [] if host_jitter is None else [host_jitter], _seconds)),
    )
    if not 0 <= speed_spread <= LARGEST_SPREAD:
        message, remedy = f"the spread is {speed_spread:g}", "give a deviation of the logarithm, such as 0.02"
        problems.append(Problem(COMMAND_LINE, message, f"{remedy}, up to {LARGEST_SPREAD:g}", field="--speed-spread"))
    ranks = [slow.rank for slow in found.slow_ranks]
    for rank in sorted({rank for rank in ranks if ranks.count(rank) > 1}):
        message = f"rank {rank} is given {ranks.count(rank)} times"
        problems.append(Problem(COMMAND_LINE, message, "give each rank one factor", field="--slow-rank"))
    if problems:
        raise ScenarioError(problems)
    return found


class _TextError(Exception):
    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


def _halves(text: str, form: str, example: str) -> tuple[str, str]:
    left, sign, right = (part.strip() for part in text.partition("="))
    if not (left and sign and right):
        raise _TextError(f"this is not {form}", f"write it like {example}")
    return left, right


def _number(text: str, what: str, low: float, high: float, remedy: str) -> float:
    """A number above ``low`` and up to ``high``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (low < value <= high and math.isfinite(value)):
        raise _TextError(f"{what} is {text.strip()!r}", remedy)
    return value


def _rank(text: str, num_ranks: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < num_ranks):
        raise _TextError(f"there is no rank {text!r}", f"ranks are 0 to {num_ranks - 1}")
    return int(text)


def _slow_rank(text: str, num_ranks: int) -> SlowRank:
    rank, factor = _halves(text, "RANK=FACTOR", "3=1.2")
    remedy = "give how many times as long kernels take, above 0, such as 1.2"
    return SlowRank(_rank(rank, num_ranks), _number(factor, "the factor", 0, 1e6, remedy))


def _place(text: str, num_ranks: int, levels: Sequence[str]) -> tuple[str, int | None]:
    level, colon, rank = (part.strip() for part in text.partition(":"))
    if level not in levels:
        nearest = nearest_name(level, levels)
        hint = f"did you mean {nearest}? " if nearest else ""
        raise _TextError(f"the cluster has no level {level!r}", f"{hint}levels are {', '.join(levels)}")
    return level, _rank(rank, num_ranks) if colon else None


SHARE_REMEDY = "give the share of the bandwidth that is left, above 0 and up to 1"


def _slow_link(text: str, num_ranks: int, levels: Sequence[str]) -> SlowLink:
    place, factor = _halves(text, "LEVEL:RANK=FACTOR", f"{levels[-1]}:0=0.5")
    return SlowLink(*_place(place, num_ranks, levels), _number(factor, "the factor", 0, 1, SHARE_REMEDY))


def _flapping_link(text: str, num_ranks: int, levels: Sequence[str]) -> FlappingLink:
    form, example = "LEVEL:RANK=FACTOR,PERIOD,DUTY", f"{levels[-1]}:0=0.1,2s,0.25"
    place, right = _halves(text, form, example)
    parts = right.split(",")
    if len(parts) != 3:
        raise _TextError(f"this is not {form}", f"write it like {example}")
    level, rank = _place(place, num_ranks, levels)
    period_s = _seconds(parts[1].strip())
    if period_s <= 0:
        raise _TextError("the period is 0", "give a time above 0, such as 2s")
    duty = _number(parts[2], "the duty", 0, 1, "give the share of the period that is slow, above 0 and up to 1")
    return FlappingLink(level, rank, _number(parts[0], "the factor", 0, 1, SHARE_REMEDY), period_s, duty)


def _seconds(text: str) -> float:
    try:
        return parse_quantity(text, "seconds")
    except UnitError as error:
        raise _TextError(error.message, error.remedy) from None
