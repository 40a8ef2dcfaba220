"""Text with units becomes SI numbers here and back again: the only place that scales numbers.

``B`` is a byte and ``b`` a bit; ``k M G T P E`` are powers of 1000 and ``Ki Mi Gi Ti Pi Ei`` powers of 1024.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Literal, get_args

from moesim.errors import UnitError

Dimension = Literal["bytes", "bytes_per_s", "flop_per_s", "seconds", "hertz", "watts", "usd_per_hour"]

MAX_TEXT_LENGTH = 64
WRONG_UNIT = "E-SCN-005"
WRONG_TYPE = "E-SCN-006"
OUT_OF_RANGE = "E-SCN-007"

_DECIMAL_PREFIXES = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY_PREFIXES = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_NAMES: Mapping[Dimension, tuple[str, str]] = MappingProxyType(
    {
        "bytes": ("an amount of data", "900 GB"),
        "bytes_per_s": ("a rate of data", "900 GB/s"),
        "flop_per_s": ("a rate of arithmetic", "15.7 TFLOP/s"),
        "seconds": ("a duration", "2.5 us"),
        "hertz": ("a frequency", "1.38 GHz"),
        "watts": ("a power", "300 W"),
        "usd_per_hour": ("a price per time", "3.06 USD/h"),
    }
)
_ACCEPTED: Mapping[Dimension, str] = MappingProxyType(
    {
        "bytes": "B, kB, MB, GB, TB, PB, EB (powers of 1000) and KiB, MiB, GiB, TiB, PiB, EiB (powers of 1024)",
        "bytes_per_s": "B/s, kB/s, MB/s, GB/s, TB/s, KiB/s, MiB/s, GiB/s (bytes) and kb/s, Mb/s, Gb/s, Tb/s (bits)",
        "flop_per_s": "FLOP/s, kFLOP/s, MFLOP/s, GFLOP/s, TFLOP/s, PFLOP/s, EFLOP/s",
        "seconds": "ps, ns, us, ms, s, min, h, d",
        "hertz": "Hz, kHz, MHz, GHz, THz",
        "watts": "mW, W, kW, MW",
        "usd_per_hour": "USD/h",
    }
)
_NEEDS: Mapping[Dimension, str] = MappingProxyType(
    {name: f"{'a rate' if name.endswith('_per_s') else phrase} such as" for name, (phrase, _) in _NAMES.items()}
)
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# A number begins with what only a number begins with; its unit is what follows the last digit or point.
_NUMBER_AND_UNIT = re.compile(r"([-+]?[.,_]*[0-9](?:[0-9.,_]|[eE](?=[-+]?[0-9])|(?<=[eE])[-+])*)( *)(.*)", re.DOTALL)
# What remains of "1e GB" and of "0x10 GB" after their digits.
_CUT_NUMBER = re.compile(r"[eE](?![A-Za-z])|[xXoO][0-9a-fA-F]")
_NOT_FINITE = re.compile(r"[-+]?\.?(?:nan|inf|infinity)(?: .*)?", re.IGNORECASE | re.DOTALL)
# 64 digits times 1024**6 is exact in 96; no traps, so that an overflow becomes infinity.
_EXACT = Context(prec=96, traps=[])


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit: how many SI units it holds, and whether it counts bits."""

    dimension: Dimension
    scale: Decimal
    counts_bits: bool = False


@cache
def _units() -> Mapping[str, _Unit]:
    """Every unit by its symbol, the ones to advise first."""
    units: dict[str, _Unit] = {}
    for prefix, exponent in _DECIMAL_PREFIXES.items():
        scale = Decimal(10) ** exponent
        units[f"{prefix}B"] = _Unit("bytes", scale)
        units[f"{prefix}B/s"] = _Unit("bytes_per_s", scale)
        units[f"{prefix}FLOP/s"] = _Unit("flop_per_s", scale)
        for bit in ("b", "bit"):
            units[f"{prefix}{bit}"] = _Unit("bytes", scale / 8, True)
            units[f"{prefix}{bit}/s"] = _Unit("bytes_per_s", scale / 8, True)
    for prefix, exponent in _BINARY_PREFIXES.items():
        scale = Decimal(1024) ** exponent
        units[f"{prefix}B"] = _Unit("bytes", scale)
        units[f"{prefix}B/s"] = _Unit("bytes_per_s", scale)
    for prefix in ("", "k", "M", "G", "T"):
        units[f"{prefix}Hz"] = _Unit("hertz", Decimal(10) ** _DECIMAL_PREFIXES[prefix])
    for symbol, watts in {"mW": "0.001", "W": "1", "kW": "1e3", "MW": "1e6"}.items():
        units[symbol] = _Unit("watts", Decimal(watts))
    for symbol, seconds in _DURATIONS.items():
        units[symbol] = _Unit("seconds", Decimal(seconds))
    units["USD/h"] = _Unit("usd_per_hour", Decimal(1))
    return MappingProxyType(units)


# Both code points of the micro sign are on keyboards: U+00B5 and the Greek letter U+03BC.
_DURATIONS = {
    "ps": "1e-12",
    "ns": "1e-9",
    "us": "1e-6",
    "\u00b5s": "1e-6",
    "\u03bcs": "1e-6",
    "ms": "1e-3",
    "s": "1",
    "min": "60",
    "h": "3600",
    "d": "86400",
}
_PRINTED: Mapping[Dimension, tuple[str, ...]] = MappingProxyType(
    {
        "bytes": ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"),
        "bytes_per_s": ("B/s", "kB/s", "MB/s", "GB/s", "TB/s", "PB/s", "EB/s"),
        "flop_per_s": ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s", "EFLOP/s"),
        "seconds": ("ps", "ns", "us", "ms", "s", "min", "h", "d"),
        "hertz": ("Hz", "kHz", "MHz", "GHz", "THz"),
        "watts": ("mW", "W", "kW", "MW"),
        "usd_per_hour": ("USD/h",),
    }
)


def parse_quantity(text: str | int | float, dimension: Dimension) -> float:
    """Convert text such as ``"900 GB/s"`` to a number in SI units (bytes for data).

    Parameters
    ----------
    text : str
        A number, at most one space and a unit. A bare number is refused: it does not say its unit.
    dimension : str
        What the text must measure.

    Returns
    -------
    float
        The nearest double, zero or positive.

    Raises
    ------
    UnitError
        Each kind of malformed text has its own sentence; its ``code`` says unit, type or range.

    Examples
    --------
    >>> parse_quantity("900 GB/s", "bytes_per_s")
    900000000000.0
    >>> parse_quantity("25 Gb/s", "bytes_per_s")  # bits: 25e9 / 8
    3125000000.0
    >>> parse_quantity("1 GiB", "bytes")
    1073741824.0
    """
    shown, number, symbol = _split(text, dimension)
    unit = _units().get(symbol)
    if unit is None:
        raise _unknown_unit(shown, number, symbol, dimension)
    if unit.dimension != dimension:
        raise _wrong_dimension(shown, number, symbol, dimension)
    if unit.counts_bits and dimension == "bytes":
        raise _bits_for_bytes(shown, number, symbol)
    return _scaled(shown, number, unit.scale)


def format_quantity(value: float, dimension: Dimension, *, digits: int = 3) -> str:
    """Write a number in SI units with the unit that reads best.

    Amounts of data get binary prefixes (``GiB``), as device memory does; rates decimal ones (``GB/s``), as links do.

    Parameters
    ----------
    value : float
        Finite; negative for differences, which `parse_quantity` does not read.
    dimension : str
        What the value measures.
    digits : int
        Significant digits, 1 to 17; trailing zeros are dropped.

    Returns
    -------
    str
        Text that `parse_quantity` reads back to the same value, to the given digits.

    Examples
    --------
    >>> format_quantity(3.125e9, "bytes_per_s")
    '3.12 GB/s'
    >>> format_quantity(32 * 2**30, "bytes")
    '32 GiB'
    """
    if not math.isfinite(value):
        raise UnitError(f"{value} cannot be written as {_NAMES[dimension][0]}", "use a finite number", OUT_OF_RANGE)
    if not 1 <= digits <= 17:
        raise ValueError(f"digits = {digits} is outside 1 to 17")
    symbols = _PRINTED[dimension]
    if value == 0:
        return f"0 {next(symbol for symbol in symbols if _units()[symbol].scale == 1)}"
    symbol, rounded = next(
        (symbol, rounded)
        for symbol in symbols
        if abs(rounded := _rounded(value, symbol, digits)) < 1000 or symbol == symbols[-1]
    )
    return f"{_plain_number(rounded)} {symbol}"


def _rounded(value: float, symbol: str, digits: int) -> Decimal:
    """Return the value in a unit, rounded to significant digits."""
    scaled = _EXACT.divide(Decimal(float(value)), _units()[symbol].scale)
    return Decimal(f"{scaled:.{digits - 1}e}")


def _plain_number(value: Decimal) -> str:
    """Write a rounded number without trailing zeros, and without an exponent where it stays short."""
    exponent = value.adjusted()
    if -7 <= exponent <= 15:
        text = f"{value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, _, power = f"{value:e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"


def _scaled(shown: str, number: str, scale: Decimal) -> float:
    """Return number times scale, rounded once; refuse what overflows or vanishes."""
    exact = _EXACT.create_decimal(number)
    value = float(_EXACT.multiply(exact, scale))
    if math.isinf(value):
        raise UnitError(f"{shown} is too large for a number", "use a value below 1e308 in base units", OUT_OF_RANGE)
    if value == 0.0 and not exact.is_zero():
        raise UnitError(f"{shown} is too small for a number", "use a value above 1e-308, or 0", OUT_OF_RANGE)
    return value


def _split(text: object, dimension: Dimension) -> tuple[str, str, str]:
    """Return the text as shown in messages, its number and its unit; refuse what is not both."""
    if not isinstance(text, str):
        raise _not_text(text, dimension)
    if len(text) > MAX_TEXT_LENGTH:
        shown = f"{text[:20]!r}..."
        raise UnitError(
            f"{shown} has {len(text)} characters, a quantity has at most {MAX_TEXT_LENGTH}",
            _write(dimension),
            WRONG_UNIT,
        )
    shown = repr(text)
    if not text.strip():
        raise UnitError(f"{shown} is empty", _write(dimension), WRONG_UNIT)
    if text != text.strip():
        raise UnitError(f"{shown} has spaces around it", f"write '{' '.join(text.split())}'", WRONG_UNIT)
    if _NOT_FINITE.fullmatch(text):
        raise UnitError(f"{shown} is not a finite number", _write(dimension), OUT_OF_RANGE)
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise UnitError(f"{shown} does not begin with a number", _write(dimension), WRONG_UNIT)
    number, gap, symbol = match.groups()
    _check_number(shown, number, symbol)
    if not symbol:
        raise UnitError(f"{shown} has no unit", _with_unit(number, dimension), WRONG_UNIT)
    if len(gap) > 1:
        raise UnitError(f"{shown} has more than one space inside", f"write '{number} {symbol}'", WRONG_UNIT)
    return shown, number, symbol


def _check_number(shown: str, number: str, symbol: str) -> None:
    """Refuse what begins like a number and is none, or is a negative one."""
    unit = f" {symbol}" if symbol else ""
    if number.startswith("-"):
        raise UnitError(f"{shown} is negative", "use zero or a positive number", OUT_OF_RANGE)
    if "," in number or "_" in number:
        plain = number.replace(",", "").replace("_", "")
        pointed = f", or '{number.replace(',', '.')}{unit}' for a decimal point" if number.count(",") == 1 else ""
        raise UnitError(f"{shown} has a separator in its number", f"write '{plain}{unit}'{pointed}", WRONG_UNIT)
    if not _NUMBER.fullmatch(number) or _CUT_NUMBER.match(symbol):
        number += symbol.split(" ")[0] if _CUT_NUMBER.match(symbol) else ""
        raise UnitError(
            f"{shown} begins with {number!r}, which is not a number", "write it as 900, 2.5 or 1e9", WRONG_UNIT
        )


def _not_text(value: object, dimension: Dimension) -> UnitError:
    """Explain why a value that is not text is not a quantity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = {bool: "true or false", type(None): "null", list: "a list", dict: "a mapping"}.get(
            type(value), "no text"
        )
        return UnitError(f"found {kind}, but {_NAMES[dimension][0]} is needed", _write(dimension), WRONG_TYPE)
    if isinstance(value, float) and not math.isfinite(value):
        return UnitError(f"{value} is not a finite number", _write(dimension), OUT_OF_RANGE)
    if value < 0:
        return UnitError(f"{_short(value)} is negative and has no unit", _write(dimension), OUT_OF_RANGE)
    return UnitError(f"the number {_short(value)} has no unit", _with_unit(_short(value), dimension), WRONG_UNIT)


def _short(value: float) -> str:
    """Write a number so that it fits into a sentence; str() refuses integers beyond 4300 digits."""
    return str(value) if abs(value) < 10**16 else f"{Decimal(value):.3e}"


def _write(dimension: Dimension) -> str:
    """Advise what a quantity of a dimension looks like."""
    phrase, example = _NAMES[dimension]
    return f"write {phrase} such as '{example}'"


def _with_unit(number: str, dimension: Dimension) -> str:
    """Advise to add a unit to a bare number."""
    return f"add a unit, such as '{number} {_NAMES[dimension][1].split()[1]}'; {_accepted(dimension)}"


def _accepted(dimension: Dimension) -> str:
    """Advise which units there are."""
    return f"the units are {_ACCEPTED[dimension]}"


def _unknown_unit(shown: str, number: str, symbol: str, dimension: Dimension) -> UnitError:
    """Name the unit that was probably meant, among those of the dimension."""
    accepted = [name for name, unit in _units().items() if unit.dimension == dimension and "bit" not in name]
    folded = [name for name in accepted if name.casefold() == symbol.casefold()]
    if len(folded) > 1:
        choices = " or ".join(f"'{number} {name}'" for name in folded)
        remedy = f"write {choices}: B is a byte, b a bit"
    else:
        nearest = folded[0] if folded else _nearest_unit(symbol, accepted)
        remedy = _accepted(dimension) if nearest is None else f"did you mean '{number} {nearest}'?"
    return UnitError(f"{shown} has the unknown unit {symbol!r}", remedy, WRONG_UNIT)


def _nearest_unit(symbol: str, accepted: list[str]) -> str | None:
    """Find the unit that was probably meant; never advise bytes for bits, or 1024 for 1000."""
    per_second = re.sub(r"(?:ps|P?S|s)$", "/s", symbol)
    if per_second in accepted:
        return per_second
    letters = [letter for letter in "bB" if letter in symbol]
    if len(letters) == 1:
        accepted = [name for name in accepted if letters[0] in name]
    is_binary = re.search("[kKMGTPE]i", symbol) is not None
    accepted = [name for name in accepted if (re.search("[KMGTPE]i", name) is not None) == is_binary]
    close = get_close_matches(symbol, accepted, n=1)
    return close[0] if close else None


def _wrong_dimension(shown: str, number: str, symbol: str, dimension: Dimension) -> UnitError:
    """Say what the text measures and what is needed, in the user's number where only the time is missing."""
    found, _ = _NAMES[_units()[symbol].dimension]
    example = _NAMES[dimension][1]
    if dimension == "bytes_per_s" and f"{symbol}/s" in _units():
        example = f"{number} {symbol}/s"
    elif dimension == "bytes" and symbol.endswith("B/s"):
        example = f"{number} {symbol.removesuffix('/s')}"
    needed = f"{_NEEDS[dimension]} '{example}' is needed"
    return UnitError(f"{shown} is {found}, {needed}", _accepted(dimension), WRONG_UNIT)


def _bits_for_bytes(shown: str, number: str, symbol: str) -> UnitError:
    """Offer both readings of an amount of memory in bits."""
    in_bytes = _plain_number(_EXACT.divide(_EXACT.create_decimal(number), Decimal(8)))
    byte_symbol = re.sub("b(it)?$", "B", symbol)
    remedy = f"write '{in_bytes} {byte_symbol}' if bits are meant, '{number} {byte_symbol}' if bytes are meant"
    return UnitError(f"{shown} is in bits, but memory and messages are measured in bytes", remedy, WRONG_UNIT)


DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
"""Every dimension, in the order of its definition."""
