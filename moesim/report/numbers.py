"""Numbers as a chart shows them: one unit per chart, four significant digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

SIGNIFICANT_DIGITS = 4
LONG_S = 10.0
SHORT_S = 1e-3
GIB = 2.0**30


@dataclass(frozen=True)
class Scale:
    """A unit and how many decimals the values of one chart have in it."""

    symbol: str
    size: float
    decimals: int

    def number(self, value: float) -> str:
        """A value without its unit.

        Examples
        --------
        >>> Scale("ms", 1e-3, 1).number(0.64743), Scale("ms", 1e-3, 1).number(1e-6)
        ('647.4', '< 0.1')
        """
        if value == 0:
            return "0"
        scaled = value / self.size
        smallest = 10.0**-self.decimals
        if 0 < scaled < smallest / 2:
            return f"< {smallest:.{self.decimals}f}"
        return f"{scaled:,.{self.decimals}f}"

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.number(value)} {self.symbol}"


def time_scale(largest_s: float) -> Scale:
    """Unit for durations up to ``largest_s``: milliseconds unless they are far off.

    Examples
    --------
    >>> time_scale(0.64743).text(0.64743), time_scale(15.169).text(15.169)
    ('647.4 ms', '15.17 s')
    """
    if largest_s >= LONG_S:
        return _scale("s", 1.0, largest_s)
    return _scale("ms", 1e-3, largest_s) if largest_s >= SHORT_S else _scale("µs", 1e-6, largest_s)


def memory_scale(largest_bytes: float) -> Scale:
    """GiB, with decimals for amounts up to ``largest_bytes``."""
    return Scale("GiB", GIB, min(_scale("GiB", GIB, largest_bytes).decimals, 2))


def _scale(symbol: str, size: float, largest: float) -> Scale:
    digits_before = math.floor(math.log10(largest / size)) + 1 if largest > 0 else 1
    return Scale(symbol, size, max(SIGNIFICANT_DIGITS - digits_before, 0))


def percent(fraction: float) -> str:
    """A share in percent, with one decimal.

    Examples
    --------
    >>> percent(0.4635), percent(1.2e-5), percent(0.0)
    ('46.4 %', '< 0.1 %', '0 %')
    """
    if fraction == 0:
        return "0 %"
    return "< 0.1 %" if 0 < fraction < 0.0005 else f"{fraction:.1%}".replace("%", " %")


def significant(value: float) -> str:
    """Four significant digits with separators of thousands, never an exponent.

    Examples
    --------
    >>> significant(759176.4), significant(684.95), significant(6.77344)
    ('759,200', '685.0', '6.773')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits_before = math.floor(math.log10(abs(value))) + 1
    decimals = SIGNIFICANT_DIGITS - digits_before
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"
